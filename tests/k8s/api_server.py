"""A fake API server: lists, watches, changes objects and streams logs as the real one does, and fails on demand.

It implements the requests of `api.py` over real HTTP: chunked watches from a resource version, 410 for an expired
version, bearer tokens; no bookmarks. Each request uses up the first matching fault of `faults`.
"""

import contextlib
import json
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
import yaml

Object = dict[str, Any]
KINDS = {
    "jobs": "Job",
    "pods": "Pod",
    "configmaps": "ConfigMap",
    "events": "Event",
    "serviceaccounts": "ServiceAccount",
}
_PATH = re.compile(r"/api(?:s/batch)?/v1/namespaces/default/(\w+)(?:/([\w.-]+))?(?:/status)?(/log)?")


@dataclass
class Fault:
    """A failure of the next `times` requests whose method and address match the pattern `request`."""

    request: str
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None  # bytes of the body
    is_clean: bool = False  # whether the cut looks like the end of the body
    hangs: bool = False  # sends no response and keeps the connection open
    drops_response: bool = False  # performs the request, then closes the connection without a response
    times: int = 1
    applied: int = 0  # how often a response was really failed, cut, delayed or dropped


class ApiServer:
    """Objects, their history, and the HTTP server that serves them."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], Object] = {}
        self.history: list[tuple[int, str, Object]] = []
        self.logs: dict[str, list[bytes]] = {}  # by pod; each line with its timestamp and its newline
        self.ended: set[str] = set()  # pods whose log is complete
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.token: str | None = None
        self.version = 1
        self.expired = 0  # watches from a version below this one get 410 Gone
        self.changed = threading.Condition(threading.RLock())
        self._server: _Server | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen; after `stop`, on the same port as before."""
        self._server = _Server(("127.0.0.1", self.port), _Handler)
        self._server.api, self.port = self, self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self) -> None:
        """Stop listening and cut every connection."""
        if self._server:
            server, self._server = self._server, None
            server.shutdown()
            server.server_close()
            server.cut_connections()
            with self.changed:
                self.changed.notify_all()

    def kubeconfig(self, folder: Path, token: str = "first", **user: Any) -> Path:
        """Write a kubeconfig for this server and return its path."""
        path = folder / "kubeconfig"
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "fake", "cluster": {"server": self.url}}],
            "users": [{"name": "me", "user": user or {"token": token}}],
            "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "me", "namespace": "default"}}],
            "current-context": "fake",
        }
        path.write_text(yaml.safe_dump(config))
        return path

    def count(self, pattern: str) -> int:
        """Return how many requests match a pattern."""
        return sum(bool(re.search(pattern, request)) for request in list(self.requests))

    # Changes that a controller or a node makes

    def put(self, plural: str, item: Object) -> Object:
        """Create or replace an object."""
        with self.changed:
            name = item["metadata"]["name"]
            existing = self.objects.get((plural, name))
            metadata = {"uid": str(uuid.uuid4()), "creationTimestamp": _now()} | item["metadata"]
            metadata |= {"resourceVersion": str(self.version + 1), "namespace": "default"}
            item = {"kind": KINDS[plural], "status": {}} | item | {"metadata": metadata}
            self.objects[plural, name] = item
            self._record("MODIFIED" if existing else "ADDED", item)
            return item

    def change(self, plural: str, name: str, patch: Object) -> Object | None:
        """Merge a patch into an object."""
        with self.changed:
            existing = self.objects.get((plural, name))
            return self.put(plural, _merged(existing, patch)) if existing else None

    def remove(self, plural: str, name: str) -> None:
        """Remove an object and the objects that it owns."""
        with self.changed:
            removed = self.objects.pop((plural, name), None)
            if removed is None:
                return
            removed = removed | {"metadata": removed["metadata"] | {"resourceVersion": str(self.version + 1)}}
            self._record("DELETED", removed)
            for kind, other in list(self.objects):
                owners = self.objects.get((kind, other), removed)["metadata"].get("ownerReferences") or ()
                if any(owner["uid"] == removed["metadata"]["uid"] for owner in owners):
                    self.remove(kind, other)

    def write_log(self, pod: str, line: str) -> None:
        """Add a line to a container's log, with the current time as its timestamp."""
        now_ns = time.time_ns()
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now_ns // 10**9))
        with self.changed:
            self.logs.setdefault(pod, []).append(f"{at}.{now_ns % 10**9:09d}Z {line}\n".encode())
            self.changed.notify_all()

    def _record(self, change: str, item: Object) -> None:
        self.version += 1
        plural = next(plural for plural, kind in KINDS.items() if kind == item["kind"])
        self.history.append((self.version, change, item | {"_plural": plural}))
        self.changed.notify_all()


class _Server(ThreadingHTTPServer):
    api: ApiServer
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, *arguments: Any) -> None:
        self.open: set[socket.socket] = set()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def cut_connections(self) -> None:
        for each in list(self.open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def handle_error(self, *arguments: Any) -> None:
        """Print nothing: tests cut connections on purpose."""


class _CutError(Exception):
    pass


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        api = self.server.api
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"null")
        address = f"{self.command} {self.path}"
        with api.changed:
            api.requests.append(address)
            fault = next((each for each in api.faults if each.times and re.search(each.request, address)), Fault(""))
            fault.times -= 1
        self._fault, self._left, self._clean = fault, fault.cut_after, fault.is_clean
        if fault.hangs or fault.status or fault.drops_response:
            fault.applied += 1
        try:
            if fault.hangs:
                self._hang()
            elif fault.status:
                self._answer(fault.status, {"message": f"fault {fault.status}"}, fault.headers)
            elif api.token and self.headers.get("Authorization", "").partition(" ")[2] != api.token:
                self._answer(401, {"message": "Unauthorized"})
            elif fault.drops_response:
                self._perform_without_response(body)
            else:
                self._perform(body)
        except (_CutError, ConnectionError):
            self.close_connection = True

    do_POST = do_PATCH = do_DELETE = do_GET  # noqa: N815 http.server's names

    def _perform_without_response(self, body: Any) -> None:
        self._answer = lambda *arguments: None  # type: ignore[method-assign]
        self._perform(body)
        self.close_connection = True

    def _perform(self, body: Any) -> None:
        parts = urlsplit(self.path)
        found, query, api = _PATH.fullmatch(parts.path), dict(parse_qsl(parts.query)), self.server.api
        if not found:
            self._answer(403, {"message": f"{self.path} is forbidden: only the namespace `default` is allowed"})
            return
        plural, name, log = found.groups()
        if log and (plural, name) in api.objects:
            self._send_log(name, query)
        elif query.get("watch"):
            self._send_watch(plural, query)
        else:
            with api.changed:
                status, answer = self._changed(plural, name, body, query)
            self._answer(status, answer)

    def _changed(self, plural: str, name: str | None, body: Any, query: dict[str, str]) -> tuple[int, Any]:
        api = self.server.api
        if self.command == "POST":
            if (plural, body["metadata"]["name"]) in api.objects:
                return 409, {"message": f"{body['metadata']['name']} already exists"}
            if query.get("dryRun"):
                return 201, body
            return 201, api.put(plural, body)
        if name is None:
            items = [item for (kind, _), item in api.objects.items() if kind == plural and _selected(item, query)]
            return 200, {"items": items, "metadata": {"resourceVersion": str(api.version)}}
        existing = api.objects.get((plural, name))
        if existing is None:
            return 404, {"message": f"{plural} {name!r} not found"}
        if self.command == "PATCH" and existing.get("immutable") and "data" in body:
            return 422, {"message": f"{plural} {name!r} is invalid: data: field is immutable when `immutable` is set"}
        if self.command == "PATCH":
            existing = api.change(plural, name, body)
        if self.command == "DELETE":
            uid = ((body or {}).get("preconditions") or {}).get("uid")
            if uid not in (None, existing["metadata"]["uid"]):
                return 409, {"message": f"the UID in the precondition ({uid}) does not match"}
            api.remove(plural, name)
        return 200, existing

    def _send_watch(self, plural: str, query: dict[str, str]) -> None:
        api, seen = self.server.api, int(query["resourceVersion"])
        if seen < api.expired:
            self._answer(410, {"message": "too old resource version"})
            return
        self._begin()
        until_s = time.monotonic() + float(query["timeoutSeconds"])
        while (left_s := until_s - time.monotonic()) > 0 and self._is_open():
            with api.changed:
                changes = [each for each in api.history if each[0] > seen and each[2]["_plural"] == plural]
                if not changes:
                    api.changed.wait(min(left_s, 0.5))
                    continue
                seen = api.version
            for _, change, item in changes:
                if _selected(item, query):
                    self._chunk(json.dumps({"type": change, "object": item}).encode() + b"\n")
        self._end()

    def _send_log(self, pod: str, query: dict[str, str]) -> None:
        api, sent = self.server.api, 0
        since = query.get("sinceTime", "")[:19].encode()
        self._begin()
        while True:
            with api.changed:
                lines = api.logs.get(pod, [])[sent:]
                is_complete = pod in api.ended or not query.get("follow") or not self._is_open()
                if not lines and not is_complete:
                    api.changed.wait(0.5)
                    continue
            sent += len(lines)
            self._chunk(b"".join(line for line in lines if line[:19] >= since))
            if is_complete and not api.logs.get(pod, [])[sent:]:
                return self._end()

    def _is_open(self) -> bool:
        return self.server.api._server is self.server

    def _hang(self) -> None:
        api = self.server.api
        with api.changed:
            api.changed.wait_for(lambda: not self._is_open())
        raise _CutError

    def _answer(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        is_cut = self._left is not None and self._left < len(data)
        self.send_header("Content-Length", str(self._left if is_cut and self._clean else len(data)))
        self.end_headers()
        self.wfile.write(data[: self._left])
        self.close_connection = is_cut
        self._fault.applied += is_cut

    def _begin(self) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, data: bytes) -> None:
        is_cut = self._left is not None and self._left <= len(data)
        data = data[: self._left]
        if self._left is not None:
            self._left -= len(data)
        if data:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        if is_cut:
            self._fault.applied += 1
            if self._clean:
                self._end()
            raise _CutError

    def _end(self) -> None:
        self.wfile.write(b"0\r\n\r\n")


def _selected(item: Object, query: dict[str, str]) -> bool:
    labels = item["metadata"].get("labels") or {}
    for term in filter(None, query.get("labelSelector", "").split(",")):
        name, equals, value = term.partition("=")
        if name not in labels or (equals and labels[name] != value):
            return False
    for term in filter(None, query.get("fieldSelector", "").split(",")):
        path, _, value = term.partition("=")
        found: Any = item
        for step in path.split("."):
            found = (found or {}).get(step)
        if found != value:
            return False
    return True


def _merged(value: Any, patch: Any) -> Any:
    if not isinstance(patch, dict) or not isinstance(value, dict):
        return patch
    return value | {name: _merged(value.get(name), part) for name, part in patch.items()}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


@contextlib.contextmanager
def served() -> Iterator[ApiServer]:
    """Run a fake API server for as long as the context lasts."""
    server = ApiServer()
    server.start()
    try:
        yield server
    finally:
        server.stop()


def use_kubeconfig(kubeconfig: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `Cluster` read this kubeconfig, as outside a cluster."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    # The client reads the variable KUBECONFIG when it is imported.
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(kubeconfig))


def eventually(is_true: Callable[[], object], timeout_s: float = 20) -> None:
    """Wait until a condition that another thread fulfils is true; fail after `timeout_s`."""
    until_s = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < until_s, f"still not true after {timeout_s:g} s"
        time.sleep(0.01)
