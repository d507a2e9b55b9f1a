"""Stores of both kinds, and a clock that makes the pauses between retries take no time."""

import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from llamarefine_jobs.store import Store

from . import samples


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest) -> Store:
    """Return an empty store. Each test with this fixture runs on a folder and on a bucket."""
    uri: str = request.getfixturevalue(f"{request.param}_uri")
    return Store(uri)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder to publish."""
    return samples.make_folder(tmp_path / "made")


class Clock:
    """A clock that only `sleep` moves."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.pauses_s: list[float] = []
        self._lock = threading.Lock()

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.pauses_s.append(seconds)
            self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Replace the clock of the retry policy, so that its pauses take no time; boto3's pauses take no time, too."""
    clock = Clock()
    monkeypatch.setattr("llamarefine_jobs.contract.retry.time", clock)
    monkeypatch.setattr("botocore.endpoint.time", SimpleNamespace(sleep=lambda seconds: None))
    return clock
