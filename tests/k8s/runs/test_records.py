"""Run records: names, finding a run, and a driver that died."""

import os
import platform
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest

from llamarefine_jobs.contract.errors import IntegrityError, LlamaRefineError, RecipeError
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.store import Store
from llamarefine_k8s.runs.records import (
    Driver,
    RecordWriter,
    RunRecord,
    StageRecord,
    all_runs,
    find,
    find_first,
    load,
    run_id,
    where,
)

DEAD_DRIVER = Driver(pid=2**22 + 1, host=platform.node())  # above the largest process id of Linux


def record(store: Store, run: str, **changes: object) -> RunRecord:
    """Write a run record; return it."""
    now = datetime.now(UTC)
    values = {"created_at": now, "updated_at": now, "driver": Driver.this_process(), "recipe": {}}
    made = RunRecord(run=run, **(values | changes))
    store.write(f"runs/{run}/run.json", made.model_dump_json().encode())
    return made


def test_the_same_recipe_is_the_same_run(recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_id(recipe())
    assert run_id(recipe()) == run
    assert run.startswith("small-")
    assert len(run) == len("small-") + 8
    assert run_id(recipe("dpo.beta=0.2")) != run
    monkeypatch.setattr("llamarefine_k8s.runs.records.__version__", "99")
    assert run_id(recipe()) != run


def test_a_changed_source_gives_another_run(recipe: Callable[..., Recipe]) -> None:
    before = recipe()
    with open(before.prepare.questions.source, "a") as file:
        file.write("What is helm?,A packager.\n")
    assert run_id(recipe()) != run_id(before)


def test_a_run_is_found_by_the_beginning_of_its_name(store: Store) -> None:
    for run in ("one-11111111", "one-12222222", "two-33333333"):
        record(store, run)
    assert find(store, "two").run == "two-33333333"
    assert find(store, "one-12").run == "one-12222222"
    with pytest.raises(RecipeError, match="begins 2 runs: one-1"):
        find(store, "one")
    with pytest.raises(RecipeError, match="holds no run `three`; its newest are"):
        find(store, "three")


def test_without_a_name_the_newest_run_is_found(store: Store) -> None:
    with pytest.raises(RecipeError, match="holds no runs yet"):
        find(store, None)
    record(store, "old-11111111", updated_at=datetime.now(UTC) - timedelta(hours=1))
    record(store, "new-22222222")
    assert find(store, None).run == "new-22222222"
    assert [each.run for each in all_runs(store)] == ["new-22222222", "old-11111111"]


def test_find_first_distinguishes_a_run_from_a_question(store: Store) -> None:
    record(store, "docs-11111111")
    assert find_first(store, ("docs", "What?"))[1] == ("What?",)
    assert find_first(store, ("What is kind?",))[1] == ("What is kind?",)
    assert find_first(store, ("why",))[1] == ("why",)
    with pytest.raises(RecipeError, match="no run `gone-12345678`"):
        find_first(store, ("gone-12345678", "What?"))


@pytest.mark.parametrize(
    "changes",
    [{"driver": DEAD_DRIVER}, {"updated_at": datetime.now(UTC) - timedelta(minutes=5)}],
    ids=["its process ended", "no write for minutes"],
)
def test_a_run_whose_driver_died_is_interrupted(store: Store, changes: dict[str, object]) -> None:
    stages = {"sft": StageRecord(state="running"), "prepare": StageRecord(state="done")}
    record(store, "run-11111111", stages=stages, **changes)
    found = find(store, None)
    assert found.state == "interrupted"
    assert {name: stage.state for name, stage in found.stages.items()} == {"sft": "interrupted", "prepare": "done"}


def test_a_driver_on_another_machine_is_alive_while_it_writes(store: Store) -> None:
    record(store, "run-11111111", driver=Driver(pid=1, host="elsewhere"))
    assert find(store, None).state == "running"


def test_a_second_driver_of_a_running_run_is_refused(store: Store, recipe: Callable[..., Recipe]) -> None:
    parent = Driver(pid=os.getppid(), host=platform.node())
    record(store, run_id(recipe()), driver=parent)
    with pytest.raises(LlamaRefineError, match=f"is already being driven by process {parent.pid}"):
        RecordWriter(store, recipe(), lambda record: None)


def test_an_unreadable_record_hides_no_other_run_and_is_rewritten(store: Store, recipe: Callable[..., Recipe]) -> None:
    record(store, "run-11111111")
    store.write("runs/broken-22222222/run.json", b"{")
    assert [each.run for each in all_runs(store)] == ["run-11111111"]
    assert find(store, None).run == "run-11111111"
    with pytest.raises(IntegrityError, match="is not a run record of this version"):
        find(store, "broken")
    store.write(f"runs/{run_id(recipe())}/run.json", b"[]")
    with RecordWriter(store, recipe(), lambda record: None):
        assert load(store, run_id(recipe())) is not None


def test_created_at_is_kept_when_a_run_is_driven_again(store: Store, recipe: Callable[..., Recipe]) -> None:
    first = datetime.now(UTC) - timedelta(days=3)
    record(store, run_id(recipe()), created_at=first, state="done")
    assert RecordWriter(store, recipe(), lambda record: None).record.created_at == first


def test_where_returns_uris_in_a_bucket_and_the_bare_uri_for_the_store_itself(s3_uri: str) -> None:
    store = Store(s3_uri)
    assert where(store, ".") == s3_uri
    assert where(store, "runs/one/report/report.html") == f"{s3_uri}/runs/one/report/report.html"
