"""A training resumes from its newest complete checkpoint."""

import copy
from pathlib import Path
from typing import Any

import pytest

from llamarefine_jobs.contract.artifact import MANIFEST, checkpoint_path
from llamarefine_jobs.contract.errors import IntegrityError
from llamarefine_jobs.store import Store

from . import samples
from .samples import KEY, STAGE


def publish(store: Store, step: int, tmp_path: Path) -> dict[str, bytes]:
    folder = samples.make_folder(tmp_path / f"state-{step}", seed=step)
    store.publish_checkpoint(step, folder, samples.draft())
    return samples.content(folder)


def test_fetch_checkpoint_returns_none_without_checkpoints(store: Store, tmp_path: Path) -> None:
    assert store.fetch_checkpoint(STAGE, KEY, tmp_path / "resume") is None
    assert not (tmp_path / "resume").exists()


def test_the_newest_checkpoint_is_fetched_and_older_ones_are_removed(store: Store, tmp_path: Path) -> None:
    for step in (5, 40, 100):  # 100 sorts after 40 as a number, before it as text
        newest = publish(store, step, tmp_path)
    assert store.fetch_checkpoint(STAGE, KEY, tmp_path / "resume") == 100
    assert samples.content(tmp_path / "resume") == newest
    steps = {entry.path.split("/")[3] for entry in store.entries("checkpoints/")}
    assert steps == {"00000100"}


def test_an_incomplete_checkpoint_is_skipped(store: Store, tmp_path: Path) -> None:
    complete = publish(store, 40, tmp_path)
    store.write(f"{checkpoint_path(STAGE, KEY, 50)}/abandoned/model.bin", b"half of it")
    assert store.fetch_checkpoint(STAGE, KEY, tmp_path / "resume") == 40
    assert samples.content(tmp_path / "resume") == complete


def test_an_abandoned_checkpoint_is_removed_with_the_older_ones(store: Store, tmp_path: Path) -> None:
    store.write(f"{checkpoint_path(STAGE, KEY, 50)}/abandoned/model.bin", b"half of it")
    publish(store, 60, tmp_path)
    assert not [entry for entry in store.entries("checkpoints/") if "abandoned" in entry.path]


def test_a_damaged_checkpoint_is_an_error_and_is_not_skipped(store: Store, tmp_path: Path) -> None:
    publish(store, 40, tmp_path)
    path = next(entry.path for entry in store.entries("checkpoints/") if entry.path.endswith("one.byte"))
    store.write(path, b"?")
    with pytest.raises(IntegrityError, match=r"one\.byte"):
        store.fetch_checkpoint(STAGE, KEY, tmp_path / "resume")
    assert not (tmp_path / "resume").exists()


def test_a_checkpoint_is_not_an_artifact(store: Store, tmp_path: Path) -> None:
    publish(store, 40, tmp_path)
    assert store.manifest(STAGE, KEY) is None


def test_checkpoints_of_other_trainings_stay(store: Store, tmp_path: Path, folder: Path) -> None:
    other = samples.key_of("another training")
    store.publish_checkpoint(10, folder, samples.draft(key=other))
    publish(store, 20, tmp_path)
    store.remove_checkpoints(STAGE, KEY)
    assert store.fetch_checkpoint(STAGE, KEY, tmp_path / "mine") is None
    assert store.fetch_checkpoint(STAGE, other, tmp_path / "other") == 10


def test_other_files_among_checkpoints_are_ignored(store: Store, tmp_path: Path) -> None:
    store.write(f"{checkpoint_path(STAGE, KEY)}/notes.txt", b"left by a person")
    store.write(f"{checkpoint_path(STAGE, KEY)}/²/{MANIFEST}", b"a digit but not a decimal number")
    publish(store, 20, tmp_path)
    assert store.fetch_checkpoint(STAGE, KEY, tmp_path / "resume") == 20


@pytest.mark.parametrize("operation", ["read", "download"])
def test_a_checkpoint_that_is_replaced_during_its_fetch_gives_the_newer_one(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    """A training that received SIGTERM saves its last step while the next process already fetches a checkpoint."""
    publish(store, 40, tmp_path)
    other_writer = copy.copy(store)
    other_writer.objects = copy.copy(store.objects)
    expected: list[dict[str, bytes]] = []
    original = getattr(store.objects, operation)

    def replace_checkpoint_first(path: str, *arguments: Any) -> Any:
        if not expected:
            expected.append({})
            expected[0] |= publish(other_writer, 50, tmp_path)
        return original(path, *arguments)

    monkeypatch.setattr(store.objects, operation, replace_checkpoint_first)
    assert store.fetch_checkpoint(STAGE, KEY, tmp_path / "resume") == 50
    assert samples.content(tmp_path / "resume") == expected[0]
