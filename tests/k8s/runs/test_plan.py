"""`plan`: which stages would run, and why."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest

from llamarefine_jobs.contract.artifact import run_path
from llamarefine_jobs.contract.errors import DivergedError, StoreError
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.stages import SEQUENCE
from llamarefine_jobs.store import Store
from llamarefine_k8s.runs import records
from llamarefine_k8s.runs.pipeline import Pipeline
from llamarefine_k8s.runs.plan import plan
from tests.k8s.acting import FakeExecutor, fail
from tests.k8s.runs.test_pipeline import RecordingObserver


def planned_stages(recipe: Recipe, store: Store) -> dict[str, tuple[str, str]]:
    """Return state and reasons by stage."""
    return {stage.stage: (stage.state, "; ".join(stage.reasons)) for stage in plan(recipe, store)}


def drive(recipe: Recipe, store: Store, executor: FakeExecutor | None = None) -> None:
    Pipeline(recipe, store, executor or FakeExecutor(), RecordingObserver(), retry_after_s=()).drive()


def test_in_an_empty_store_everything_runs(recipe: Callable[..., Recipe], store: Store) -> None:
    planned = plan(recipe(), store)
    assert [stage.stage for stage in planned] == list(SEQUENCE)
    assert [stage.state for stage in planned] == ["due"] + ["follows"] * 4
    assert planned[0].reasons == ("never ran",)
    assert [stage.key is None for stage in planned] == [False, True, True, True, True], (
        "a key depends on the parents' artifacts"
    )
    assert planned[4].reasons == ("runs after merge",)


def test_after_a_run_every_artifact_is_there(recipe: Callable[..., Recipe], store: Store) -> None:
    drive(recipe(), store)
    assert {state for state, _ in planned_stages(recipe(), store).values()} == {"there"}


def test_the_changed_key_is_named_with_both_values(recipe: Callable[..., Recipe], store: Store) -> None:
    drive(recipe(), store)
    assert planned_stages(recipe("dpo.beta=0.2", "dpo.lora.rank=8"), store) == {
        "prepare": ("there", planned_stages(recipe(), store)["prepare"][1]),
        "sft": ("there", planned_stages(recipe(), store)["sft"][1]),
        "dpo": ("due", "dpo.beta 0.1 → 0.2; dpo.lora.rank 16 → 8"),
        "merge": ("follows", "runs after dpo"),
        "evaluate": ("follows", "runs after merge"),
    }


def test_a_recipe_is_compared_with_the_newest_run_of_its_name(recipe: Callable[..., Recipe], store: Store) -> None:
    drive(recipe(), store)
    drive(recipe("dpo.beta=0.2"), store)
    drive(recipe("name=other", "dpo.beta=0.7"), store)
    assert planned_stages(recipe("dpo.beta=0.3"), store)["dpo"] == ("due", "dpo.beta 0.2 → 0.3")


def test_the_duration_of_a_stage_comes_from_the_newest_run_that_ran_it(
    recipe: Callable[..., Recipe], store: Store
) -> None:
    drive(recipe(), store)
    assert [stage.took_s for stage in plan(recipe(), store)] == [None] * 5, "no stage is due"
    drive(recipe("dpo.beta=0.2"), store)  # this one reused prepare and sft
    first, second = (records.load(store, records.run_id(recipe(*change))) for change in ((), ("dpo.beta=0.2",)))
    assert first
    assert second
    for record, seconds in ((first, 60), (second, 7)):
        for stage in record.stages.values():
            stage.finished_at = stage.started_at and stage.started_at + timedelta(seconds=seconds)
        store.write(run_path(record.run, records.RECORD), record.to_bytes())
    planned = {stage.stage: stage.took_s for stage in plan(recipe("sft.epochs=9"), store)}
    assert planned == {"prepare": None, "sft": 60, "dpo": 7, "merge": 7, "evaluate": 7}


def test_a_source_with_different_content_is_a_reason(recipe: Callable[..., Recipe], store: Store) -> None:
    drive(recipe(), store)
    with Path(recipe().prepare.questions.source).open("a") as file:
        file.write("What is helm?,A packager.\n")
    assert planned_stages(recipe(), store)["prepare"] == ("due", "prepare.questions has different content")


def test_another_version_of_the_package_is_a_reason(
    recipe: Callable[..., Recipe], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    drive(recipe(), store)
    for module in ("llamarefine_jobs.contract.artifact", "llamarefine_k8s.runs.plan", "llamarefine_k8s.runs.records"):
        monkeypatch.setattr(f"{module}.__version__", "99")
    state, reasons = planned_stages(recipe(), store)["prepare"]
    assert state == "due"
    assert reasons.endswith("→ 99")


def test_a_recipe_key_of_all_stages_is_named_without_a_section(recipe: Callable[..., Recipe], store: Store) -> None:
    drive(recipe(), store)
    assert planned_stages(recipe("seed=7"), store)["prepare"] == ("due", "seed 42 → 7")


def test_a_parent_with_another_artifact_is_a_reason(recipe: Callable[..., Recipe], store: Store) -> None:
    drive(recipe(), store)
    with pytest.raises(StoreError):
        drive(recipe("sft.epochs=2"), store, FakeExecutor(dpo=fail(StoreError("gone"))))
    drive(recipe(), store)
    assert planned_stages(recipe("sft.epochs=2", "infer.top_p=0.5"), store)["dpo"] == ("due", "sft changed")


def test_the_reason_of_a_failed_stage_is_its_error(recipe: Callable[..., Recipe], store: Store) -> None:
    with pytest.raises(DivergedError):
        drive(recipe(), store, FakeExecutor(sft=fail(DivergedError("the loss became NaN"))))
    assert planned_stages(recipe(), store)["sft"] == ("due", "failed before: sft: the loss became NaN")


def test_a_deleted_artifact_is_a_reason(recipe: Callable[..., Recipe], store: Store) -> None:
    drive(recipe(), store)
    for manifest in Path(store.objects.root).glob("artifacts/merge/*/manifest.json"):
        manifest.unlink()
    assert planned_stages(recipe("name=small", "infer.top_p=0.5"), store)["merge"] == (
        "due",
        "its artifact was deleted from the store",
    )


def test_a_plan_changes_nothing(recipe: Callable[..., Recipe], store: Store) -> None:
    plan(recipe(), store)
    assert not Path(store.objects.root).exists()
