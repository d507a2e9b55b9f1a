"""A key covers everything in the recipe that its artifact depends on: other fields change no byte of the artifact.

Each stage runs twice from the same parents: first with RECIPE, then with a recipe in which every field that is not in
the stage's key has another value. Fields that the stage does not read get a value that no stage can work with.
tests/contract/test_keys.py tests the other direction: every field of a section is in the key, or declared outside.
"""

import importlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from llamarefine_jobs import entry
from llamarefine_jobs.context import Context
from llamarefine_jobs.contract.artifact import Manifest, artifact_key
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.stages import SEQUENCE, STAGES
from llamarefine_jobs.process.sigterm import Stop
from llamarefine_jobs.recipe_file import parse_recipe
from llamarefine_jobs.sources.pinning import pin
from llamarefine_jobs.store import Store

RECIPE = """\
name: keys
seed: 5
cpu_threads: 1
max_length_tokens: 192
prepare:
  base: {source: tiny-llama, tiny: {hidden_size: 32, intermediate_size: 64, layers: 1, vocabulary: 512, steps: 10}}
  questions: {source: python-docstrings}
  preferences: {source: python-docstrings}
  max_rows: 160
sft: {max_steps: 6, learning_rate: 0.01, micro_batch_rows: 4, batch_rows: 8, lora: {rank: 4}}
dpo: {max_steps: 6, learning_rate: 0.01, micro_batch_rows: 4, batch_rows: 8, lora: {rank: 4}}
evaluate: {generated_rows: 2, max_new_tokens: 4, bootstrap_resamples: 50}
"""

# Fields outside the key that a training reads, with another value than in RECIPE.
OTHER_VALUES = {
    "checkpoint_every_s": 1,
    "checkpoint_every_steps": 2,
    "log_every_steps": 2,
    "on_out_of_memory": "halve_micro_batch",
}
UNUSABLE = "not a value of this field"

# Fields that keep their value here, with the reason.
NOT_CHANGED = {
    "backend": "changes the rounding of a sum; test_sft.py compares the adapters with a tolerance",
    "micro_batch_rows": "changes the rounding of a sum; test_sft.py compares the adapters with a tolerance",
    "gpus": "needs several processes; tests/jobs/process/test_world.py compares the adapters with a tolerance",
    "nodes": "needs several processes; tests/jobs/process/test_world.py compares the adapters with a tolerance",
    "source": "a source is identified by its fingerprint; data card, adapter and model card name the address of the "
    "source as the first run knew it",
    "revision": "the model card names the revision as the first run knew it",
}

# Parts of a manifest's metrics that record how the run went, not what was made.
RECORDS_OF_THE_RUN = {
    "generation",
    "peak_memory_bytes",
    "proof_s",
    "seconds",
    "sum_peak_memory_bytes",
    "sum_s",
    "tokens_per_s",
    "train_seconds",
}
# The last logged training loss depends on the steps at which the losses are logged.
RECORDS_OF_THE_LOG = {"train_loss"}
# The report holds the name, time, store and recipe of the run that first made it.
RECORDS_IN_THE_REPORT = {"made_at", "name", "recipe", "store"}


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return pin(parse_recipe(RECIPE, "keys"))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(str(tmp_path_factory.mktemp("keys") / "store"))


@pytest.fixture(scope="module")
def manifests(recipe: Recipe, store: Store) -> dict[str, Manifest]:
    """Run every stage of RECIPE; return the manifests."""
    return {stage: entry.run(stage, work_of(stage), recipe, store) for stage in SEQUENCE}


# evaluate writes the unusable values into its report, about which pydantic warns.
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("stage", SEQUENCE)
def test_fields_outside_the_key_change_no_byte_of_the_artifact(
    stage: str, recipe: Recipe, store: Store, manifests: dict[str, Manifest], tmp_path: Path
) -> None:
    other = with_other_fields_changed(recipe, stage)
    parents = {name: manifests[name] for name in STAGES[stage].reads}
    assert artifact_key(stage, other, parents) == manifests[stage].key

    context = run(stage, other, parents, store, tmp_path)

    expected = {file.path: store.read(f"{manifests[stage].folder}/{file.path}") for file in manifests[stage].files}
    found = {
        path.relative_to(context.output).as_posix(): path.read_bytes()
        for path in context.output.rglob("*")
        if path.is_file()
    }
    assert found.keys() == expected.keys()
    differing = {path for path in found if found[path] != expected[path]}
    if stage == "evaluate":  # the two pages are drawn from report.json
        assert report_without_records(found["report.json"]) == report_without_records(expected["report.json"])
        differing -= set(STAGES["evaluate"].writes)
    assert differing == set()
    assert without_records(context.metrics) == without_records(manifests[stage].metrics)


def test_every_recipe_field_is_in_a_key_or_changed_or_named_as_an_exception(recipe: Recipe) -> None:
    for stage in SEQUENCE:
        before, after = (dict(leaves(one)) for one in (recipe, with_other_fields_changed(recipe, stage)))
        assert len(before) > 60
        covered = paths_in_key(recipe, stage)
        assert covered <= before.keys()
        for path, value in before.items():
            in_one_group = (path in covered, after[path] != value, path not in covered and path[-1] in NOT_CHANGED)
            assert sum(in_one_group) == 1, f"{stage}: {'.'.join(path)}"


def work_of(stage: str) -> entry.Work:
    work: entry.Work = importlib.import_module(STAGES[stage].module).work
    return work


def run(stage: str, recipe: Recipe, parents: dict[str, Manifest], store: Store, folder: Path) -> Context:
    """Do the work of `stage` with parents that may have been made from another recipe; nothing is published."""
    (folder / "output").mkdir()
    context = Context(
        stage=STAGES[stage],
        recipe=recipe,
        store=Store(str(folder / "store")),
        key=artifact_key(stage, recipe, parents),
        parents=parents,
        inputs=entry.fetch_inputs(STAGES[stage], parents, store, folder / "inputs"),
        output=folder / "output",
        work=folder,
        started_at=datetime.now(UTC),
        stop=Stop(),
    )
    with entry.seeded_threads(recipe):
        work_of(stage)(context)
    return context


def with_other_fields_changed(recipe: Recipe, stage: str) -> Recipe:
    """Return the recipe with another value in every field that is neither in the key of `stage` nor in NOT_CHANGED."""
    covered = paths_in_key(recipe, stage)
    for path, value in leaves(recipe):
        if path not in covered and path[-1] not in NOT_CHANGED:
            own = path[0] == stage and path[-1] in OTHER_VALUES
            other = OTHER_VALUES[path[-1]] if own else UNUSABLE
            assert other != value
            recipe = replaced(recipe, path, other)
    return recipe


def paths_in_key(recipe: Recipe, stage: str) -> set[tuple[str, ...]]:
    """Return the path of every field whose value is in the key of `stage`."""

    def paths(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        if isinstance(value, dict):
            for name, item in value.items():
                yield from paths(item, (*path, name))
        else:
            yield path

    return {path[path[0] == "common" :] for path in paths(recipe.key_payload(stage), ())}


def leaves(section: BaseModel, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield path and value of every field in a section and in the sections below it."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        yield from leaves(value, (*path, name)) if isinstance(value, BaseModel) else [((*path, name), value)]


def replaced(section: Any, path: tuple[str, ...], value: Any) -> Any:
    """Return the section with another value at `path`, without validation."""
    name, *below = path
    return section.model_copy(update={name: replaced(getattr(section, name), tuple(below), value) if below else value})


def without_records(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return the metrics as JSON values, without those that record the run and its log."""
    kept = {}
    for name, value in json.loads(json.dumps(metrics)).items():
        if name == "history":
            kept[name] = [row for row in value if "eval_loss" in row]
        elif name not in RECORDS_OF_THE_RUN | RECORDS_OF_THE_LOG:
            kept[name] = without_records(value) if isinstance(value, dict) else value
    return kept


def report_without_records(data: bytes | None) -> dict[str, Any]:
    assert data
    report = {name: value for name, value in json.loads(data).items() if name not in RECORDS_IN_THE_REPORT}
    return report | {"stages": [without_records(line) for line in report["stages"]]}
