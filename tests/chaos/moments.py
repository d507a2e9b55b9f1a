"""The moment of a fault: at a mark of the run, which is a line that it prints or a file that it adds to the store.

A time since the start would not do: at another load it is another place of the run, and often after its end.
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
    """A place of an undisturbed run: after `count` lines and files, in `phase`, `lasts_s` before the next mark."""

    count: int
    phase: str
    lasts_s: float


class MarkCounter:
    """Counts the lines that a run has printed and the files that it has stored. Created before the run starts."""

    def __init__(self, workspace: Path, subject: str) -> None:
        own = "sft" if subject == "store" else subject
        self._folders = [workspace / "store" / top / own for top in ("artifacts", "checkpoints")]
        self._before = self._files()
        self._seen: set[str] = set()

    def count(self, lines: list[str]) -> int:
        """Return the number of marks passed so far; a file that was removed since still counts."""
        self._seen |= self._files() - self._before
        return len(lines) + len(self._seen)

    def _files(self) -> set[str]:
        walks = (os.walk(top) for top in self._folders)
        found = (os.path.join(folder, name) for walk in walks for folder, _, names in walk for name in names)
        return {file for file in found if "/.writing-" not in file}


class MarkRecorder:
    """A `processes.Observer` that records the marks of an undisturbed run."""

    def __init__(self, workspace: Path, subject: str) -> None:
        self._workspace, self._subject, self._counter = workspace, subject, MarkCounter(workspace, subject)
        self._found: list[tuple[int, str, float]] = []

    def __call__(self, pid: int, lines: list[str]) -> bool:
        count = self._counter.count(lines)
        if not self._found or count != self._found[-1][0]:
            self._found.append((count, phase_of(self._workspace, self._subject, pid, lines), time.monotonic()))
        return False

    @property
    def marks(self) -> list[Mark]:
        """All marks but the last, which is the end of the run."""
        pairs = zip(self._found, self._found[1:], strict=False)
        return [Mark(count, name, after_s - at_s) for (count, name, at_s), (_, _, after_s) in pairs]


class FaultTrigger:
    """A `processes.Observer` that calls `apply` once, at a random moment.

    The moment is drawn evenly over the phases, then over the marks of that phase, then over the time to the next mark.
    In a run that is faster than the undisturbed one, the fault happens at the next mark at the latest.
    """

    def __init__(
        self,
        marks: list[Mark],
        draw: random.Random,
        counter: MarkCounter,
        apply: Callable[[int, list[str]], None],
    ) -> None:
        by_phase = defaultdict(list)
        for mark in marks:
            by_phase[mark.phase].append(mark)
        self._mark = draw.choice(by_phase[draw.choice(sorted(by_phase))])
        self._pause_s = draw.random() * self._mark.lasts_s
        self._counter, self._apply = counter, apply
        self._reached_s: float | None = None

    def __call__(self, pid: int, lines: list[str]) -> bool:
        count, now_s = self._counter.count(lines), time.monotonic()
        if count >= self._mark.count and self._reached_s is None:
            self._reached_s = now_s
        is_early = self._reached_s is None or (count == self._mark.count and now_s - self._reached_s < self._pause_s)
        if pid and is_early:
            return False
        self._apply(pid, lines)
        return True


def phase_of(workspace: Path, subject: str, pid: int, lines: list[str]) -> str:
    """Return the phase of a run, judged by its lines and by unfinished folders in the store; pid 0: it has ended."""
    own = "sft" if subject == "store" else subject
    if not pid:
        return "over"
    if _is_half_written(workspace / "store/checkpoints" / own):
        return "checkpoint"
    if _is_half_written(workspace / "store/artifacts" / own):
        return "publish"
    if not any(" makes " in line or " from the checkpoint" in line for line in lines):
        return "start, download"
    if any("kept the adapter" in line for line in lines):
        return "closing"
    return "steps" if any(map(STEP.match, lines)) else "set-up"


def _is_half_written(below: Path) -> bool:
    """Whether a folder of files has no manifest beside it yet."""
    return any(
        child.is_dir() and not (child.parent / "manifest.json").exists()
        for depth in ("*/*/*", "*/*")
        for child in below.glob(depth)
        if re.fullmatch(r"[0-9a-f]{16}", child.name)
    )
