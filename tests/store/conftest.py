"""One list of tests, two kinds of store."""

from pathlib import Path

import pytest

from llamarefine_jobs.store import Store

from . import samples


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest) -> Store:
    """An empty store: each test that takes it runs on a folder and on a bucket."""
    uri: str = request.getfixturevalue(f"{request.param}_uri")
    return Store(uri)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder to publish."""
    return samples.make_folder(tmp_path / "made")
