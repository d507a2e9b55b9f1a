"""Files from web addresses, over http and https only, and where a server may redirect to."""

import contextlib
import ipaddress
import shutil
import socket
from collections.abc import Iterator
from http.client import HTTPException, HTTPMessage
from pathlib import Path, PurePosixPath
from typing import IO
from urllib import request
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit

from llamarefine_jobs.contract.errors import AccessError, DataError, StoreError

_TIMEOUT_S = 60
_LIMIT_BYTES = 8 << 30
_INWARD = "leads to an address of this machine or network"


def download(url: str, into: Path, key: str, limit_bytes: int = _LIMIT_BYTES) -> Path:
    """Download the file at `url` into the folder `into`; return its path, which is named as in the URL.

    `key` is the recipe's key that names the source. Raises DataError if there is no such file or it is larger than
    `limit_bytes`, AccessError if the server refuses access, StoreError if the server or the network fails.
    """
    target = into / (PurePosixPath(unquote(urlsplit(url).path)).name or "download")
    into.mkdir(parents=True, exist_ok=True)
    with _errors(url, key, limit_bytes), _opener().open(url, timeout=_TIMEOUT_S) as response:
        capped = _CappedFile(target, limit_bytes)
        with capped.file:
            shutil.copyfileobj(response, capped)
        expected = response.headers.get("Content-Length")
    if expected is not None and expected.isdigit() and int(expected) != target.stat().st_size:
        raise StoreError(f"{key}: {url} broke off after {target.stat().st_size} of {expected} bytes")
    return target


def read_head(url: str, key: str, size_bytes: int, timeout_s: float = 10) -> bytes:
    """Return the first `size_bytes` of the file at `url`; raises the same errors as `download`."""
    with _errors(url, key), _opener().open(url, timeout=timeout_s) as response:
        head: bytes = response.read(size_bytes)
        return head


def redirects_inward(target: str, origin: str) -> bool:
    """Return whether a redirect from `origin` to `target` leads from a public address into a private network.

    A redirect to a link-local address, where clouds serve credentials, always counts. A redirect to this machine or to
    a private network does not count if `origin` is private, too: a private file server may redirect within its network.
    A target whose name does not resolve here does not count: only the proxy that resolves it can check it. An origin
    whose name does not resolve here counts as private.
    """
    target_host, origin_host = urlsplit(target).hostname or "", urlsplit(origin).hostname or ""
    if target_host == origin_host:
        return False
    addresses = _addresses(target_host)
    if any(address.is_link_local for address in addresses):
        return True
    is_private = any(not address.is_global for address in addresses)
    return is_private and any(address.is_global for address in _addresses(origin_host))


def _addresses(host: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    found = []
    with contextlib.suppress(OSError, UnicodeError):
        for *_, socket_address in socket.getaddrinfo(host, None):
            address = ipaddress.ip_address(str(socket_address[0]).partition("%")[0])
            found.append(getattr(address, "ipv4_mapped", None) or address)
    return found


class _SafeRedirects(request.HTTPRedirectHandler):
    """Follows no redirect for which `redirects_inward` is true."""

    def redirect_request(
        self, req: request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> request.Request | None:
        if redirects_inward(newurl, req.full_url):
            raise URLError(_INWARD)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


class _CappedFile:
    """A new file that raises OverflowError when more than `limit_bytes` are written."""

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self.file = path.open("wb")
        self.left_bytes = limit_bytes

    def write(self, chunk: bytes) -> int:
        self.left_bytes -= len(chunk)
        if self.left_bytes < 0:
            raise OverflowError
        return self.file.write(chunk)


@contextlib.contextmanager
def _errors(url: str, key: str, limit_bytes: int = _LIMIT_BYTES) -> Iterator[None]:
    """Turn urllib's errors into DataError, AccessError or StoreError with one line that names `key` and `url`."""
    try:
        yield
    except OverflowError:
        raise DataError(
            f"{key}: {url} is over {limit_bytes >> 20} MiB; copy it to a bucket or a folder first"
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
            raise DataError(f"{key}: {url} {_INWARD}; if that is intended, give that address as the source") from None
        raise StoreError(f"{key}: {url} cannot be reached: {error.reason}") from None
    except (TimeoutError, ConnectionError, HTTPException) as error:
        raise StoreError(f"{key}: {url} broke off: {type(error).__name__}") from None


def _opener() -> request.OpenerDirector:
    """Return an opener without the handlers for file:// and ftp:// that urllib's default opener has."""
    opener = request.OpenerDirector()
    for handler in (
        request.ProxyHandler,
        request.UnknownHandler,
        request.HTTPHandler,
        request.HTTPSHandler,
        request.HTTPDefaultErrorHandler,
        request.HTTPErrorProcessor,
        _SafeRedirects,
    ):
        opener.add_handler(handler())
    return opener
