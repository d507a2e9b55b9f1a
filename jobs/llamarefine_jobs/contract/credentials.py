"""Refuse credentials in addresses, and find them as plain text in pod settings.

A recipe is copied into run.json, into a ConfigMap and into manifests, and an address into messages. Credentials would
have to be hidden in all of these places, so they are refused before they reach one.
"""

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl, urlsplit

_SECRET = re.compile(
    r"signature|credential|token(?!i[sz])|secret|passw|(api|access|private)[-_]?key|^(sig|key|auth|pat)$", re.IGNORECASE
)


def refuse_credentials(address: str) -> str:
    """Return `address`. Raises ValueError if it contains a user, password or signature; the error does not quote it."""
    if "://" not in address:
        return address
    parts = urlsplit(address)
    if "@" in parts.netloc:
        raise ValueError(
            "expected an address without credentials, found some before the @: they would be copied into logs and the "
            "bucket; set them in the environment, or copy the data to a bucket"
        )
    for name, _ in parse_qsl(parts.query, keep_blank_values=True):
        if _SECRET.search(name):
            raise ValueError(
                f"expected an address without credentials, found the parameter {name}: it would be copied into logs "
                "and the bucket; copy the data to a bucket or a folder first"
            )
    return address


def plain_secrets(values: Any) -> Iterator[str]:
    """Yield the environment variables in a part of a pod that have a secret's name and a plain-text value."""
    if isinstance(values, dict):
        name = values.get("name")
        if isinstance(name, str) and values.get("value") and _SECRET.search(name):
            yield name
        for value in values.values():
            yield from plain_secrets(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from plain_secrets(value)
