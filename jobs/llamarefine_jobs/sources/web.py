"""A file from the web, to a local folder: http and https only, and on the web, wherever it redirects."""

import contextlib
import shutil
from collections.abc import Iterator
from http.client import HTTPException, HTTPMessage
from pathlib import Path, PurePosixPath
from typing import IO
from urllib import request
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit

from llamarefine_jobs.contract.errors import AccessError, DataError, StoreError
from llamarefine_jobs.sources.addresses import redirects_inward

_TIMEOUT_S = 60
_LIMIT_BYTES = 8 << 30
_INWARD = "leads to an address of this machine or network"


class _Redirects(request.HTTPRedirectHandler):
    """Follows none that leads inside."""

    def redirect_request(
        self, req: request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> request.Request | None:
        if redirects_inward(newurl, req.full_url):
            raise URLError(_INWARD)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _Capped:
    """A file that takes `limit_bytes` and no more."""

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self.file = path.open("wb")
        self.left_bytes = limit_bytes

    def write(self, chunk: bytes) -> int:
        self.left_bytes -= len(chunk)
        if self.left_bytes < 0:
            raise OverflowError
        return self.file.write(chunk)


def download(url: str, into: Path, key: str, limit_bytes: int = _LIMIT_BYTES) -> Path:
    """Bring the file behind `url` into the folder `into`; its path, named as in the URL.

    Raises DataError where there is no such file or it is over `limit_bytes`, AccessError where it
    is refused, StoreError for a server or a network that failed.
    """
    target = into / (PurePosixPath(unquote(urlsplit(url).path)).name or "download")
    into.mkdir(parents=True, exist_ok=True)
    with _errors(url, key, limit_bytes), _opener().open(url, timeout=_TIMEOUT_S) as response:
        capped = _Capped(target, limit_bytes)
        with capped.file:
            shutil.copyfileobj(response, capped)
        expected = response.headers.get("Content-Length")
    if expected is not None and expected.isdigit() and int(expected) != target.stat().st_size:
        raise StoreError(f"{key}: {url} broke off after {target.stat().st_size} of {expected} bytes")
    return target


def read_head(url: str, key: str, size_bytes: int, timeout_s: float = 10) -> bytes:
    """The first `size_bytes` behind `url`; raises as `download` does."""
    with _errors(url, key), _opener().open(url, timeout=timeout_s) as response:
        head: bytes = response.read(size_bytes)
        return head


@contextlib.contextmanager
def _errors(url: str, key: str, limit_bytes: int = _LIMIT_BYTES) -> Iterator[None]:
    try:
        yield
    except OverflowError:
        raise DataError(
            f"{key}: {url} is over {limit_bytes >> 20} MiB; bring it to a bucket or a folder first"
        ) from None
    except HTTPError as error:
        if error.code in (401, 403):
            raise AccessError(f"{key}: {url} may not be read (HTTP {error.code})") from None
        kind = DataError if 400 <= error.code < 500 and error.code not in (408, 429) else StoreError
        raise kind(f"{key}: {url} answered HTTP {error.code}; expected a file") from None
    except URLError as error:
        if "unknown url type" in str(error.reason):
            raise DataError(f"{key}: {url} leads to an address that is neither http nor https") from None
        if error.reason == _INWARD:
            raise DataError(f"{key}: {url} {_INWARD}; give that address itself where it is meant") from None
        raise StoreError(f"{key}: {url} cannot be reached: {error.reason}") from None
    except (TimeoutError, ConnectionError, HTTPException) as error:
        raise StoreError(f"{key}: {url} broke off: {type(error).__name__}") from None


def _opener() -> request.OpenerDirector:
    """An opener that knows no file:// and no ftp://, which the standard one does, redirects included."""
    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler,
        request.UnknownHandler,
        request.HTTPHandler,
        request.HTTPSHandler,
        request.HTTPDefaultErrorHandler,
        request.HTTPErrorProcessor,
        _Redirects,
    ):
        opener.add_handler(handler())
    return opener
