"""Two writers of one key: one manifest wins, both succeed, none of the loser's files stay."""

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llamarefine_jobs.contract.artifact import Manifest
from llamarefine_jobs.store import Store

from . import samples
from .processes import Writer
from .samples import KEY, STAGE


@pytest.fixture
def environment(store: Store, request: pytest.FixtureRequest) -> dict[str, str]:
    """Return the environment variables that another process needs to reach the store."""
    if store.uri.startswith("s3://"):
        found: dict[str, str] = request.getfixturevalue("the_s3_server").environment
        return found
    return {}


def test_writers_in_threads_leave_one_artifact(store: Store, tmp_path: Path) -> None:
    folders = [samples.make_folder(tmp_path / str(seed), seed) for seed in range(5)]
    barrier = threading.Barrier(len(folders))

    def publish(folder: Path) -> Manifest:
        own_store = Store(store.uri)
        barrier.wait()
        return own_store.publish(folder, samples.draft())

    with ThreadPoolExecutor(len(folders)) as pool:
        results = list(pool.map(publish, folders))
    assert len({result.attempt for result in results}) == 1
    samples.assert_only(store, results[0])
    store.fetch(results[0], tmp_path / "fetched")
    assert samples.content(tmp_path / "fetched") in [samples.content(folder) for folder in folders]


def test_writers_in_processes_leave_one_artifact(store: Store, tmp_path: Path, environment: dict[str, str]) -> None:
    writers = [Writer(store, samples.make_folder(tmp_path / str(seed), seed), environment) for seed in range(3)]
    for writer in writers:
        writer.go()
    attempts = {writer.attempt() for writer in writers}
    manifest = store.manifest(STAGE, KEY)
    assert manifest is not None
    assert attempts == {manifest.attempt}
    samples.assert_only(store, manifest)


def test_a_writer_that_finds_a_manifest_uploads_nothing(
    store: Store, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = store.publish(folder, samples.draft())
    monkeypatch.setattr(store.objects, "upload", None)
    assert store.publish(samples.make_folder(tmp_path / "late", seed=9), samples.draft()) == first


def test_create_has_exactly_one_winner(store: Store) -> None:
    for round_ in range(8):
        barrier = threading.Barrier(6)

        def create(writer: int, path: str = f"runs/{round_}", barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return store.objects.create(path, f"written by {writer}".encode())

        with ThreadPoolExecutor(6) as pool:
            won = list(pool.map(create, range(6)))
        assert won.count(True) == 1
        assert store.read(f"runs/{round_}") == f"written by {won.index(True)}".encode()


def test_a_writer_killed_at_any_moment_leaves_a_consistent_store(
    store: Store, tmp_path: Path, environment: dict[str, str]
) -> None:
    """After SIGKILL at random moments the artifact is complete or absent, and the next writer succeeds.

    The moments are spread over the time that one publish takes; this is why the test measures time and sleeps.
    """
    kills = 20 if store.uri.startswith("file://") else 8
    folder = samples.make_folder(tmp_path / "made", size_bytes=3_000_000)
    timed = Writer(store, folder, environment)
    began = time.monotonic()
    timed.go()
    timed.attempt()
    duration_s = time.monotonic() - began
    store._remove(f"artifacts/{STAGE}/{KEY}")

    moments, completed = random.Random(11), 0
    for _ in range(kills):
        writer = Writer(store, folder, environment)
        writer.go()
        time.sleep(moments.uniform(0, 1.1 * duration_s))
        writer.kill()
        manifest = store.manifest(STAGE, KEY)
        if manifest is not None:
            completed += 1
            store.verify(manifest)
        next_one = store.publish(folder, samples.draft())
        store.verify(next_one)
        store._remove(f"artifacts/{STAGE}/{KEY}")
    assert completed < kills, "every writer completed before it was killed, so the test proves nothing"
