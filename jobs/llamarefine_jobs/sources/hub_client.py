"""The HTTP client for the Hub's library: it checks each request and each answer before the library sees it.

The library derives names of files from what a server sends (an ETag, a commit), writes as many bytes as come, and
follows every redirect. This client refuses answers that would reach beyond the repository's own files. The library's
native client for large files would bypass these checks, so it is switched off.
"""

import contextlib
import re
import threading
from collections.abc import Callable, Iterator

import httpx

from llamarefine_jobs.sources.web import redirects_inward

_TIMEOUT_S = 60.0
_COMMIT = re.compile(r"[0-9a-f]{40}")
_VERSION = re.compile(r'(W/)?"?[\w-][\w.:+=-]{0,200}"?', re.ASCII)
# The library uses the values of these headers as names of files or folders.
_HEADER_FORMS = {"X-Repo-Commit": _COMMIT, "X-Linked-Etag": _VERSION, "ETag": _VERSION}


class Allowance:
    """The number of requests that may still be made, and of bytes that may still be received.

    `refuse` returns the error that is raised when one of the two is used up.
    """

    def __init__(self, requests: int, size_bytes: int, refuse: Callable[[str], Exception]) -> None:
        self.refuse = refuse
        self._requests, self._bytes = requests, size_bytes
        self._lock = threading.Lock()

    def raise_by(self, requests: int, size_bytes: int) -> None:
        """Allow this many more requests and bytes, once the listing says what there is to download."""
        with self._lock:
            self._requests += requests
            self._bytes += size_bytes

    def take(self, requests: int = 0, size_bytes: int = 0) -> None:
        """Subtract from the allowance. Raises the error from `refuse` if the allowance is exceeded."""
        with self._lock:
            self._requests -= requests
            self._bytes -= size_bytes
            if self._requests < 0:
                raise self.refuse("its server leads from one request to the next without an end")
            if self._bytes < 0:
                raise self.refuse("its server sends more than it listed")


def is_commit(text: str) -> bool:
    """Return whether `text` has the form of a Git commit; the library uses it as part of a path."""
    return bool(_COMMIT.fullmatch(text))


@contextlib.contextmanager
def guarded(allowance: Allowance) -> Iterator[None]:
    """Make the Hub's library use a client that checks every request and answer against `allowance`."""
    from huggingface_hub import constants
    from huggingface_hub.utils import set_client_factory  # type: ignore[attr-defined]
    from huggingface_hub.utils._http import default_client_factory

    def make_client() -> httpx.Client:
        client = default_client_factory()
        client.event_hooks["request"].append(lambda request: _check_request(request, constants.ENDPOINT, allowance))
        client.event_hooks["response"].append(lambda response: _check_response(response, allowance))
        return client

    constants.HF_HUB_DISABLE_XET = True
    set_client_factory(make_client)
    try:
        yield
    finally:
        set_client_factory(default_client_factory)


def _check_request(request: httpx.Request, endpoint: str, allowance: Allowance) -> None:
    allowance.take(requests=1)
    if request.url.scheme not in ("http", "https") or redirects_inward(str(request.url), endpoint):
        raise allowance.refuse(f"its server leads to {request.url.scheme}://{request.url.host}, which is not a Hub")
    request.headers["Accept-Encoding"] = "identity"  # without compression, received and written bytes are the same
    limits = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        name: limits.get(name) or _TIMEOUT_S for name in ("connect", "read", "write", "pool")
    }


def _check_response(response: httpx.Response, allowance: Allowance) -> None:
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise allowance.refuse("its server sends compressed data, which was not requested")
    for name, form in _HEADER_FORMS.items() if response.request.method == "HEAD" else ():
        if name in response.headers and not form.fullmatch(response.headers[name]):
            raise allowance.refuse(f"its server names {response.headers[name]!r:.80} as {name}")
    assert isinstance(response.stream, httpx.SyncByteStream)
    response.stream = _CountedStream(response.stream, allowance)


class _CountedStream(httpx.SyncByteStream):
    """A response's body whose bytes are subtracted from the allowance as they are read."""

    def __init__(self, stream: httpx.SyncByteStream, allowance: Allowance) -> None:
        self._stream, self._allowance = stream, allowance

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._stream:
            self._allowance.take(size_bytes=len(chunk))
            yield chunk

    def close(self) -> None:
        self._stream.close()
