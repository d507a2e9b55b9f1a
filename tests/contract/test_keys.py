"""Same key, same result: a key changes with everything that can change a stage's result, and with nothing else."""

import hashlib
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import BaseModel

from llamarefine_jobs.contract.artifact import File, Manifest, Parent, artifact_key
from llamarefine_jobs.contract.prompt import TEMPLATE_SHA256
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.stages import SEQUENCE, STAGES

RECIPE = Recipe.model_validate(
    {"name": "keys", "prepare": {"questions": {"source": "a.csv"}, "preferences": {"source": "b.jsonl"}}}
)
NOT_IN_KEY = {
    "backend",
    "gpus",
    "nodes",
    "checkpoint_every_s",
    "checkpoint_every_steps",
    "log_every_steps",
    "micro_batch_rows",
    "on_out_of_memory",
}


def manifest_of(stage: str, key: str, content: dict[str, str], parents: dict[str, Manifest]) -> Manifest:
    """Return the manifest of a stage that made a file with the given text in each part."""
    now = datetime.now(UTC)
    return Manifest(
        stage=stage,
        key=key,
        files=tuple(
            File(
                path=f"{part}file" if part.endswith("/") else part,
                size_bytes=len(text),
                sha256=hashlib.sha256(text.encode()).hexdigest(),
            )
            for part, text in content.items()
        ),
        parents={name: Parent(key=parent.key, manifest_sha256=parent.sha256()) for name, parent in parents.items()},
        recipe={},
        seed=1,
        prompt_template_sha256=TEMPLATE_SHA256,
        package_version="0.1.0",
        started_at=now,
        finished_at=now,
    )


def run(recipe: Recipe, **prepared: str) -> dict[str, str]:
    """Return every stage's key. The text of a stage's files is its key, or `prepared` for parts with these names."""
    manifests: dict[str, Manifest] = {}
    for stage in STAGES.values():
        parents = {name: manifests[name] for name in stage.reads}
        key = artifact_key(stage.name, recipe, parents)
        content = {part: prepared.get(part.strip("/"), key) for part in stage.writes}
        manifests[stage.name] = manifest_of(stage.name, key, content, parents)
    return {name: manifest.key for name, manifest in manifests.items()}


def changed(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Return the stages whose keys differ."""
    return [stage for stage in SEQUENCE if before[stage] != after[stage]]


def leaves(section: BaseModel, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of every value in a section."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        yield from leaves(value, (*path, name)) if isinstance(value, BaseModel) else [(*path, name)]


def replaced(section: BaseModel, path: tuple[str, ...], value: Any) -> Any:
    """Return the section with another value at `path`, without validation."""
    name, *below = path
    return section.model_copy(update={name: replaced(getattr(section, name), tuple(below), value) if below else value})


PREPARED = {"base": "b", "questions": "q", "preferences": "p", "data_card.json": "c"}


def test_the_same_recipe_has_the_same_keys() -> None:
    assert run(RECIPE) == run(Recipe.model_validate(RECIPE.model_dump()))


def test_another_beta_runs_dpo_merge_and_evaluate_again() -> None:
    other = replaced(RECIPE, ("dpo", "beta"), 0.2)
    assert changed(run(RECIPE), run(other)) == ["dpo", "merge", "evaluate"]


@pytest.mark.parametrize(
    ("path", "value", "stages"),
    [
        (("prepare", "max_rows"), 10, ["prepare", "sft", "dpo", "merge", "evaluate"]),
        (("sft", "epochs"), 3.0, ["sft", "dpo", "merge", "evaluate"]),
        (("sft", "lora", "rank"), 4, ["sft", "dpo", "merge", "evaluate"]),
        (("merge", "dtype"), "float32", ["merge", "evaluate"]),
        (("evaluate", "generated_rows"), 3, ["evaluate"]),
        (("infer", "temperature"), 1.0, []),
        (("seed",), 7, ["prepare", "sft", "dpo", "merge", "evaluate"]),
        (("name",), "another", []),
    ],
)
def test_a_changed_value_runs_its_stage_and_later_ones_again(
    path: tuple[str, ...], value: Any, stages: list[str]
) -> None:
    assert changed(run(RECIPE), run(replaced(RECIPE, path, value))) == stages


@pytest.mark.parametrize("stage", STAGES)
def test_every_value_of_a_section_is_in_the_key_or_listed_as_not_in_it(stage: str) -> None:
    paths = list(leaves(RECIPE.section(stage)))
    assert paths
    parents = {name: manifest_of(name, "0" * 64, PREPARED, {}) for name in STAGES[stage].reads}
    before = artifact_key(stage, RECIPE, parents)
    for path in paths:
        after = artifact_key(stage, replaced(RECIPE, (stage, *path), "something else"), parents)
        assert (after == before) == (path[-1] in NOT_IN_KEY), f"{stage}.{'.'.join(path)}"


def test_with_a_fingerprint_a_sources_location_is_not_in_the_key() -> None:
    def with_questions(source: str, fingerprint: str | None) -> str:
        questions = RECIPE.prepare.questions.model_copy(update={"source": source, "fingerprint": fingerprint})
        return run(RECIPE.with_sources({"questions": questions}))["prepare"]

    assert with_questions("a.csv", None) != with_questions("b.csv", None)
    assert with_questions("a.csv", "sha256:1") == with_questions("b.csv", "sha256:1")
    assert with_questions("a.csv", "sha256:1") != with_questions("a.csv", "sha256:2")


def test_new_preferences_do_not_train_sft_again() -> None:
    before, after = run(RECIPE, **PREPARED), run(RECIPE, **PREPARED | {"preferences": "other pairs"})
    assert changed(before, after) == ["dpo", "merge", "evaluate"]


def test_a_parent_made_again_with_the_same_bytes_does_not_change_the_key() -> None:
    """The parent's new manifest has another attempt, other times and other metrics, but the same files."""
    parent = manifest_of("prepare", "1" * 64, PREPARED, {})
    again = parent.model_copy(update={"attempt": "another", "finished_at": datetime.now(UTC), "metrics": {"rows": 3}})
    assert parent.sha256() != again.sha256()
    assert artifact_key("sft", RECIPE, {"prepare": parent}) == artifact_key("sft", RECIPE, {"prepare": again})


def test_package_version_and_chat_template_are_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = artifact_key("prepare", RECIPE, {})
    for name in ("__version__", "TEMPLATE_SHA256"):
        with monkeypatch.context() as patched:
            patched.setattr(f"llamarefine_jobs.contract.artifact.{name}", "another")
            assert artifact_key("prepare", RECIPE, {}) != before
