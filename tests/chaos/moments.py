"""When a fault happens: at a mark, a line that the run says or a file that it brings into the store.

A time would not do: it is another place of the run at another load, and often none, for the run is over.
"""

import os
import random
import re
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

STEP = re.compile(r"^progress .*\bstep=(\d+)")


@dataclass(frozen=True)
class Mark:
    """A place of an undisturbed run: after so many lines and files, in this phase, until the next so long after."""

    count: int
    phase: str
    lasts_s: float


class Marks:
    """What a run has said and stored, counted. Made before it begins."""

    def __init__(self, world: Path, subject: str) -> None:
        own = "sft" if subject == "store" else subject
        self._tops = [world / "store" / top / own for top in ("artifacts", "checkpoints")]
        self._before = self._files()
        self._seen: set[str] = set()

    def count(self, lines: list[str]) -> int:
        """How many so far; a file counts though it was removed since."""
        self._seen |= self._files() - self._before
        return len(lines) + len(self._seen)

    def _files(self) -> set[str]:
        walks = (os.walk(top) for top in self._tops)
        found = (os.path.join(folder, name) for walk in walks for folder, _, names in walk for name in names)
        return {file for file in found if "/.writing-" not in file}


class Recorder:
    """Takes down the marks of an undisturbed run; to be asked all the time, as a `processes.Watch`."""

    def __init__(self, world: Path, subject: str) -> None:
        self._world, self._subject, self._counted = world, subject, Marks(world, subject)
        self._found: list[tuple[int, str, float]] = []

    def __call__(self, pid: int, lines: list[str]) -> bool:
        count = self._counted.count(lines)
        if not self._found or count != self._found[-1][0]:
            self._found.append((count, phase(self._world, self._subject, pid, lines), time.monotonic()))
        return False

    @property
    def marks(self) -> list[Mark]:
        """All but the last, which says that it is over."""
        pairs = zip(self._found, self._found[1:], strict=False)
        return [Mark(count, name, after_s - at_s) for (count, name, at_s), (_, _, after_s) in pairs]


class Moment:
    """Lets `fault` happen once, at a moment drawn evenly over the phases, then over the marks of one, then within it.

    A run that is faster than the undisturbed one gets it no later than at its next mark.
    """

    def __init__(
        self,
        marks: list[Mark],
        draw: random.Random,
        counted: Marks,
        fault: Callable[[int, list[str]], None],
    ) -> None:
        by_phase = defaultdict(list)
        for mark in marks:
            by_phase[mark.phase].append(mark)
        self._mark = draw.choice(by_phase[draw.choice(sorted(by_phase))])
        self._pause_s = draw.random() * self._mark.lasts_s
        self._counted, self._fault = counted, fault
        self._reached_s: float | None = None

    def __call__(self, pid: int, lines: list[str]) -> bool:
        count, now_s = self._counted.count(lines), time.monotonic()
        if count >= self._mark.count and self._reached_s is None:
            self._reached_s = now_s
        waits = self._reached_s is None or (count == self._mark.count and now_s - self._reached_s < self._pause_s)
        if pid and waits:
            return False
        self._fault(pid, lines)
        return True


def phase(world: Path, subject: str, pid: int, lines: list[str]) -> str:
    """Where a run stands, by what it said and by what lies half-finished in the store; `pid` 0: it is over."""
    own = "sft" if subject == "store" else subject
    if not pid:
        return "over"
    if _is_half_written(world / "store/checkpoints" / own):
        return "checkpoint"
    if _is_half_written(world / "store/artifacts" / own):
        return "publish"
    if not any(" makes " in line or " from the checkpoint" in line for line in lines):
        return "start, download"
    if any("kept the adapter" in line for line in lines):
        return "closing"
    return "steps" if any(map(STEP.match, lines)) else "set-up"


def _is_half_written(below: Path) -> bool:
    """Whether some folder of files has no manifest beside it yet."""
    return any(
        child.is_dir() and not (child.parent / "manifest.json").exists()
        for depth in ("*/*/*", "*/*")
        for child in below.glob(depth)
        if re.fullmatch(r"[0-9a-f]{16}", child.name)
    )
