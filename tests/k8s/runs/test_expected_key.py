"""A stage makes only what its driver asked for: with another recipe than the driver's, it refuses at its start."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llamarefine_jobs.contract.artifact import artifact_key
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.stages import SEQUENCE
from llamarefine_jobs.recipe_file import to_yaml
from llamarefine_jobs.store import Store
from tests.k8s import acting


def run_stage(stage: str, recipe: Recipe, store: Store, expected: str) -> tuple[int, str]:
    """Run an acting stage as a pod does; return exit code and last line."""
    Path("mounted.yaml").write_text(to_yaml(recipe))
    command = [sys.executable, acting.__file__, stage, "--recipe", "mounted.yaml", "--store", store.uri]
    done = subprocess.run(
        command, env=os.environ | {"LLAMAREFINE_EXPECTED_KEY": expected}, capture_output=True, text=True, check=False
    )
    return done.returncode, (done.stderr or done.stdout).splitlines()[-1]


@pytest.fixture
def keys(recipe: Callable[..., Recipe], store: Store) -> dict[str, str]:
    """The key of each stage, of which prepare and sft are made."""
    made = {stage: acting.publish(stage, recipe(), store) for stage in ("prepare", "sft")}
    dpo = artifact_key("dpo", recipe(), {"prepare": made["prepare"], "sft": made["sft"]})
    return {stage: manifest.key for stage, manifest in made.items()} | {"dpo": dpo}


def test_a_stage_with_its_drivers_recipe_makes_what_the_driver_expects(
    recipe: Callable[..., Recipe], store: Store, keys: dict[str, str]
) -> None:
    assert run_stage("dpo", recipe(), store, keys["dpo"])[0] == 0
    assert store.manifest("dpo", keys["dpo"])


@pytest.mark.parametrize(
    ("edit", "found"),
    [
        ("dpo.epochs=3", "its own key is"),  # of the stage itself
        ("sft.epochs=3", "dpo needs the artifact of sft"),  # of a parent, which was made with the driver's recipe
        ("seed=3", "dpo needs the artifact of prepare"),
    ],
)
def test_a_stage_with_an_edited_recipe_refuses_before_it_works(
    recipe: Callable[..., Recipe], store: Store, keys: dict[str, str], edit: str, found: str
) -> None:
    before = [entry.path for entry in store.entries("")]
    code, line = run_stage("dpo", recipe(edit), store, keys["dpo"])
    assert code == 10
    assert f"which expects the key {keys['dpo'][:12]}: {found}" in line
    assert "was the run's ConfigMap replaced" in line
    assert [entry.path for entry in store.entries("")] == before


def test_an_edit_that_changes_nothing_that_the_stage_makes_is_no_reason_to_refuse(
    recipe: Callable[..., Recipe], store: Store, keys: dict[str, str]
) -> None:
    assert set(keys) < set(SEQUENCE)
    assert run_stage("dpo", recipe("evaluate.confidence=0.9"), store, keys["dpo"])[0] == 0
