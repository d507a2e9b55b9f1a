"""One trial: a fault at a random moment of a run, restarts until it succeeds, a comparison with the undisturbed run."""

import random
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llamarefine_jobs.contract.stages import SEQUENCE

from . import processes, workspaces
from .faults import DAMAGES, Fault, folder_to_remove
from .moments import STEP, FaultTrigger, Mark, MarkCounter, phase_of
from .processes import RunResult

_MAX_RUNS = 12
_RESUMABLE = ("sft", "dpo", "store")  # the other subjects have no checkpoints and start again


@dataclass
class Trial:
    """The fault of a trial and how its runs ended. `finding` says what is wrong; it is empty if everything is right."""

    number: int
    subject: str
    fault: str
    phase: str = ""
    hit: str | None = None  # the process, or the path in the store; None: the fault hit nothing
    ended: list[int | None] = field(default_factory=list)  # exit codes of all runs
    recovered_s: float | None = None  # from the fault to the end of the run that succeeded; None: no run failed
    steps_repeated: int | None = None
    finding: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the trial as values that json can write."""
        return asdict(self)


def run_trial(
    trial: Trial, undisturbed: Path, folder: Path, draw: random.Random, marks: list[Mark], expected: dict[str, str]
) -> Trial:
    """Run `trial` in a copy of the undisturbed workspace, remove the copy, and fill in the trial's results."""
    workspace = workspaces.copy(undisturbed, folder, trial.subject)
    try:
        _disturb_and_recover(trial, workspace, draw, marks, expected)
    except Exception as error:
        trial.finding = f"{type(error).__name__}: {error}"
    finally:
        shutil.rmtree(workspace, ignore_errors=True)
    return trial


def _disturb_and_recover(
    trial: Trial, workspace: Path, draw: random.Random, marks: list[Mark], expected: dict[str, str]
) -> None:
    fault = Fault(trial.fault, draw, workspace)

    def apply_fault(pid: int, lines: list[str]) -> None:
        trial.phase = phase_of(workspace, trial.subject, pid, lines)
        fault.apply(pid)

    trigger = FaultTrigger(marks, draw, MarkCounter(workspace, trial.subject), apply_fault)
    first = processes.run(trial.subject, workspace, trigger)
    trial.hit, trial.ended = fault.hit, [first.exit_code]
    if not fault.explains(first.exit_code, first.last_line):
        trial.finding = _failure(trial.subject, first)
        return
    seconds = first.seconds - (first.fault_s or 0)
    if first.exit_code:
        seconds += _recover(trial, workspace, fault, first)
    if not trial.finding:
        seconds += _repair_damage(trial, workspace, fault)
    if not trial.finding and (found := workspaces.digests(workspace, trial.subject)) != expected:
        trial.finding = f"other bytes than undisturbed: {[name for name in expected if expected[name] != found[name]]}"
    if len(trial.ended) > 1:
        trial.recovered_s = round(seconds, 3)


def _recover(trial: Trial, workspace: Path, fault: Fault, first: RunResult) -> float:
    """Run the subject again until it succeeds; return how many seconds that took."""
    _remove_named_folder(fault, first.last_line)
    last, seconds = _run_until_success(trial, trial.subject, workspace, fault)
    reached, resumed = _steps(first.lines), _resumed_at(last.lines) if last else 0
    if reached and last and trial.subject in _RESUMABLE:
        trial.steps_repeated = max(0, max(reached) - resumed)
    return seconds


def _run_until_success(trial: Trial, subject: str, workspace: Path, fault: Fault) -> tuple[RunResult | None, float]:
    """Run `subject`, following the advice of each error, until it succeeds; return its result and the seconds taken.

    Where an error names a parent stage that is missing, that stage is run first. If the subject does not succeed, the
    result is None and the trial has a finding.
    """
    seconds = 0.0
    for _ in range(_MAX_RUNS):
        ended = processes.run(subject, workspace)
        trial.ended.append(ended.exit_code)
        seconds += ended.seconds
        if ended.exit_code == 0:
            return ended, seconds
        if fault.kind not in DAMAGES or not fault.explains(ended.exit_code, ended.last_line):
            break
        if missing := re.search(r"run (\w+) first", ended.last_line):
            seconds += _run_until_success(trial, missing[1], workspace, fault)[1]
        elif not _remove_named_folder(fault, ended.last_line):
            break
    trial.finding = trial.finding or _failure(subject, ended)
    return None, seconds


def _repair_damage(trial: Trial, workspace: Path, fault: Fault) -> float:
    """Find damage that no run has read by verifying every file, and make what is damaged again; return the seconds."""
    seconds = 0.0
    for _ in range(_MAX_RUNS):
        try:
            wrong = workspaces.verify(workspace, trial.subject)
            if wrong is None:
                return seconds
            if not fault.is_named_in(str(wrong)) or not _remove_named_folder(fault, str(wrong)):
                trial.finding = f"damaged {fault.hit}, found: {wrong}"
                return seconds
        except KeyError:
            pass  # an artifact is missing because it was removed
        for stage in SEQUENCE[: SEQUENCE.index(trial.subject) + 1] if trial.subject != "store" else ("store",):
            seconds += _run_until_success(trial, stage, workspace, fault)[1]
    trial.finding = trial.finding or f"still damaged after {_MAX_RUNS} repairs"
    return seconds


def _remove_named_folder(fault: Fault, error: str) -> bool:
    """Remove the folder that an error says to remove, if it is in the store; return whether it was removed."""
    folder = folder_to_remove(error)
    if folder is None or not folder.is_relative_to(fault.workspace / "store"):
        return False
    shutil.rmtree(folder)
    fault.is_removed = True
    return True


def _steps(lines: list[str]) -> list[int]:
    return [int(found[1]) for line in lines if (found := STEP.match(line))]


def _resumed_at(lines: list[str]) -> int:
    """Return the step of the checkpoint that a run resumed from, or 0."""
    found = [int(line.rsplit(" ", 1)[1]) for line in lines if "resumes from the checkpoint at step" in line]
    return found[0] if found else 0


def _failure(subject: str, ended: RunResult) -> str:
    return f"{subject} ended with {ended.exit_code}: " + " | ".join(ended.lines[-12:])
