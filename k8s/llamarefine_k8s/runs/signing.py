"""A statement in a signed envelope (DSSE, https://github.com/secure-systems-lab/dsse), by an Ed25519 or ECDSA key.

The envelope is a few lines of JSON; what must be right, the signature, is `cryptography`'s. The signature is over the
payload's type and its exact bytes, so nothing has to be written twice in the same form to be checked.
"""

import base64
import binascii
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamarefine_jobs.contract.errors import AccessError, IntegrityError, from_os_error

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey, EllipticCurvePublicKey
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

    PrivateKey = Ed25519PrivateKey | EllipticCurvePrivateKey
    PublicKey = Ed25519PublicKey | EllipticCurvePublicKey

SIGNING_KEY = "LLAMAREFINE_SIGNING_KEY"  # a PEM file's path, or, as a Secret gives it, the PEM itself
PAYLOAD_TYPE = "application/vnd.in-toto+json"
_KINDS = "an Ed25519 or ECDSA key in PEM"
_LIMIT_BYTES = 64 << 10


@dataclass(frozen=True)
class Line:
    """A statement's bytes as they lie in a .intoto.jsonl file, and the signatures over them; none for a bare one."""

    payload: bytes
    signatures: tuple[tuple[str, bytes], ...] = ()  # (key's name, signature)


def find_key() -> "PrivateKey | None":
    """The key that the environment names, None where it names none; AccessError where it is no such key."""
    given = os.environ.get(SIGNING_KEY, "")
    if not given.strip():
        return None
    pem = given.encode() if given.lstrip().startswith("-----BEGIN") else _read(Path(given).expanduser())
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (
        Exception
    ) as error:  # ValueError, TypeError for one with a password, UnsupportedAlgorithm; none names the key
        raise AccessError(f"{SIGNING_KEY}: expected {_KINDS}, without a password ({type(error).__name__})") from None
    if not isinstance(key, ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey):
        raise AccessError(f"{SIGNING_KEY}: expected {_KINDS}, found {type(key).__name__.strip('_')}")
    return key


def read_public_key(path: Path) -> "PublicKey":
    """The public key in a PEM file; AccessError where it holds none of the two kinds."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    try:
        key = serialization.load_pem_public_key(_read(path))
    except Exception as error:
        if isinstance(error, AccessError):
            raise
        raise AccessError(f"{path}: expected the public half of {_KINDS} ({type(error).__name__})") from None
    if not isinstance(key, ed25519.Ed25519PublicKey | ec.EllipticCurvePublicKey):
        raise AccessError(f"{path}: expected the public half of {_KINDS}, found {type(key).__name__.strip('_')}")
    return key


def name_of(key: "PublicKey") -> str:
    """A key's name: the sha256 of its public half in DER."""
    from cryptography.hazmat.primitives import serialization

    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def sign(payload: bytes, key: "PrivateKey") -> bytes:
    """An envelope, one line, with `payload` and the signature of `key`."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    message = _encoded(payload)
    if isinstance(key, ed25519.Ed25519PrivateKey):
        signature = key.sign(message)
    else:
        signature = key.sign(message, ec.ECDSA(hashes.SHA256()))
    envelope = {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [{"keyid": name_of(key.public_key()), "sig": base64.b64encode(signature).decode()}],
    }
    return json.dumps(envelope, sort_keys=True, separators=(",", ":")).encode() + b"\n"


def parse(line: bytes) -> Line:
    """What a line of a .intoto.jsonl file holds: an envelope, or a bare statement; IntegrityError for neither."""
    try:
        found: Any = json.loads(line)
        if isinstance(found, dict) and "payloadType" not in found and "_type" in found:
            return Line(line.rstrip(b"\n"))
        if found["payloadType"] != PAYLOAD_TYPE:
            raise ValueError
        signatures = tuple(
            (str(each["keyid"]), base64.b64decode(each["sig"], validate=True)) for each in found["signatures"]
        )
        return Line(base64.b64decode(found["payload"], validate=True), signatures)
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error):
        raise IntegrityError("is neither a statement nor an envelope around one") from None


def is_signed_by(line: Line, key: "PublicKey") -> bool:
    """Whether one of the signatures is that of `key` over these very bytes. A name proves nothing, so none is asked."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    for _, signature in line.signatures:
        try:
            if isinstance(key, ed25519.Ed25519PublicKey):
                key.verify(signature, _encoded(line.payload))
            else:
                key.verify(signature, _encoded(line.payload), ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            continue
        return True
    return False


def _encoded(payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding: what is signed."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_LIMIT_BYTES)
    except OSError as error:
        raise AccessError(f"the key cannot be read: {from_os_error(error)}") from None
