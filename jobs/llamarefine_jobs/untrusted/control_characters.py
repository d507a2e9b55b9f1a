"""Remove terminal control characters from text that others wrote."""

import re
from typing import TextIO

# Whole colour and cursor sequences; then every control character except tab and line feed, including 0x80 to 0x9f,
# which stand for an escape sequence in one character; then the characters that change the direction of writing.
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def strip_control_characters(text: str) -> str:
    """Return `text` without control characters, which a terminal would execute."""
    return _CONTROL.sub("", text)


def strip_for_stream(text: str, stream: TextIO) -> str:
    """Return `text` without control characters if `stream` is a terminal; unchanged for a file or a pipe."""
    return strip_control_characters(text) if stream.isatty() else text
