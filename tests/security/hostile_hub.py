"""A Hugging Face Hub that serves what it should not: each repository is one attack, over real HTTP."""

import contextlib
import gzip
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0" * 39 + "1"


@dataclass
class Repository:
    """What it lists, and what it serves. Names and headers are the attacker's."""

    files: dict[str, bytes]
    commit: str = COMMIT
    etag: str = ""  # of every file; its own otherwise
    sizes: dict[str, int] = field(default_factory=dict)  # as listed
    redirect: str = ""  # of every download
    encoding: str = ""  # of every download
    endless: str = ""  # "body", "listing" or "pages"
    listing: Any = None  # instead of its own; bytes as they are
    extra: dict[str, str] = field(default_factory=dict)  # headers of every answer about a file


class Hub:
    """The server and what it was asked."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.asked: list[str] = []
        self.authorizations: set[str] = set()
        self.sent_bytes = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *arguments: None  # type: ignore[method-assign]  # a client that has gone
        self._server.hub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def start(self) -> None:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        hub: Hub = self.server.hub  # type: ignore[attr-defined]
        hub.asked.append(f"{self.command} {self.path}")
        hub.authorizations.add(self.headers.get("Authorization", ""))
        with contextlib.suppress(ConnectionError):
            self._serve(hub)

    do_HEAD = do_GET  # noqa: N815 http.server's name

    def _serve(self, hub: Hub) -> None:
        parts = unquote(urlsplit(self.path).path).removeprefix("/api").removeprefix("/models").removeprefix("/datasets")
        owner, name, *rest = parts.removeprefix("/").split("/")
        repository = hub.repositories.get(f"{owner}/{name}")
        if repository is None:
            return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        match rest:
            case [] | ["revision", *_]:
                listed = [{"rfilename": file} for file in repository.files]
                return self._json({"id": f"{owner}/{name}", "sha": repository.commit, "siblings": listed})
            case ["tree", *_]:
                return self._tree(hub, repository)
            case ["resolve", _, *path]:
                return self._file(hub, repository, "/".join(path))
        return self._answer(404, b"{}", {})

    def _tree(self, hub: Hub, repository: Repository) -> None:
        listed: list[dict[str, Any]] = [
            {
                "type": "file",
                "path": file,
                "size": repository.sizes.get(file, len(body)),
                "oid": repository.etag or f"{abs(hash(body)):040x}"[-40:],
            }
            for file, body in repository.files.items()
        ]
        if repository.listing is not None:
            as_it_is = isinstance(repository.listing, bytes)
            return self._answer(200, repository.listing if as_it_is else json.dumps(repository.listing).encode(), {})
        if repository.endless == "listing":
            return self._endless(hub, b"[", json.dumps(listed[0]).encode() + b",")
        if repository.endless == "pages":
            return self._json([], {"Link": f'<{hub.url}{self.path.split("?")[0]}?cursor={len(hub.asked)}>; rel="next"'})
        return self._json(listed)

    def _file(self, hub: Hub, repository: Repository, name: str) -> None:
        body = repository.files.get(name)
        if body is None:
            self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return
        headers = {
            "ETag": f'"{repository.etag or f"{abs(hash(body)):040x}"[-40:]}"',
            "X-Repo-Commit": repository.commit,
        } | repository.extra
        if repository.redirect:
            self._answer(302, b"", headers | {"Location": repository.redirect})
        elif self.command == "GET" and repository.endless == "body":
            self._endless(hub, b"", b"x" * (1 << 16), headers)
        elif self.command == "GET" and repository.encoding:
            self._answer(200, gzip.compress(body), headers | {"Content-Encoding": repository.encoding})
        else:
            self._answer(200, body, headers)

    def _endless(self, hub: Hub, first: bytes, more: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(200)
        for key, value in ({"Transfer-Encoding": "chunked"} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        chunk = first + more
        while hub.sent_bytes < 2 << 30:  # so that a client without a bound ends some day, and is seen
            self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            hub.sent_bytes += len(chunk)
            chunk = more * max(1, (1 << 16) // len(more))
        self.close_connection = True

    def _json(self, value: Any, headers: dict[str, str] | None = None) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


@contextlib.contextmanager
def served() -> Iterator[Hub]:
    """A Hub, for as long as the context lasts."""
    hub = Hub()
    hub.start()
    try:
        yield hub
    finally:
        hub.stop()
