"""A short form of `make chaos`: every fault, on every stage and the store, at random moments of real runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

from .__main__ import SUBJECTS
from .faults import DAMAGES, FAULTS

ROOT = Path(__file__).parents[2]
SEED = os.environ.get("LLAMAREFINE_CHAOS_SEED", "1")


def test_after_each_fault_every_subject_ends_with_the_undisturbed_bytes_or_the_right_error(tmp_path: Path) -> None:
    """The suite runs in its own process, because pytest's may have a fork server with other imports already."""
    command = [sys.executable, "-m", "tests.chaos", "--seed", SEED, "--kills", "20", "--parallel", "1"]
    done = subprocess.run(
        [*command, "--json", str(tmp_path / "report.json")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    trials = json.loads((tmp_path / "report.json").read_text())["trials"]
    assert sum(bool(trial["hit"]) for trial in trials) == 20
    assert {trial["subject"] for trial in trials} == set(SUBJECTS)
    assert {trial["fault"] for trial in trials} == set(FAULTS)
    assert [trial for trial in trials if trial["finding"]] == []
    restarted = {trial["fault"] for trial in trials if len(trial["ended"]) > 1}
    assert restarted >= set(FAULTS) - set(DAMAGES), "a fault ended no process, so it did nothing"
    assert restarted & set(DAMAGES), "no damage was found and repaired"
