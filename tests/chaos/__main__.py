"""The local chaos suite: `make chaos SEED=1 KILLS=200`.

Each trial starts a stage, or a writer of the store, in a copy of an undisturbed world, and lets one fault
happen at a moment drawn evenly over the phases of an undisturbed run, until KILLS faults have hit a live
process or stored bytes. It is restarted, as a person or a Job would, until it ends well. Right is: the same
sha256 as undisturbed, every error on the way of the kind that the fault calls for, damage named by its file.
Anything else is a finding and fails the suite.
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

from . import processes, worlds
from .faults import FAULTS
from .moments import Mark, Recorder
from .trials import Trial, attempt

SUBJECTS = (*SEQUENCE, "store")


def main() -> int:
    """Run the suite; 1 where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=200, help="faults that hit; those that met nothing are repeated")
    parser.add_argument("--at-once", type=int, default=2, help="trials side by side")
    parser.add_argument("--minutes", type=float, default=120, help="no trial begins later than that")
    parser.add_argument("--json", type=Path, help="write every trial and the table there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="llamarefine-chaos-") as folder:
        report = suffer(
            Path(folder), options.seed, options.kills, at_once=options.at_once, until_s=options.minutes * 60
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


def suffer(folder: Path, seed: int, kills: int, *, at_once: int = 1, until_s: float = 7200) -> dict[str, Any]:
    """Trials below `folder` until `kills` hit, every fault for every subject in turn; what each did, as plain values.

    No more than twice as many are begun.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    began_s = time.monotonic()
    undisturbed, marks = prepare(folder)
    expected = {subject: worlds.digests(undisturbed, subject) for subject in SUBJECTS}
    every = [(subject, fault) for fault in FAULTS for subject in SUBJECTS]
    random.Random(seed).shuffle(every)

    def one(number: int) -> Trial | None:
        if time.monotonic() - began_s > until_s:
            return None
        subject, fault = every[number % len(every)]
        draw = random.Random(f"{seed} {number}")
        trial = Trial(number, subject, fault)
        attempt(trial, undisturbed, folder / f"trial-{number}", draw, marks[subject], expected[subject])
        where = f"{trial.subject}, {trial.fault}, {trial.phase}"
        print(f"trial {number}: {where}: {trial.finding or 'right'} {trial.ended}", flush=True)
        return trial

    with ThreadPoolExecutor(at_once) as pool:
        tried: list[Trial] = []
        while (missing := kills - sum(bool(trial.hit) for trial in tried)) and len(tried) < 2 * kills:
            more = [trial for trial in pool.map(one, range(len(tried), len(tried) + missing)) if trial]
            tried += more
            if len(more) < missing:  # the time is over
                break
    return {
        "seed": seed,
        "seconds": time.monotonic() - began_s,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "load": os.getloadavg(),
        "undisturbed_s": {subject: round(sum(mark.lasts_s for mark in each), 3) for subject, each in marks.items()},
        "trials": [trial.as_json() for trial in tried],
    }


def prepare(folder: Path) -> tuple[Path, dict[str, list[Mark]]]:
    """A world in which every subject ran undisturbed, and the marks that each passed."""
    undisturbed = worlds.make(folder / "undisturbed")
    return undisturbed, {subject: _undisturbed(subject, undisturbed) for subject in SUBJECTS}


def _undisturbed(subject: str, world: Path) -> list[Mark]:
    recorder = Recorder(world, subject)
    ended = processes.run(subject, world, recorder)
    if ended.exit_code:
        raise SystemExit(f"{subject} fails undisturbed ({ended.exit_code}): " + "\n".join(ended.lines))
    print(f"undisturbed: {subject} takes {ended.seconds:.1f} s and passes {len(recorder.marks)} marks", flush=True)
    return recorder.marks


def table(trials: list[dict[str, Any]]) -> str:
    """Fault by phase: how many, and how long until it was over, and how many steps were done twice."""
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
