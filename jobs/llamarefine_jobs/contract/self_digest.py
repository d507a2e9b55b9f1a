"""JSON documents that contain their own digest as the last key, so that a reader detects any changed byte.

The digest covers the bytes as stored, so documents that another version of this package or of pydantic wrote can
be verified as well.
"""

import hashlib
import re

_LAST_KEY = r',\n  "%s": "([0-9a-f]{64})"\n}\n\Z'


def add_self_digest(body: str, name: str) -> bytes:
    """Return `body`, a JSON object indented by 2, with its digest added as the last key, `name`."""
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f'{body[:-2]},\n  "{name}": "{digest}"\n}}\n'.encode()


def read_self_digest(data: bytes, name: str) -> bytes | None:
    """Return the body without its digest; None if its last key is not `name`. Raises ValueError if a byte changed."""
    found = re.search((_LAST_KEY % name).encode(), data)
    if not found:
        return None
    body = data[: found.start()] + b"\n}"
    if hashlib.sha256(body).hexdigest() != found[1].decode():
        raise ValueError("was changed after it was written")
    return body
