"""Downloads from a real server on this machine, including its errors and redirects."""

import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from llamarefine_jobs.contract.errors import AccessError, DataError, LlamaRefineError, StoreError
from llamarefine_jobs.contract.recipe import Rows
from llamarefine_jobs.data.reading import read_table
from llamarefine_jobs.sources.web import download, redirects_inward

BODY = b"question,answer\nq,a\n"


class Server(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        match self.path:
            case "/rows.csv":
                self.answer(200, BODY, {"Content-Length": str(len(BODY))})
            case "/cut.csv":
                self.answer(200, BODY, {"Content-Length": "4000"})
            case "/moved":
                self.answer(302, b"", {"Location": "/rows.csv"})
            case "/metadata":
                self.answer(302, b"", {"Location": "http://169.254.169.254/latest/meta-data/"})
            case "/leak":
                self.answer(302, b"", {"Location": "file:///etc/passwd"})
            case path:
                self.answer(int(path.strip("/")), b"", {})

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_rows_at_a_web_address_are_read(tmp_path: Path, url: str) -> None:
    rows = Rows(source=f"{url}/rows.csv")
    assert read_table(rows, "prepare.questions", tmp_path, ("question",)).rows == [("q",)]


def test_a_redirect_is_followed(tmp_path: Path, url: str) -> None:
    assert download(f"{url}/moved", tmp_path, "key").read_bytes() == BODY


def test_a_redirect_to_a_local_file_is_not_followed(tmp_path: Path, url: str) -> None:
    with pytest.raises(LlamaRefineError, match=r"HTTP 302|neither http nor https"):
        download(f"{url}/leak", tmp_path, "key")
    assert not any(file.stat().st_size for file in tmp_path.iterdir())


def test_a_redirect_to_a_clouds_metadata_address_is_not_followed(tmp_path: Path, url: str) -> None:
    with pytest.raises(DataError, match="leads to an address of this machine or network"):
        download(f"{url}/metadata", tmp_path, "key")


ADDRESSES = {"web.example": "93.184.215.14", "more.example": "2606:2800::1", "inside.example": "10.0.0.7"}


@pytest.mark.parametrize(
    ("origin", "target", "inward"),
    [
        ("https://web.example/a", "https://web.example/b", False),
        ("https://web.example/a", "https://more.example/b", False),
        ("https://web.example/a", "http://inside.example/b", True),
        ("https://web.example/a", "http://127.0.0.1:9000/b", True),
        ("https://web.example/a", "http://[::1]/b", True),
        ("https://web.example/a", "http://[::ffff:10.0.0.7]/b", True),
        ("https://web.example/a", "http://2130706433/b", True),
        ("https://inside.example/a", "http://127.0.0.1/b", False),
        ("https://inside.example/a", "http://[fe80::1]/b", True),
        ("https://unknown.example/a", "http://inside.example/b", False),
        ("https://unknown.example/a", "http://169.254.169.254/b", True),
    ],
)
def test_redirects_inward(origin: str, target: str, inward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo

    def resolve(host: str, port: None) -> Any:
        if host.endswith(".example") and host not in ADDRESSES:
            raise socket.gaierror
        return real(ADDRESSES.get(host, host), port)

    monkeypatch.setattr("socket.getaddrinfo", resolve)
    assert redirects_inward(target, origin) == inward


@pytest.mark.parametrize(
    ("path", "error"), [("404", DataError), ("403", AccessError), ("503", StoreError), ("cut.csv", StoreError)]
)
def test_the_servers_answer_decides_the_class_of_the_error(
    tmp_path: Path, url: str, path: str, error: type[LlamaRefineError]
) -> None:
    with pytest.raises(error):
        download(f"{url}/{path}", tmp_path, "key")


def test_an_unreachable_server_is_a_store_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot be reached"):
        download("http://127.0.0.1:9/rows.csv", tmp_path, "key")


def test_a_file_above_the_size_limit_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(DataError, match="is over"):
        download(f"{url}/rows.csv", tmp_path, "key", limit_bytes=len(BODY) - 1)
