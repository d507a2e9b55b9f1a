"""Remove credentials from every log record of this process, whichever library writes it, at every level.

With debug logging on, libraries log whole requests: boto3 a session's token and the text that it signs, urllib3 signed
addresses, Python's own HTTP client every header. So each log record is searched before it is formatted, for the secrets
in the environment and for text that has the form of a credential.
"""

import base64
import functools
import http.client
import logging
import os
import re
import traceback
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

HIDDEN = "[hidden]"
_SHORTEST_SECRET = 6  # characters; a shorter value may be a word that occurs in any text
_HOLDS_SECRET = re.compile(r"(secret|token|passw|credential|_key$|_key_id$)", re.IGNORECASE)
# A header, argument, parameter or XML element with such a name, and its value up to its end.
_NAMED = re.compile(
    r"(?P<name>\b(?:proxy-)?authorization|\b(?:set-)?cookie|x-amz-(?:security-token|signature|credential)"
    r"|(?:secret|session|security|access|refresh|identity|id|api)[_-]?(?:access[_-]?)?(?:key(?:[_-]?id)?|token)"
    r"|\bclient[_-]key[_-]data|(?<=['\"])token(?=['\"])|password|\bsig(?:nature)?)"
    r"(?P<between>\\?['\"]?\s*(?:[:=,>]|%3D)\s*(?:b?\\?['\"])?)"
    r"(?P<value>[^\s'\"<>&\\][^'\"<>&\\\n\r]*)",
    re.IGNORECASE,
)
_FORMS = (
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
    re.compile(r"(?<=bearer )[\w.~+/=-]+", re.IGNORECASE),
    re.compile(r"\beyJ[\w-]{8,}\.[\w-]+\.[\w-]*"),  # a JSON web token, such as a service account's
    re.compile(r"\bhf_[A-Za-z0-9]{16,}"),
)

_read_secrets: tuple[str, ...] = ()


def redact(text: str) -> str:
    """Return `text` with each credential replaced by `[hidden]`."""
    for secret in (*_environment_secrets(), *_read_secrets):
        text = text.replace(secret, HIDDEN)
    text = _NAMED.sub(rf"\g<name>\g<between>{HIDDEN}", text)
    for form in _FORMS:
        text = form.sub(HIDDEN, text)
    return text


def redact_secret(secret: str) -> None:
    """Redact this value too, in every spelling that a log may use: a secret that this process read from a file."""
    global _read_secrets
    spellings = {each for each in _spellings(secret) if len(each) >= _SHORTEST_SECRET}
    _read_secrets = tuple(sorted({*_read_secrets, *spellings}, key=len, reverse=True))


@functools.cache
def redact_logs() -> None:
    """Redact every later log record of this process. Every client calls this before it uses a credential."""
    previous_factory = logging.getLogRecordFactory()

    def make_redacted(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = previous_factory(*args, **kwargs)
        try:
            message = record.getMessage()
        except (TypeError, ValueError):  # the arguments do not fit the format: logging itself reports this
            return record
        if (redacted := redact(message)) != message:
            record.msg, record.args = redacted, ()
        if record.exc_info and record.exc_info[0]:
            record.exc_text = redact("".join(traceback.format_exception(*record.exc_info)).rstrip())
        return record

    logging.setLogRecordFactory(make_redacted)
    # At its debug level, Python's own HTTP client prints what it sends instead of logging it.
    http.client.print = lambda *parts: print(redact(" ".join(map(str, parts))))  # type: ignore[attr-defined]


@functools.cache
def _environment_secrets() -> tuple[str, ...]:
    """Return the secrets in the environment, in every spelling that a log may use, the longest first.

    The environment is read once: a secret that is set later is recognized only by its form.
    """
    found: set[str] = set()
    for name, value in os.environ.items():
        if _HOLDS_SECRET.search(name):
            for part in value.split():  # a PEM key is logged line by line
                found.update(_spellings(part))
    return tuple(sorted((each for each in found if len(each) >= _SHORTEST_SECRET), key=len, reverse=True))


def _spellings(secret: str) -> Iterator[str]:
    yield from (secret, quote(secret), quote(secret, safe=""))
    yield base64.b64encode(secret.encode(errors="replace")).decode().rstrip("=")
