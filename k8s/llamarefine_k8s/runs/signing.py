"""Sign a statement with an Ed25519 or ECDSA key, and check the signature of one.

Signed statements are DSSE envelopes (https://github.com/secure-systems-lab/dsse): a small JSON object, built here; the
library `cryptography` signs and verifies. The signature covers the payload's type and its exact bytes, so a statement
need not be serialized again, byte for byte the same, to be checked.
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

SIGNING_KEY = "LLAMAREFINE_SIGNING_KEY"  # the path of a PEM file, or the PEM itself, as from a Secret
PAYLOAD_TYPE = "application/vnd.in-toto+json"
_KINDS = "an Ed25519 or ECDSA key in PEM"
_LIMIT_BYTES = 64 << 10


@dataclass(frozen=True)
class Envelope:
    """One line of an .intoto.jsonl file: a statement's bytes and its signatures, none if it was not signed."""

    payload: bytes
    signatures: tuple[tuple[str, bytes], ...] = ()  # (name of the key, as the envelope claims; signature)


def find_key() -> "PrivateKey | None":
    """Return the private key that LLAMAREFINE_SIGNING_KEY gives; None if unset, AccessError if unusable."""
    given = os.environ.get(SIGNING_KEY, "")
    if not given.strip():
        return None
    pem = given.encode() if given.lstrip().startswith("-----BEGIN") else _read(Path(given).expanduser())
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except Exception as error:  # ValueError, UnsupportedAlgorithm, TypeError for a password; none quotes the key
        raise AccessError(f"{SIGNING_KEY}: expected {_KINDS}, without a password ({type(error).__name__})") from None
    if not isinstance(key, ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey):
        raise AccessError(f"{SIGNING_KEY}: expected {_KINDS}, found {type(key).__name__.strip('_')}")
    return key


def read_public_key(path: Path) -> "PublicKey":
    """Return the public key in a PEM file; AccessError if it holds no Ed25519 or ECDSA public key."""
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
    """Return a key's name: the sha256 of the public key in DER."""
    from cryptography.hazmat.primitives import serialization

    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def sign(payload: bytes, key: "PrivateKey") -> bytes:
    """Return an envelope, as one line, with `payload` and its signature by `key`."""
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


def parse(line: bytes) -> Envelope:
    """Parse one line of an .intoto.jsonl file: an envelope, or a statement without one; else IntegrityError."""
    try:
        found: Any = json.loads(line)
        if isinstance(found, dict) and "payloadType" not in found and "_type" in found:
            return Envelope(line.rstrip(b"\n"))
        if found["payloadType"] != PAYLOAD_TYPE:
            raise ValueError
        signatures = tuple(
            (str(each["keyid"]), base64.b64decode(each["sig"], validate=True)) for each in found["signatures"]
        )
        return Envelope(base64.b64decode(found["payload"], validate=True), signatures)
    except (ValueError, KeyError, TypeError, RecursionError, binascii.Error):
        raise IntegrityError("is neither a statement nor an envelope around one") from None


def is_signed_by(envelope: Envelope, key: "PublicKey") -> bool:
    """Whether one of the signatures is by `key` over exactly these bytes. The claimed names of keys are ignored."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    for _, signature in envelope.signatures:
        try:
            if isinstance(key, ed25519.Ed25519PublicKey):
                key.verify(signature, _encoded(envelope.payload))
            else:
                key.verify(signature, _encoded(envelope.payload), ec.ECDSA(hashes.SHA256()))
        except InvalidSignature:
            continue
        return True
    return False


def _encoded(payload: bytes) -> bytes:
    """Return DSSE's pre-authentication encoding of a payload: the bytes that are signed."""
    kind = PAYLOAD_TYPE.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_LIMIT_BYTES)
    except OSError as error:
        raise AccessError(f"the key cannot be read: {from_os_error(error)}") from None
