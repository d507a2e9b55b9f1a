"""No log holds a credential, whichever library writes it, at whatever level it was asked to.

Libraries write whole requests where someone turns their debugging on: boto3 a session's token and what it signs,
urllib3 signed addresses, Python's own HTTP client every header. So what is logged in this process is looked through
before anybody formats it, for secrets that the environment holds and for the forms that others come in.
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
_LEAST = 6  # characters of a secret: a shorter one is a word that is in every text
_HOLDS_SECRET = re.compile(r"(secret|token|passw|credential|_key$|_key_id$)", re.IGNORECASE)
# A header, an argument, a parameter or an element of such a name, and its value up to where one of its kind ends.
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
    re.compile(r"\beyJ[\w-]{8,}\.[\w-]+\.[\w-]*"),  # a JSON web token: a service account's is one
    re.compile(r"\bhf_[A-Za-z0-9]{16,}"),
)


def redact(text: str) -> str:
    """`text` without the credentials in it."""
    for secret in _of_the_environment():
        text = text.replace(secret, HIDDEN)
    text = _NAMED.sub(rf"\g<name>\g<between>{HIDDEN}", text)
    for form in _FORMS:
        text = form.sub(HIDDEN, text)
    return text


@functools.cache
def redact_logs() -> None:
    """From now on no log of this process holds a credential. Called by whatever is about to use one."""
    before = logging.getLogRecordFactory()

    def make(*about: Any, **more: Any) -> logging.LogRecord:
        record = before(*about, **more)
        try:
            said = record.getMessage()
        except (TypeError, ValueError):  # arguments that do not fit: logging itself reports it
            return record
        if (hidden := redact(said)) != said:
            record.msg, record.args = hidden, ()
        if record.exc_info and record.exc_info[0]:
            record.exc_text = redact("".join(traceback.format_exception(*record.exc_info)).rstrip())
        return record

    logging.setLogRecordFactory(make)
    # With its debugging on, Python's own client prints what it sends, and asks no logger.
    http.client.print = lambda *parts: print(redact(" ".join(map(str, parts))))  # type: ignore[attr-defined]


@functools.cache
def _of_the_environment() -> tuple[str, ...]:
    """The secrets that this process was given, as they may be written, the longest first."""
    found: set[str] = set()
    for name, value in os.environ.items():
        if _HOLDS_SECRET.search(name):
            for part in value.split():  # a key in PEM is one line after the other
                found.update(_spellings(part))
    return tuple(sorted((each for each in found if len(each) >= _LEAST), key=len, reverse=True))


def _spellings(secret: str) -> Iterator[str]:
    yield from (secret, quote(secret), quote(secret, safe=""))
    yield base64.b64encode(secret.encode(errors="replace")).decode().rstrip("=")
