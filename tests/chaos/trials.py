"""One trial: a fault at a random moment of a run, restarts until it is over, a comparison with undisturbed."""

import random
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llamarefine_jobs.contract.stages import SEQUENCE

from . import processes, worlds
from .faults import DAMAGES, Fault, remedy
from .moments import STEP, Mark, Marks, Moment, phase
from .processes import Ended

_MOST_RUNS = 12
_RESUMABLE = ("sft", "dpo", "store")  # the others start again, which takes them seconds


@dataclass
class Trial:
    """What a fault did and how it ended. `finding` is empty where everything was right."""

    number: int
    subject: str
    fault: str
    phase: str = ""
    hit: str | None = None  # the process, or the path in the store; None: the fault met nothing and shows nothing
    ended: list[int | None] = field(default_factory=list)
    recovered_s: float | None = None  # from the fault to the end of the run that succeeded; None: it was not disturbed
    steps_repeated: int | None = None
    finding: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def attempt(
    trial: Trial, undisturbed: Path, folder: Path, draw: random.Random, marks: list[Mark], expected: dict[str, str]
) -> Trial:
    """Carry `trial` out in a copy of the undisturbed world, which is gone afterwards."""
    world = worlds.copy(undisturbed, folder, trial.subject)
    try:
        _carry_out(trial, world, draw, marks, expected)
    except Exception as error:
        trial.finding = f"{type(error).__name__}: {error}"
    finally:
        shutil.rmtree(world, ignore_errors=True)
    return trial


def _carry_out(trial: Trial, world: Path, draw: random.Random, marks: list[Mark], expected: dict[str, str]) -> None:
    fault = Fault(trial.fault, draw, world)

    def strike(pid: int, lines: list[str]) -> None:
        trial.phase = phase(world, trial.subject, pid, lines)
        fault.happen(pid)

    first = processes.run(trial.subject, world, Moment(marks, draw, Marks(world, trial.subject), strike))
    trial.hit, trial.ended = fault.hit, [first.exit_code]
    if not fault.explains(first.exit_code, first.last_line):
        trial.finding = _told(trial.subject, first)
        return
    seconds = first.seconds - (first.fault_s or 0)
    if first.exit_code:
        seconds += _recover(trial, world, fault, first)
    if not trial.finding:
        seconds += _make_damage_good(trial, world, fault)
    if not trial.finding and (found := worlds.digests(world, trial.subject)) != expected:
        trial.finding = f"other bytes than undisturbed: {[name for name in expected if expected[name] != found[name]]}"
    if len(trial.ended) > 1:
        trial.recovered_s = round(seconds, 3)


def _recover(trial: Trial, world: Path, fault: Fault, first: Ended) -> float:
    """Run again until the subject ends well; how long that took."""
    _heal(fault, first.last_line)
    again, seconds = _drive(trial, trial.subject, world, fault)
    reached, resumed = _steps(first.lines), _resumed_at(again.lines) if again else 0
    if reached and again and trial.subject in _RESUMABLE:
        trial.steps_repeated = max(0, max(reached) - resumed)
    return seconds


def _drive(trial: Trial, subject: str, world: Path, fault: Fault) -> tuple[Ended | None, float]:
    """Run `subject`, and whoever it misses before it, as each error says, until it ends well."""
    seconds = 0.0
    for _ in range(_MOST_RUNS):
        ended = processes.run(subject, world)
        trial.ended.append(ended.exit_code)
        seconds += ended.seconds
        if ended.exit_code == 0:
            return ended, seconds
        if fault.kind not in DAMAGES or not fault.explains(ended.exit_code, ended.last_line):
            break
        if missing := re.search(r"run (\w+) first", ended.last_line):
            seconds += _drive(trial, missing[1], world, fault)[1]
        elif not _heal(fault, ended.last_line):
            break
    trial.finding = trial.finding or _told(subject, ended)
    return None, seconds


def _make_damage_good(trial: Trial, world: Path, fault: Fault) -> float:
    """Damage that nobody read so far is found by reading everything; what is removed is made anew."""
    seconds = 0.0
    for _ in range(_MOST_RUNS):
        try:
            wrong = worlds.verify(world, trial.subject)
            if wrong is None:
                return seconds
            if not fault.names_damage(str(wrong)) or not _heal(fault, str(wrong)):
                trial.finding = f"damaged {fault.hit}, found: {wrong}"
                return seconds
        except KeyError:
            pass  # what was removed is missing
        for stage in SEQUENCE[: SEQUENCE.index(trial.subject) + 1] if trial.subject != "store" else ("store",):
            seconds += _drive(trial, stage, world, fault)[1]
    trial.finding = trial.finding or "the damage comes back"
    return seconds


def _heal(fault: Fault, said: str) -> bool:
    """Do what the error says: remove the folder it names."""
    folder = remedy(said)
    if folder is None or not folder.is_relative_to(fault.world / "store"):
        return False
    shutil.rmtree(folder)
    fault.is_removed = True
    return True


def _steps(lines: list[str]) -> list[int]:
    return [int(found[1]) for line in lines if (found := STEP.match(line))]


def _resumed_at(lines: list[str]) -> int:
    found = [int(line.rsplit(" ", 1)[1]) for line in lines if "goes on from the checkpoint at step" in line]
    return found[0] if found else 0


def _told(subject: str, ended: Ended) -> str:
    return f"{subject} ended with {ended.exit_code}: " + " | ".join(ended.lines[-12:])
