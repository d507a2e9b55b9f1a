"""The outcome of a check, one line each: what `preflight` and `verify` give."""

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Check:
    """What was looked at, how it is, and what to do about it where it is not right."""

    name: str
    state: Literal["ok", "warning", "FAIL"]
    text: str
    to_do: str | None = None

    def as_json(self) -> dict[str, Any]:
        """As a script reads it."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.text}; {self.to_do}" if self.to_do else self.text


def ok(name: str, text: str) -> Check:
    """A check that holds."""
    return Check(name, "ok", text)


def warning(name: str, text: str, to_do: str | None = None) -> Check:
    """Something that may go wrong, or could not be looked at."""
    return Check(name, "warning", text, to_do)


def fail(name: str, text: str, to_do: str | None = None) -> Check:
    """Something that will go wrong, or is wrong."""
    return Check(name, "FAIL", text, to_do)
