"""A writer that crashes between any two of its writes leaves no partial artifact, and the next writer succeeds."""

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
    """Simulates the end of the process: no code of the store catches it."""


class CrashingObjects:
    """Real objects whose first `at` writes succeed; every later write raises Crash."""

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
    """Run `act` on the same store and let it crash after `at` writes; return whether it crashed or completed before."""
    crashing = copy.copy(store)
    crashing.objects = CrashingObjects(store.objects, at)  # type: ignore[assignment]
    try:
        act(crashing)
    except Crash:
        return True
    return False


def test_a_crash_before_the_manifest_leaves_no_artifact(store: Store, folder: Path) -> None:
    for at in range(100):
        if not crashed_at(store, at, lambda store: store.publish(folder, samples.draft())):
            break
        assert store.manifest(STAGE, KEY) is None
    assert at == len(samples.content(folder)) + 1, "each file is one write, and the manifest is the last"
    published = store.manifest(STAGE, KEY)
    assert published is not None
    store.verify(published)


def test_a_crash_while_older_checkpoints_are_removed_keeps_a_complete_one(
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

    def fail_at_one_byte(path: str, file: Path, on_chunk: Callable[[bytes], None]) -> None:
        if path.endswith("one.byte"):
            raise DiskFullError("no space is left")
        upload(path, file, on_chunk)

    monkeypatch.setattr(store.objects, "upload", fail_at_one_byte)
    with pytest.raises(DiskFullError):
        store.publish(folder, samples.draft())
    assert samples.objects_of(store) == []


def test_a_manifest_keeps_its_files_if_its_answer_was_lost(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server wrote the manifest, then the connection broke: the files must not be cleaned up."""
    create = store.objects.create

    def lose_the_answer(path: str, data: bytes) -> bool:
        create(path, data)
        raise StoreError("the connection broke")

    with monkeypatch.context() as patched:
        patched.setattr(store.objects, "create", lose_the_answer)
        with pytest.raises(StoreError):
            store.publish(folder, samples.draft())
    manifest = store.manifest(STAGE, KEY)
    assert manifest is not None
    samples.assert_only(store, manifest)
    assert store.publish(folder, samples.draft()) == manifest


@pytest.mark.parametrize("error", [DiskFullError("the bucket is full"), AccessError("the credentials have expired")])
def test_a_manifest_keeps_its_files_if_its_answer_was_lost_and_the_retry_was_refused(
    store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch, error: LlamaRefineError
) -> None:
    create = store.objects.create

    def refuse_the_retry(path: str, data: bytes) -> bool:
        create(path, data)
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(store.objects, "create", refuse_the_retry)
        with pytest.raises(type(error)):
            store.publish(folder, samples.draft())
    manifest = store.manifest(STAGE, KEY)
    assert manifest is not None
    samples.assert_only(store, manifest)


def test_a_refused_manifest_leaves_nothing(store: Store, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, data: bytes) -> bool:
        raise DiskFullError("no space is left")

    monkeypatch.setattr(store.objects, "create", refuse)
    with pytest.raises(DiskFullError):
        store.publish(folder, samples.draft())
    assert samples.objects_of(store) == []
