"""The outcome of one check, as `preflight` and `verify` print it."""

from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Check:
    """What was checked, the outcome, and what to do if it is not ok."""

    name: str
    state: Literal["ok", "warning", "FAIL"]
    text: str
    to_do: str | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the fields as a JSON object."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.text}; {self.to_do}" if self.to_do else self.text


def ok(name: str, text: str) -> Check:
    """Return a check that passed."""
    return Check(name, "ok", text)


def warning(name: str, text: str, to_do: str | None = None) -> Check:
    """Return a check that found a possible problem, or could not be made."""
    return Check(name, "warning", text, to_do)


def fail(name: str, text: str, to_do: str | None = None) -> Check:
    """Return a check that failed: something is wrong, or will certainly go wrong."""
    return Check(name, "FAIL", text, to_do)
