"""Where a server may send us on to: the web, and not this machine or the network around it."""

import contextlib
import ipaddress
import socket
from urllib.parse import urlsplit


def redirects_inward(target: str, origin: str) -> bool:
    """Whether `target`, to which a server at `origin` sent us, lies further inside than the server does.

    Where clouds hand out credentials (link-local addresses) nobody is ever sent. This machine and private networks are
    reached only from their like: a file server of one's own may move files around in there. A name that only a proxy
    can resolve is the proxy's to judge.
    """
    host, before = urlsplit(target).hostname or "", urlsplit(origin).hostname or ""
    if host == before:
        return False
    there = _addresses(host)
    if any(address.is_link_local for address in there):
        return True
    return any(not address.is_global for address in there) and any(address.is_global for address in _addresses(before))


def _addresses(host: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    found = []
    with contextlib.suppress(OSError, UnicodeError):
        for *_, place in socket.getaddrinfo(host, None):
            address = ipaddress.ip_address(str(place[0]).partition("%")[0])
            found.append(getattr(address, "ipv4_mapped", None) or address)
    return found
