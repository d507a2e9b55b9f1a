"""The progress line in a stage's log: read by people, parsed by the stage's executor.

progress stage=sft step=40 steps=100 loss=4.2137 tokens_per_s=5120 eta_s=12
"""

import math
import re
from dataclasses import dataclass, fields
from typing import get_args, get_type_hints

_LINE = re.compile(r"(?:^|\s)progress((?: [a-z_]+=[^\s=]+)+)\s*$")


@dataclass(frozen=True)
class Progress:
    """Progress of a stage. Unknown values are None and are left out of the line."""

    stage: str
    step: int
    steps: int
    phase: str | None = None
    loss: float | None = None
    tokens_per_s: float | None = None
    eta_s: float | None = None

    def line(self) -> str:
        """Return the progress as one log line."""
        pairs = ((field.name, getattr(self, field.name)) for field in fields(self))
        return "progress " + " ".join(f"{name}={_text(value)}" for name, value in pairs if value is not None)


def parse(line: str) -> Progress | None:
    """Return the progress that a log line reports, or None if it is not a progress line."""
    found = _LINE.search(line)
    if not found:
        return None
    pairs = dict(pair.split("=", 1) for pair in found[1].split())
    hints = get_type_hints(Progress)
    try:
        values = {name: _cast(hints[name], text) for name, text in pairs.items() if name in hints}
        return Progress(**values)  # type: ignore[arg-type]
    except (ValueError, TypeError):
        return None


def _text(value: str | int | float) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if math.isfinite(value) and abs(value) >= 1000 else f"{value:.6g}"


def _cast(hint: type, text: str) -> str | int | float:
    kind = next((arg for arg in get_args(hint) if arg is not type(None)), hint)
    value: str | int | float = kind(text)
    return value
