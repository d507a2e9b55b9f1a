"""Text that others wrote, on a person's screen: shown, never obeyed."""

import re
from typing import TextIO

# Whole colour and cursor sequences, then every other control character but tab and line feed. Those from 0x80 on are
# what an escape and a letter mean in one character; the last ones turn the direction in which what follows is read.
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def strip_control_characters(text: str) -> str:
    """`text` without control characters, which data, an answer or a log may hold and a screen would obey."""
    return _CONTROL.sub("", text)


def strip_for_stream(text: str, stream: TextIO) -> str:
    """`text` as `stream` may have it: strip_control_characters on a terminal, as it is in a file or a pipe."""
    return strip_control_characters(text) if stream.isatty() else text
