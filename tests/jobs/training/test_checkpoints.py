"""Checkpoints are uploaded in the background: the training does not wait for them; every failed upload is logged."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llamarefine_jobs.contract.errors import StoreError
from llamarefine_jobs.store import Store
from llamarefine_jobs.training.checkpoints import Checkpoint, CheckpointUploader
from tests.store import samples
from tests.store.samples import KEY, STAGE


class Gate:
    """The objects of a real store whose uploads wait until the gate is open, and then raise `error` if it is set."""

    def __init__(self, objects: Any) -> None:
        self._objects = objects
        self.open, self.reached = threading.Event(), threading.Event()
        self.error: Exception | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objects, name)

    def upload(self, path: str, file: Path, on_chunk: Callable[[bytes], None]) -> None:
        self.reached.set()
        assert self.open.wait(30)
        if self.error:
            raise self.error
        self._objects.upload(path, file, on_chunk)


@pytest.fixture
def gate(file_uri: str) -> Iterator[Gate]:
    gate = Gate(Store(file_uri).objects)
    yield gate
    gate.open.set()


@pytest.fixture
def store(file_uri: str, gate: Gate) -> Store:
    store = Store(file_uri)
    store.objects = gate  # type: ignore[assignment]
    return store


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def uploader(store: Store, notes: list[str]) -> CheckpointUploader:
    return CheckpointUploader(store, notes.append)


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[[int], Checkpoint]:
    return lambda step: Checkpoint(step, samples.make_folder(tmp_path / f"step-{step}", seed=step), samples.draft())


def newest_stored_step(store: Store, into: Path) -> int | None:
    """Return the step of the newest complete checkpoint, after comparing its bytes with the original ones."""
    step = store.fetch_checkpoint(STAGE, KEY, into)
    if step is not None:
        assert samples.content(into) == samples.content(samples.make_folder(into.parent / "expected", seed=step))
    return step


def open_on_discard(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    """Open the gate, for which the running upload waits, as soon as a folder is removed."""
    rmtree = shutil.rmtree

    def remove(*arguments: Any, **options: Any) -> None:
        rmtree(*arguments, **options)
        gate.open.set()

    monkeypatch.setattr(shutil, "rmtree", remove)


def test_the_training_continues_while_a_checkpoint_is_uploaded(
    uploader: CheckpointUploader, gate: Gate, store: Store, make_checkpoint: Callable[[int], Checkpoint], tmp_path: Path
) -> None:
    first = make_checkpoint(1)
    uploader.upload_in_background(first)
    assert gate.reached.wait(30)
    assert store.fetch_checkpoint(STAGE, KEY, tmp_path / "too early") is None
    assert samples.content(first.folder), "the folder is removed during its upload"
    gate.open.set()
    uploader.wait()
    assert newest_stored_step(store, tmp_path / "resume") == uploader.newest_step == 1
    assert not first.folder.exists()


def test_a_newer_checkpoint_replaces_one_that_waits(
    uploader: CheckpointUploader, gate: Gate, store: Store, make_checkpoint: Callable[[int], Checkpoint], tmp_path: Path
) -> None:
    first, second, third = make_checkpoint(1), make_checkpoint(2), make_checkpoint(3)
    uploader.upload_in_background(first)
    assert gate.reached.wait(30)
    uploader.upload_in_background(second)
    uploader.upload_in_background(third)
    assert not second.folder.exists()
    gate.open.set()
    uploader.wait()
    assert newest_stored_step(store, tmp_path / "resume") == 3
    assert {entry.path.split("/")[3] for entry in store.entries("checkpoints/")} == {"00000003"}


def test_a_failed_upload_is_logged_and_the_next_checkpoint_is_uploaded(
    uploader: CheckpointUploader,
    gate: Gate,
    store: Store,
    notes: list[str],
    make_checkpoint: Callable[[int], Checkpoint],
    tmp_path: Path,
) -> None:
    gate.open.set()
    uploader.upload_in_background(make_checkpoint(1))
    uploader.wait()
    gate.error = StoreError("the bucket is unreachable")
    uploader.upload_in_background(make_checkpoint(2))
    uploader.wait()
    assert notes == ["the checkpoint at step 2 is not in the store, training continues: the bucket is unreachable"]
    assert newest_stored_step(store, tmp_path / "after the failure") == uploader.newest_step == 1
    gate.error = None
    uploader.upload_in_background(make_checkpoint(3))
    uploader.wait()
    assert newest_stored_step(store, tmp_path / "after the next") == 3


def wait_until(is_true: Callable[[], bool]) -> None:
    until_s = time.monotonic() + 30
    while not is_true():
        assert time.monotonic() < until_s
        time.sleep(0.01)


def test_a_checkpoint_whose_upload_failed_is_kept_and_uploaded_when_that_works_again(
    monkeypatch: pytest.MonkeyPatch,
    uploader: CheckpointUploader,
    gate: Gate,
    store: Store,
    notes: list[str],
    make_checkpoint: Callable[[int], Checkpoint],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("llamarefine_jobs.training.checkpoints.RETRY_EVERY_S", 0.01)
    gate.open.set()
    gate.error = StoreError("the keys are refused")
    uploader.upload_in_background(make_checkpoint(1))
    wait_until(lambda: len(notes) == 1)
    gate.reached.clear()
    assert gate.reached.wait(30), "the upload was not repeated"
    gate.error = None
    wait_until(lambda: len(notes) == 2)
    assert notes == [
        "the checkpoint at step 1 is not in the store, training continues: the keys are refused",
        "the checkpoint at step 1 is in the store; uploads work again",
    ]
    assert newest_stored_step(store, tmp_path / "resume") == uploader.newest_step == 1


def test_a_newer_checkpoint_replaces_one_whose_upload_failed(
    uploader: CheckpointUploader,
    gate: Gate,
    store: Store,
    notes: list[str],
    make_checkpoint: Callable[[int], Checkpoint],
    tmp_path: Path,
) -> None:
    gate.open.set()
    gate.error = StoreError("the keys are refused")
    failed = make_checkpoint(1)
    uploader.upload_in_background(failed)
    wait_until(lambda: len(notes) == 1)
    assert failed.folder.exists()
    gate.error = None
    uploader.upload_in_background(make_checkpoint(2))  # does not wait for the end of the pause
    wait_until(lambda: len(notes) == 2)
    assert not failed.folder.exists()
    assert newest_stored_step(store, tmp_path / "resume") == 2


def test_discard_waiting_removes_a_checkpoint_whose_upload_failed(
    uploader: CheckpointUploader, gate: Gate, notes: list[str], make_checkpoint: Callable[[int], Checkpoint]
) -> None:
    gate.open.set()
    gate.error = StoreError("the keys are refused")
    failed = make_checkpoint(1)
    uploader.upload_in_background(failed)
    wait_until(lambda: len(notes) == 1)
    uploader.discard_waiting()
    assert not failed.folder.exists()
    assert len(notes) == 1


def test_the_last_checkpoint_is_in_the_store_when_upload_now_returns(
    monkeypatch: pytest.MonkeyPatch,
    uploader: CheckpointUploader,
    gate: Gate,
    store: Store,
    make_checkpoint: Callable[[int], Checkpoint],
    tmp_path: Path,
) -> None:
    uploader.upload_in_background(make_checkpoint(1))
    assert gate.reached.wait(30)
    waiting, last = make_checkpoint(2), make_checkpoint(3)
    uploader.upload_in_background(waiting)
    open_on_discard(gate, monkeypatch)
    uploader.upload_now(last)
    assert newest_stored_step(store, tmp_path / "resume") == 3
    assert not waiting.folder.exists()
    assert not last.folder.exists()


def test_upload_now_raises_the_error_of_a_failed_upload(
    uploader: CheckpointUploader, gate: Gate, make_checkpoint: Callable[[int], Checkpoint]
) -> None:
    gate.open.set()
    gate.error = StoreError("the bucket is unreachable")
    with pytest.raises(StoreError, match="unreachable"):
        uploader.upload_now(make_checkpoint(1))
    assert uploader.newest_step is None


def test_discard_waiting_removes_the_checkpoint_that_waits(
    monkeypatch: pytest.MonkeyPatch,
    uploader: CheckpointUploader,
    gate: Gate,
    store: Store,
    make_checkpoint: Callable[[int], Checkpoint],
    tmp_path: Path,
) -> None:
    uploader.upload_in_background(make_checkpoint(1))
    assert gate.reached.wait(30)
    waiting = make_checkpoint(2)
    uploader.upload_in_background(waiting)
    open_on_discard(gate, monkeypatch)
    uploader.discard_waiting()
    assert not waiting.folder.exists()
    assert newest_stored_step(store, tmp_path / "resume") == 1


def test_an_unexpected_error_in_the_thread_is_raised_by_wait(
    uploader: CheckpointUploader, gate: Gate, make_checkpoint: Callable[[int], Checkpoint]
) -> None:
    gate.open.set()
    gate.error = ZeroDivisionError("a mistake")
    uploader.upload_in_background(make_checkpoint(1))
    with pytest.raises(ZeroDivisionError):
        uploader.wait()
    gate.error = None
    uploader.wait()
