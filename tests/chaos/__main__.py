"""The local chaos suite: `make chaos SEED=1 KILLS=200`.

Each trial starts a stage, or a writer of the store, in a copy of an undisturbed workspace, and applies one fault at
a moment drawn evenly over the phases of an undisturbed run. Trials go on until KILLS faults have hit a live process
or stored bytes. The subject is restarted, as a person or a Job would do, until it succeeds. A trial is right if the
result has the same sha256 as undisturbed, each error on the way is one that the fault explains, and each error about
damage names the damaged file. Anything else is a finding and fails the suite.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llamarefine_jobs.contract.stages import SEQUENCE

from . import processes, workspaces
from .faults import FAULTS
from .moments import Mark, MarkRecorder
from .trials import Trial, run_trial

SUBJECTS = (*SEQUENCE, "store")


def main() -> int:
    """Run the suite; return 1 if a trial has a finding or too few faults hit."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--kills",
        type=int,
        default=200,
        help="number of faults that must hit; a fault that hits nothing does not count",
    )
    parser.add_argument("--parallel", type=int, default=2, help="number of trials at the same time")
    parser.add_argument("--minutes", type=float, default=120, help="start no trial after this time")
    parser.add_argument("--json", type=Path, help="write the results of every trial to this file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llamarefine-chaos-") as folder:
        report = run_trials(
            Path(folder), options.seed, options.kills, parallel=options.parallel, until_s=options.minutes * 60
        )
    print(table(report["trials"]))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    findings = [trial for trial in report["trials"] if trial["finding"]]
    for trial in findings:
        print(f"WRONG: trial {trial['number']}, {trial['fault']} in {trial['subject']}: {trial['finding']}")
    done, hit = len(report["trials"]), sum(bool(trial["hit"]) for trial in report["trials"])
    print(
        f"{hit} of {options.kills} faults hit a live process or stored bytes, in {done} trials and "
        f"{report['seconds']:.0f} s, seed {options.seed}: {len(findings)} wrong"
    )
    return 1 if findings or hit < options.kills else 0


def run_trials(folder: Path, seed: int, kills: int, *, parallel: int = 1, until_s: float = 7200) -> dict[str, Any]:
    """Run trials in subfolders of `folder` until `kills` faults have hit, and return the report that --json writes.

    Every fault is applied to every subject in turn, in random order. At most 2 x `kills` trials are started, and none
    after `until_s`.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    began_s = time.monotonic()
    undisturbed, marks = prepare(folder)
    expected = {subject: workspaces.digests(undisturbed, subject) for subject in SUBJECTS}
    pairs = [(subject, fault) for fault in FAULTS for subject in SUBJECTS]
    random.Random(seed).shuffle(pairs)

    def run_one(number: int) -> Trial | None:
        if time.monotonic() - began_s > until_s:
            return None
        subject, fault = pairs[number % len(pairs)]
        draw = random.Random(f"{seed} {number}")
        trial = Trial(number, subject, fault)
        run_trial(trial, undisturbed, folder / f"trial-{number}", draw, marks[subject], expected[subject])
        where = f"{trial.subject}, {trial.fault}, {trial.phase}"
        print(f"trial {number}: {where}: {trial.finding or 'right'} {trial.ended}", flush=True)
        return trial

    with ThreadPoolExecutor(parallel) as pool:
        trials: list[Trial] = []
        while (missing := kills - sum(bool(trial.hit) for trial in trials)) and len(trials) < 2 * kills:
            more = [trial for trial in pool.map(run_one, range(len(trials), len(trials) + missing)) if trial]
            trials += more
            if len(more) < missing:  # the time is over
                break
    return {
        "seed": seed,
        "seconds": time.monotonic() - began_s,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "load": os.getloadavg(),
        "undisturbed_s": {subject: round(sum(mark.lasts_s for mark in each), 3) for subject, each in marks.items()},
        "trials": [trial.as_json() for trial in trials],
    }


def prepare(folder: Path) -> tuple[Path, dict[str, list[Mark]]]:
    """Run every subject undisturbed; return the workspace and the marks of each subject."""
    undisturbed = workspaces.create(folder / "undisturbed")
    return undisturbed, {subject: _run_undisturbed(subject, undisturbed) for subject in SUBJECTS}


def _run_undisturbed(subject: str, workspace: Path) -> list[Mark]:
    recorder = MarkRecorder(workspace, subject)
    ended = processes.run(subject, workspace, recorder)
    if ended.exit_code:
        raise SystemExit(f"{subject} failed without a fault, exit code {ended.exit_code}: " + "\n".join(ended.lines))
    print(f"undisturbed: {subject} takes {ended.seconds:.1f} s and passes {len(recorder.marks)} marks", flush=True)
    return recorder.marks


def table(trials: list[dict[str, Any]]) -> str:
    """Return a table of faults: the number of trials by phase, the recovery time, the steps done twice."""
    phases = ("start, download", "set-up", "steps", "checkpoint", "closing", "publish", "over")
    lines = [f"| fault | {' | '.join(phases)} | all | recovered in s, median (max) | steps repeated, median (max) |"]
    lines.append("| --- |" + " --- |" * (len(phases) + 3))
    by_fault: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for trial in trials:
        by_fault[trial["fault"]].append(trial)
    for fault in FAULTS:
        counts = Counter(trial["phase"] for trial in by_fault[fault])
        cells = [str(counts[phase]) for phase in phases] + [str(len(by_fault[fault]))]
        cells += [_spread(by_fault[fault], figure) for figure in ("recovered_s", "steps_repeated")]
        lines.append(f"| {fault} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(trials: list[dict[str, Any]], figure: str) -> str:
    values = [trial[figure] for trial in trials if trial[figure] is not None]
    return f"{statistics.median(values):.3g} ({max(values):.3g})" if values else "-"


if __name__ == "__main__":
    sys.exit(main())
