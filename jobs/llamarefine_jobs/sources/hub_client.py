"""The HTTP client that the Hub's library is given: no answer reaches further than the repository's own files.

The library makes a file's name of what a server calls a version of it (its ETag) or a commit, writes whatever comes,
and follows wherever it is led. So each answer is looked at before the library sees it. Its native client for large
files would go past this one, and is switched off.
"""

import contextlib
import re
import threading
from collections.abc import Callable, Iterator

import httpx

from llamarefine_jobs.sources.addresses import redirects_inward

_SILENCE_S = 60.0
_COMMIT = re.compile(r"[0-9a-f]{40}")
_VERSION = re.compile(r'(W/)?"?[\w-][\w.:+=-]{0,200}"?', re.ASCII)
_NAMED = {"X-Repo-Commit": _COMMIT, "X-Linked-Etag": _VERSION, "ETag": _VERSION}  # each becomes a file's or folder's


class Allowance:
    """How many requests may still be made, and how many bytes may come. `refuse` makes the error of it."""

    def __init__(self, requests: int, size_bytes: int, refuse: Callable[[str], Exception]) -> None:
        self.refuse = refuse
        self._requests, self._bytes = requests, size_bytes
        self._lock = threading.Lock()

    def raise_by(self, requests: int, size_bytes: int) -> None:
        """Allow so much more, now that it is known what there is."""
        with self._lock:
            self._requests += requests
            self._bytes += size_bytes

    def take(self, requests: int = 0, size_bytes: int = 0) -> None:
        """Use some of it up."""
        with self._lock:
            self._requests -= requests
            self._bytes -= size_bytes
            if self._requests < 0:
                raise self.refuse("its server sends from one request to the next without an end")
            if self._bytes < 0:
                raise self.refuse("its server sends more than it listed")


def is_commit(text: str) -> bool:
    """Whether `text` is what Git calls a commit; the library makes paths of it."""
    return bool(_COMMIT.fullmatch(text))


@contextlib.contextmanager
def guarded(allowance: Allowance) -> Iterator[None]:
    """Give the Hub's library a client that holds every answer to `allowance`."""
    from huggingface_hub import constants
    from huggingface_hub.utils import set_client_factory  # type: ignore[attr-defined]
    from huggingface_hub.utils._http import default_client_factory

    def make() -> httpx.Client:
        client = default_client_factory()
        client.event_hooks["request"].append(lambda request: _check_request(request, constants.ENDPOINT, allowance))
        client.event_hooks["response"].append(lambda response: _check_response(response, allowance))
        return client

    constants.HF_HUB_DISABLE_XET = True
    set_client_factory(make)
    try:
        yield
    finally:
        set_client_factory(default_client_factory)


def _check_request(request: httpx.Request, endpoint: str, allowance: Allowance) -> None:
    allowance.take(requests=1)
    if request.url.scheme not in ("http", "https") or redirects_inward(str(request.url), endpoint):
        raise allowance.refuse(f"its server leads to {request.url.scheme}://{request.url.host}, where no Hub is")
    request.headers["Accept-Encoding"] = "identity"  # what comes is as long as what is written
    limits = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        name: limits.get(name) or _SILENCE_S for name in ("connect", "read", "write", "pool")
    }


def _check_response(response: httpx.Response, allowance: Allowance) -> None:
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise allowance.refuse("its server packs what was asked for as it is")
    for name, form in _NAMED.items() if response.request.method == "HEAD" else ():
        if name in response.headers and not form.fullmatch(response.headers[name]):
            raise allowance.refuse(f"its server names {response.headers[name]!r:.80} as {name}")
    assert isinstance(response.stream, httpx.SyncByteStream)
    response.stream = _Counted(response.stream, allowance)


class _Counted(httpx.SyncByteStream):
    """A body that ends where the allowance does."""

    def __init__(self, stream: httpx.SyncByteStream, allowance: Allowance) -> None:
        self._stream, self._allowance = stream, allowance

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._stream:
            self._allowance.take(size_bytes=len(chunk))
            yield chunk

    def close(self) -> None:
        self._stream.close()
