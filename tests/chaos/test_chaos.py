"""A short form of `make chaos`: every fault, every stage and the store, at random moments of real runs."""

import os
from pathlib import Path

from .__main__ import SUBJECTS, suffer
from .faults import FAULTS

SEED = int(os.environ.get("LLAMAREFINE_CHAOS_SEED", "1"))


def test_killed_full_or_damaged_everything_ends_with_the_same_bytes_or_the_right_error(tmp_path: Path) -> None:
    report = suffer(tmp_path, SEED, 20)
    assert sum(bool(trial["hit"]) for trial in report["trials"]) == 20
    assert {trial["subject"] for trial in report["trials"]} == set(SUBJECTS)
    assert {trial["fault"] for trial in report["trials"]} == set(FAULTS)
    assert [trial for trial in report["trials"] if trial["finding"]] == []
