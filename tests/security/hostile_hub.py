"""A malicious Hugging Face Hub over real HTTP: each repository is one attack."""

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
    """What a repository lists and serves. The attacker chooses names and headers."""

    files: dict[str, bytes]
    commit: str = COMMIT
    etag: str = ""  # of every file; default: derived from the file
    sizes: dict[str, int] = field(default_factory=dict)  # in the listing; default: the real sizes
    redirect: str = ""  # where every download redirects to
    encoding: str = ""  # Content-Encoding of every download
    endless: str = ""  # "body", "listing" or "pages"
    listing: Any = None  # sent instead of the real listing: bytes unchanged, other values as JSON
    extra: dict[str, str] = field(default_factory=dict)  # headers added to every answer about a file


class Hub:
    """The server and the requests that it received."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.authorizations: set[str] = set()
        self.sent_bytes = 0
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *arguments: None  # type: ignore[method-assign]  # the client closed the connection
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
        hub.requests.append(f"{self.command} {self.path}")
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
            is_raw = isinstance(repository.listing, bytes)
            return self._answer(200, repository.listing if is_raw else json.dumps(repository.listing).encode(), {})
        if repository.endless == "listing":
            return self._endless(hub, b"[", json.dumps(listed[0]).encode() + b",")
        if repository.endless == "pages":
            return self._json(
                [], {"Link": f'<{hub.url}{self.path.split("?")[0]}?cursor={len(hub.requests)}>; rel="next"'}
            )
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
        while hub.sent_bytes < 2 << 30:  # so that the test ends if the client has no limit
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
    """Run a Hub until the context ends."""
    hub = Hub()
    hub.start()
    try:
        yield hub
    finally:
        hub.stop()
