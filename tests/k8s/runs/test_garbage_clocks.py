"""gc with wrong clocks: ages are measured by the store's clock."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from click.testing import CliRunner

from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.stages import SEQUENCE
from llamarefine_jobs.store import Store
from llamarefine_k8s.cli import cli
from llamarefine_k8s.runs import garbage
from llamarefine_k8s.runs.garbage import RetentionPolicy
from llamarefine_k8s.runs.records import StageRecord
from tests.k8s.runs.test_garbage import DEAD_DRIVER, LATER, NOW, OLD, _manifests, drive, record
from tests.store.samples import key_of


@pytest.mark.parametrize("uri", ["file_uri", "s3_uri"])
def test_a_run_whose_drivers_clock_is_behind_is_as_young_as_its_record_in_the_store(
    uri: str, request: pytest.FixtureRequest
) -> None:
    store = Store(request.getfixturevalue(uri))
    stages = {"sft": StageRecord(key=key_of("sft"), state="running")}
    record(store, "one-11111111", updated_at=NOW - OLD, driver=DEAD_DRIVER, state="running", stages=stages)
    record(store, "two-22222222")
    assert garbage.find(store, RetentionPolicy(newest=1), datetime.now(UTC)).kept_runs == 2
    assert garbage.find(store, RetentionPolicy(newest=1), LATER).kept_runs == 1


def test_the_age_of_an_object_is_measured_by_the_buckets_clock(
    recipe: Callable[..., Recipe], s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a laptop's clock that is days ahead, objects that a stage is writing now would look old."""

    class FastClock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + OLD

    store = Store(s3_uri)
    drive(recipe(), store)
    for entry in list(store.entries("runs/")):
        store.objects.delete(entry.path)
    monkeypatch.setattr("llamarefine_jobs.store.artifacts.datetime", FastClock)
    monkeypatch.setattr("llamarefine_k8s.commands.maintenance.datetime", FastClock, raising=False)
    done = CliRunner().invoke(cli, ["gc", "--store", s3_uri, "--delete"])
    assert done.exit_code == 0, done.output
    assert len(_manifests(store)) == len(SEQUENCE)
