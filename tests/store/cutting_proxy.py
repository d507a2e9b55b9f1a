"""A TCP proxy that does to connections what networks and restarting servers do."""

import contextlib
import select
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

_SLOW_DOWN = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)
_CHUNK_BYTES = 1 << 14


class CuttingProxy:
    """Passes bytes on to `endpoint`, unless told otherwise. What is set here holds for connections at work, too."""

    def __init__(self, endpoint: str, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> None:
        parts = urlsplit(endpoint)
        self._behind = (parts.hostname or "", parts.port or 80)
        self._listener = socket.create_server((host, 0), backlog=64)
        self.endpoint = f"{'https' if tls else 'http'}://{host}:{self._listener.getsockname()[1]}"
        self.tls = tls
        self.impostors: list[ssl.SSLContext | None] = []  # what answers the next connections instead; None: no TLS
        self.refuses = False  # closes what comes at once
        self.stalls = False  # passes nothing on
        self.slow_downs = 0  # so many requests are answered 503 SlowDown
        self.retry_after_s = 0  # and told when to come again
        self.strangers = 0  # so many connections lead to something else for good, which answers this:
        self.stranger_says = b"404 Not Found"
        self.lost_answers = 0  # so many answers to PUT are thrown away
        self.cut_after_bytes: int | None = None  # of each connection, either way together
        self.cuts = 0
        self.connections = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()
        self.refuses = True

    @contextlib.contextmanager
    def away(self, seconds: float, what: str = "refuses") -> Iterator[None]:
        """Be so for some seconds, which may outlast the context."""
        setattr(self, what, True)
        timer = threading.Timer(seconds, lambda: setattr(self, what, False))
        timer.start()
        yield
        timer.join()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            if self.impostors:
                _greet(client, self.impostors.pop(0))
                return
            if self.tls and not self.refuses:
                client = self.tls.wrap_socket(client, server_side=True)
            if self.slow_downs:
                self.slow_downs -= 1
                asked = b"\r\nRetry-After: %d" % self.retry_after_s if self.retry_after_s else b""
                head = b"503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close" + asked
                _answer(client, head, _SLOW_DOWN)
                return
            if self.strangers:
                self.strangers -= 1
                while _answer(client, self.stranger_says + b"\r\nContent-Type: text/plain", b"nothing here\n"):
                    pass
                return
            if not self.refuses:
                with socket.create_connection(self._behind) as server:
                    self._pass_on(client, server)

    def _pass_on(self, client: socket.socket, server: socket.socket) -> None:
        passed_bytes, is_put = 0, False
        while not self.refuses:
            if self.stalls:
                time.sleep(0.05)
                continue
            for ready in select.select([client, server], [], [], 0.1)[0]:
                data = ready.recv(_CHUNK_BYTES)
                if not data:
                    return
                if ready is client:
                    is_put = data.startswith(b"PUT ") or (is_put and not data.startswith((b"GET ", b"HEAD ", b"POST ")))
                elif is_put and self.lost_answers and not data.startswith(b"HTTP/1.1 100"):
                    self.lost_answers -= 1
                    return
                if self.cut_after_bytes is not None and passed_bytes + len(data) > self.cut_after_bytes:
                    self.cuts += 1
                    return
                passed_bytes += len(data)
                (server if ready is client else client).sendall(data)


def _greet(client: socket.socket, tls: ssl.SSLContext | None) -> None:
    """Begin as the server that has this certificate, or that speaks no TLS."""
    if tls:
        tls.wrap_socket(client, server_side=True).close()
    else:
        _answer(client, b"400 Bad Request\r\nConnection: close", b"")


def _answer(client: socket.socket, head: bytes, body: bytes) -> bool:
    """Answer what comes next; whether anything came."""
    if not client.recv(_CHUNK_BYTES):
        return False
    client.sendall(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (head, len(body), body))
    time.sleep(0.05)  # what was not read would turn the end into a reset
    return True


@contextlib.contextmanager
def before(endpoint: str, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> Iterator[CuttingProxy]:
    """A proxy before a server, on an address of this machine, for as long as the context lasts."""
    proxy = CuttingProxy(endpoint, host, tls)
    try:
        yield proxy
    finally:
        proxy.close()
