"""Checkpoints go to the store beside the training: it never waits for them, and none is lost without a word."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llamarefine_jobs.contract.errors import StoreError
from llamarefine_jobs.store import Store
from llamarefine_jobs.training.checkpoints import Checkpoint, Checkpoints
from tests.store import samples
from tests.store.samples import KEY, STAGE


class Gate:
    """A real store's objects, whose uploads wait until the gate is open, and fail where told."""

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
def checkpoints(store: Store, notes: list[str]) -> Checkpoints:
    return Checkpoints(store, notes.append)


@pytest.fixture
def made(tmp_path: Path) -> Callable[[int], Checkpoint]:
    return lambda step: Checkpoint(step, samples.make_folder(tmp_path / f"step-{step}", seed=step), samples.draft())


def stored(store: Store, into: Path) -> int | None:
    """The step of the newest complete checkpoint, its bytes compared with those that were handed over."""
    step = store.fetch_checkpoint(STAGE, KEY, into)
    if step is not None:
        assert samples.content(into) == samples.content(samples.make_folder(into.parent / "expected", seed=step))
    return step


def test_the_training_goes_on_while_a_checkpoint_is_uploaded(
    checkpoints: Checkpoints, gate: Gate, store: Store, made: Callable[[int], Checkpoint], tmp_path: Path
) -> None:
    first = made(1)
    checkpoints.offer(first)
    assert gate.reached.wait(30)
    assert store.fetch_checkpoint(STAGE, KEY, tmp_path / "too early") is None
    assert samples.content(first.folder), "what is uploaded stays on the disk"
    gate.open.set()
    checkpoints.settle()
    assert stored(store, tmp_path / "resume") == checkpoints.newest_step == 1
    assert not first.folder.exists()


def test_a_newer_checkpoint_takes_the_place_of_one_that_waits(
    checkpoints: Checkpoints, gate: Gate, store: Store, made: Callable[[int], Checkpoint], tmp_path: Path
) -> None:
    first, second, third = made(1), made(2), made(3)
    checkpoints.offer(first)
    assert gate.reached.wait(30)
    checkpoints.offer(second)
    checkpoints.offer(third)
    assert not second.folder.exists()
    gate.open.set()
    checkpoints.settle()
    assert stored(store, tmp_path / "resume") == 3
    assert {entry.path.split("/")[3] for entry in store.entries("checkpoints/")} == {"00000003"}


def test_an_upload_that_fails_is_noted_and_the_next_checkpoint_is_tried(
    checkpoints: Checkpoints,
    gate: Gate,
    store: Store,
    notes: list[str],
    made: Callable[[int], Checkpoint],
    tmp_path: Path,
) -> None:
    gate.open.set()
    checkpoints.offer(made(1))
    checkpoints.settle()
    gate.error = StoreError("the bucket is away")
    checkpoints.offer(made(2))
    checkpoints.settle()
    assert notes == ["the checkpoint at step 2 is not in the store, training goes on: the bucket is away"]
    assert stored(store, tmp_path / "after the failure") == checkpoints.newest_step == 1
    gate.error = None
    checkpoints.offer(made(3))
    checkpoints.settle()
    assert stored(store, tmp_path / "after the next") == 3


def test_the_last_checkpoint_is_in_the_store_when_publish_returns(
    checkpoints: Checkpoints, gate: Gate, store: Store, made: Callable[[int], Checkpoint], tmp_path: Path
) -> None:
    checkpoints.offer(made(1))
    assert gate.reached.wait(30)
    waiting, last = made(2), made(3)
    checkpoints.offer(waiting)
    opening = threading.Timer(0.2, gate.open.set)
    opening.start()
    checkpoints.publish(last)
    assert stored(store, tmp_path / "resume") == 3
    assert not waiting.folder.exists()
    assert not last.folder.exists()


def test_a_last_checkpoint_that_cannot_be_stored_is_an_error(
    checkpoints: Checkpoints, gate: Gate, made: Callable[[int], Checkpoint]
) -> None:
    gate.open.set()
    gate.error = StoreError("the bucket is away")
    with pytest.raises(StoreError, match="away"):
        checkpoints.publish(made(1))
    assert checkpoints.newest_step is None


def test_at_the_end_the_checkpoint_that_waits_is_dropped(
    checkpoints: Checkpoints, gate: Gate, store: Store, made: Callable[[int], Checkpoint], tmp_path: Path
) -> None:
    checkpoints.offer(made(1))
    assert gate.reached.wait(30)
    waiting = made(2)
    checkpoints.offer(waiting)
    threading.Timer(0.2, gate.open.set).start()
    checkpoints.abandon()
    assert not waiting.folder.exists()
    assert stored(store, tmp_path / "resume") == 1


def test_a_mistake_of_ours_is_not_swallowed_by_the_thread(
    checkpoints: Checkpoints, gate: Gate, made: Callable[[int], Checkpoint]
) -> None:
    gate.open.set()
    gate.error = ZeroDivisionError("a mistake")
    checkpoints.offer(made(1))
    with pytest.raises(ZeroDivisionError):
        checkpoints.settle()
    gate.error = None
    checkpoints.settle()
