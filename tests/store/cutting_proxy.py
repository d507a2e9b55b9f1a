"""A TCP proxy that imitates failing networks and restarting servers, and counts the failures that it caused."""

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
_ACCESS_DENIED = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code><Message>Access Denied.</Message></Error>'
)
_CHUNK_BYTES = 1 << 14


class CuttingProxy:
    """Forwards bytes to `endpoint`, with the failures that its attributes set. Changes affect open connections, too.

    Each attribute that ends with `_left` is the number of failures that will still happen. If it is 0 at the end of a
    test, all of them have happened.
    """

    def __init__(self, endpoint: str, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> None:
        parts = urlsplit(endpoint)
        self._server = (parts.hostname or "", parts.port or 80)
        self._listener = socket.create_server((host, 0), backlog=64)
        self._lock = threading.Lock()
        self.forwarded_bytes = 0  # by all connections together
        self.endpoint = f"{'https' if tls else 'http'}://{host}:{self._listener.getsockname()[1]}"
        self.tls = tls
        self.connections = 0
        self.refused = 0  # connections that were closed before a byte was forwarded
        self.refuses = False  # close every connection
        self.refusals_left = 0  # close all open connections, and this number of new ones
        self.outage_at_byte: int | None = None  # number of forwarded bytes at which `refusals_left` becomes 12
        self.stalls_left = 0  # forward nothing on this number of new connections, and keep them open
        self.cuts_left = 0  # close this number of connections once they have forwarded `cut_after_bytes`
        self.cut_after_bytes = 0  # per connection, in both directions together
        self.slow_downs_left = 0  # answer 503 SlowDown to this number of requests
        self.retry_after_s = 0  # send Retry-After with these answers
        self.denials_left = 0  # answer 403 AccessDenied to this number of requests
        self.wrong_servers_left = 0  # answer this number of new connections as another server would
        self.wrong_server_status = b"404 Not Found"  # the other server's answer to every request
        self.wrong_certificates: list[ssl.SSLContext | None] = []  # for the next connections, one each; None: no TLS
        self.lost_answers_left = 0  # close the connection instead of forwarding this number of answers to PUT

    def close(self) -> None:
        self._listener.close()
        self.refuses = True

    @contextlib.contextmanager
    def away(self, seconds: float) -> Iterator[None]:
        """Close every connection for some seconds. When the context ends, wait until this time is over."""
        self.refuses = True
        timer = threading.Timer(seconds, lambda: setattr(self, "refuses", False))
        timer.start()
        yield
        timer.join()

    def _take(self, counter: str) -> bool:
        """Reduce `counter` by one; return whether it was above 0."""
        with self._lock:
            left: int = getattr(self, counter)
            setattr(self, counter, max(0, left - 1))
            return left > 0

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self.connections += 1
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            if self.wrong_certificates:
                _show_certificate(client, self.wrong_certificates.pop(0))
                return
            if self.refuses or self._take("refusals_left"):
                with self._lock:
                    self.refused += 1
                return
            if self.tls:
                client = self.tls.wrap_socket(client, server_side=True)
            if self._take("stalls_left"):
                while client.recv(_CHUNK_BYTES):
                    pass
            elif self._take("slow_downs_left"):
                retry_after = b"\r\nRetry-After: %d" % self.retry_after_s if self.retry_after_s else b""
                head = b"503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close" + retry_after
                _answer(client, head, _SLOW_DOWN)
            elif self._take("denials_left"):
                head = b"403 Forbidden\r\nContent-Type: application/xml\r\nConnection: close"
                _answer(client, head, _ACCESS_DENIED)
            elif self._take("wrong_servers_left"):
                while _answer(client, self.wrong_server_status + b"\r\nContent-Type: text/plain", b"nothing here\n"):
                    pass
            else:
                with socket.create_connection(self._server) as server:
                    self._forward(client, server)

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        passed_bytes, is_put = 0, False
        while True:
            ready_sockets = select.select([client, server], [], [], 0.1)[0]
            if self.refuses or self.refusals_left:
                return
            for ready in ready_sockets:
                data = ready.recv(_CHUNK_BYTES)
                if not data:
                    return
                if ready is client:
                    is_put = data.startswith(b"PUT ") or (is_put and not data.startswith((b"GET ", b"HEAD ", b"POST ")))
                elif is_put and not data.startswith(b"HTTP/1.1 100") and self._take("lost_answers_left"):
                    return
                passed_bytes += len(data)
                if self.cuts_left and passed_bytes > self.cut_after_bytes and self._take("cuts_left"):
                    return
                if self._begins_outage(len(data)):
                    return
                (server if ready is client else client).sendall(data)

    def _begins_outage(self, size_bytes: int) -> bool:
        with self._lock:
            self.forwarded_bytes += size_bytes
            if self.outage_at_byte is None or self.forwarded_bytes < self.outage_at_byte:
                return False
            self.outage_at_byte, self.refusals_left = None, 12
            return True

    def start(self) -> None:
        """Accept connections from now on."""
        threading.Thread(target=self._accept, daemon=True).start()


def _show_certificate(client: socket.socket, tls: ssl.SSLContext | None) -> None:
    """Begin the connection as a server with this certificate, or as a server without TLS."""
    if tls:
        tls.wrap_socket(client, server_side=True).close()
    else:
        _answer(client, b"400 Bad Request\r\nConnection: close", b"")


def _answer(client: socket.socket, head: bytes, body: bytes) -> bool:
    """Answer the next request; return False if the client has closed the connection instead."""
    if not client.recv(_CHUNK_BYTES):
        return False
    client.sendall(b"HTTP/1.1 %s\r\nContent-Length: %d\r\n\r\n%s" % (head, len(body), body))
    time.sleep(0.05)  # closing at once, with a part of the request unread, would reset the connection
    return True


@contextlib.contextmanager
def before(endpoint: str, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None) -> Iterator[CuttingProxy]:
    """Run a proxy in front of a server, on an address of this machine, until the context ends."""
    proxy = CuttingProxy(endpoint, host, tls)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.close()
