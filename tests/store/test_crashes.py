"""A writer that ends between any two of its steps leaves no artifact, and the next one succeeds."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamarefine_jobs.contract.errors import AccessError, DiskFullError, LlamaRefineError, StoreError
from llamarefine_jobs.store import Store
from llamarefine_jobs.store.objects import Objects

from . import samples
from .samples import KEY, STAGE


class Crash(BaseException):
    """The process is gone: nothing catches it."""


class Ending:
    """Real objects whose process ends at the `at`th change, and can do nothing from then on."""

    def __init__(self, objects: Objects, at: int) -> None:
        self._objects, self._left = objects, at

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._objects, name)
        return self._step(found) if name in ("write", "create", "upload", "delete") else found

    def _step(self, change: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any) -> Any:
            self._left -= 1
            if self._left < 0:
                raise Crash
            return change(*arguments)

        return step


def crashed_at(store: Store, at: int, act: Callable[[Store], object]) -> bool:
    """Whether `act`, on the same store, ended at its `at`th change (else it came to its end)."""
    ending = copy.copy(store)
    ending.objects = Ending(store.objects, at)  # type: ignore[assignment]
    try:
        act(ending)
    except Crash:
        return True
    return False


def test_a_crash_before_the_manifest_leaves_no_artifact(store: Store, folder: Path) -> None:
    for at in range(100):
        if not crashed_at(store, at, lambda store: store.publish(folder, samples.draft())):
            break
        assert store.manifest(STAGE, KEY) is None
    assert at == len(samples.content(folder)) + 1, "each file is one change, the manifest the last"
    published = store.manifest(STAGE, KEY)
    assert published is not None
    store.verify(published)


def test_a_crash_while_checkpoints_are_pruned_loses_none_that_counts(
    store: Store, folder: Path, tmp_path: Path
) -> None:
    store.publish_checkpoint(10, folder, samples.draft())
    newest = samples.make_folder(tmp_path / "newest", seed=2)
    for at in range(100):
        crashed = crashed_at(store, at, lambda store: store.publish_checkpoint(20, newest, samples.draft()))
        step = store.fetch_checkpoint(STAGE, KEY, tmp_path / f"fetched-{at}")
        expected = {10: samples.content(folder), 20: samples.content(newest)}
        assert step is not None
        assert samples.content(tmp_path / f"fetched-{at}") == expected[step]
        if not crashed:
            break
    assert store.checkpoint_steps(STAGE, KEY) == [20]


def test_a_crash_while_a_checkpoint_is_removed_leaves_it_whole_or_absent(
    store: Store, folder: Path, tmp_path: Path
) -> None:
    for at in range(100):
        store.publish_checkpoint(10, folder, samples.draft())
        crashed = crashed_at(store, at, lambda store: store.remove_checkpoints(STAGE, KEY))
        if store.fetch_checkpoint(STAGE, KEY, tmp_path / f"fetched-{at}") is not None:
            assert samples.content(tmp_path / f"fetched-{at}") == samples.content(folder)
        store.remove_checkpoints(STAGE, KEY)
        if not crashed:
            break
    assert at == len(samples.content(folder)) + 1


def test_a_failed_upload_leaves_nothing(store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upload = store.objects.upload

    def fail_at_the_last(path: str, file: Path, on_chunk: Callable[[bytes], None]) -> None:
        if path.endswith("one.byte"):
            raise DiskFullError("no space is left")
        upload(path, file, on_chunk)

    monkeypatch.setattr(store.objects, "upload", fail_at_the_last)
    with pytest.raises(DiskFullError):
        store.publish(folder, samples.draft())
    assert samples.objects_of(store) == []


def test_a_manifest_whose_answer_was_lost_keeps_its_files(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server wrote it, the connection broke before it could say so: its files must not be tidied away."""
    create = store.objects.create

    def lose_the_answer(path: str, data: bytes) -> bool:
        create(path, data)
        raise StoreError("the connection broke")

    with monkeypatch.context() as patched:
        patched.setattr(store.objects, "create", lose_the_answer)
        with pytest.raises(StoreError):
            store.publish(folder, samples.draft())
    standing = store.manifest(STAGE, KEY)
    assert standing is not None
    samples.assert_only(store, standing)
    assert store.publish(folder, samples.draft()) == standing


@pytest.mark.parametrize("error", [DiskFullError("the bucket is full"), AccessError("the credentials have expired")])
def test_a_manifest_whose_answer_was_lost_keeps_its_files_though_the_next_try_is_refused(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch, error: LlamaRefineError
) -> None:
    create = store.objects.create

    def be_refused_at_the_second_try(path: str, data: bytes) -> bool:
        create(path, data)
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(store.objects, "create", be_refused_at_the_second_try)
        with pytest.raises(type(error)):
            store.publish(folder, samples.draft())
    standing = store.manifest(STAGE, KEY)
    assert standing is not None
    samples.assert_only(store, standing)


def test_a_refused_manifest_leaves_nothing(store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, data: bytes) -> bool:
        raise DiskFullError("no space is left")

    monkeypatch.setattr(store.objects, "create", refuse)
    with pytest.raises(DiskFullError):
        store.publish(folder, samples.draft())
    assert samples.objects_of(store) == []
