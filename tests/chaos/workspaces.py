"""Workspaces: a recipe, its sources and a store in one folder. Each trial gets a copy of the undisturbed one."""

import csv
import hashlib
import json
import shutil
from pathlib import Path

from llamarefine_jobs.contract.artifact import Manifest, artifact_key, artifact_path
from llamarefine_jobs.contract.errors import IntegrityError
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.stages import SEQUENCE, STAGES
from llamarefine_jobs.recipe_file import load_recipe
from llamarefine_jobs.sources.pinning import pin
from llamarefine_jobs.store import Store
from tests.jobs.tiny import made_up_rows
from tests.store import samples

_RECIPE = """\
name: chaos
seed: 5
cpu_threads: 1
max_length_tokens: 160
prepare:
  base: {source: tiny-llama, tiny: {hidden_size: 16, intermediate_size: 32, layers: 2, heads: 2, vocabulary: 320, steps: 3}}
  questions: {source: SOURCES/questions.csv}
  preferences: {source: SOURCES/preferences.jsonl}
  validation_fraction: 0.15
  test_fraction: 0.15
sft: {max_steps: 12, learning_rate: 0.02, micro_batch_rows: 4, batch_rows: 4, log_every_steps: 1,
      checkpoint_every_steps: 3, lora: {rank: 4}}
dpo: {max_steps: 12, learning_rate: 0.002, micro_batch_rows: 4, batch_rows: 4, log_every_steps: 1,
      checkpoint_every_steps: 3, lora: {rank: 4}}
evaluate: {generated_rows: 2, max_new_tokens: 4, bootstrap_resamples: 100}
"""  # noqa: E501
_COMPARED = ("metrics", "gates", "examples")  # the parts of a report without times and durations


def create(folder: Path) -> Path:
    """Create a workspace in which no stage has run."""
    folder.mkdir(parents=True)
    rows = made_up_rows(60)
    (folder / "recipe.yaml").write_text(_RECIPE.replace("SOURCES", str(folder)))  # every copy reads the same files
    with (folder / "questions.csv").open("w", newline="") as into:
        csv.writer(into).writerows([("question", "answer"), *rows])
    pairs = [{"prompt": q, "chosen": a, "rejected": " ".join(a.split()[::-1])} for q, a in rows]
    (folder / "preferences.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def copy(undisturbed: Path, folder: Path, subject: str) -> Path:
    """Copy a workspace without the artifacts of `subject` and of the stages after it."""
    shutil.copytree(undisturbed, folder)
    stages = SEQUENCE[SEQUENCE.index(subject) :] if subject in SEQUENCE else SEQUENCE
    for stage in stages:
        shutil.rmtree(folder / "store" / "artifacts" / stage, ignore_errors=True)
    shutil.rmtree(folder / "store" / artifact_path(samples.STAGE, samples.KEY), ignore_errors=True)
    return folder


def recipe_of(workspace: Path) -> Recipe:
    """Return the workspace's recipe, pinned."""
    return pin(load_recipe(workspace / "recipe.yaml", ()))


def manifests(workspace: Path, subject: str) -> dict[str, Manifest]:
    """Return the manifests of `subject` and of every stage before it.

    Raises IntegrityError for a damaged manifest, and KeyError with the name of a stage whose artifact is missing.
    """
    store = Store(str(workspace / "store"))
    if subject == "store":
        found = store.manifest(samples.STAGE, samples.KEY)
        if found is None:
            raise KeyError(subject)
        return {subject: found}
    recipe, published = recipe_of(workspace), {}
    for stage in SEQUENCE[: SEQUENCE.index(subject) + 1]:
        parents = {name: published[name] for name in STAGES[stage].reads}
        manifest = store.manifest(stage, artifact_key(stage, recipe, parents))
        if manifest is None:
            raise KeyError(stage)
        published[stage] = manifest
    return published


def verify(workspace: Path, subject: str) -> IntegrityError | None:
    """Compare every file of `subject` and of the stages before it with the manifests; return the first error."""
    store = Store(str(workspace / "store"))
    try:
        for manifest in manifests(workspace, subject).values():
            store.verify(manifest)
    except IntegrityError as error:
        return error
    return None


def digests(workspace: Path, subject: str) -> dict[str, str]:
    """Return one sha256 for the artifact of each stage up to `subject`."""
    return {stage: _digest(workspace, stage, manifest) for stage, manifest in manifests(workspace, subject).items()}


def _digest(workspace: Path, stage: str, manifest: Manifest) -> str:
    if stage != "evaluate":
        return manifest.content_sha256()
    report = json.loads((workspace / "store" / manifest.folder / "report.json").read_text())
    compared = {name: report[name] for name in _COMPARED}
    return hashlib.sha256(json.dumps(compared, sort_keys=True).encode()).hexdigest()
