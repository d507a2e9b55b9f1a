"""A world: a recipe, its sources, and a store. One stays undisturbed; each trial gets a copy of its own."""

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
_TIMELESS = ("metrics", "gates", "examples")  # of a report, which also says when it was made and how long it took


def make(folder: Path) -> Path:
    """A world in which nothing ran yet."""
    folder.mkdir(parents=True)
    rows = made_up_rows(60)
    (folder / "recipe.yaml").write_text(_RECIPE.replace("SOURCES", str(folder)))  # the same files for every copy
    with (folder / "questions.csv").open("w", newline="") as into:
        csv.writer(into).writerows([("question", "answer"), *rows])
    pairs = [{"prompt": q, "chosen": a, "rejected": " ".join(a.split()[::-1])} for q, a in rows]
    (folder / "preferences.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def copy(undisturbed: Path, folder: Path, subject: str) -> Path:
    """A world as it stands before `subject` ran."""
    shutil.copytree(undisturbed, folder)
    stages = SEQUENCE[SEQUENCE.index(subject) :] if subject in SEQUENCE else SEQUENCE
    for stage in stages:
        shutil.rmtree(folder / "store" / "artifacts" / stage, ignore_errors=True)
    shutil.rmtree(folder / "store" / artifact_path(samples.STAGE, samples.KEY), ignore_errors=True)
    return folder


def recipe_of(world: Path) -> Recipe:
    """The world's recipe, pinned."""
    return pin(load_recipe(world / "recipe.yaml", ()))


def manifests(world: Path, subject: str) -> dict[str, Manifest]:
    """What stands for `subject` and all before it; an IntegrityError, or a KeyError that names who is missing."""
    store = Store(str(world / "store"))
    if subject == "store":
        found = store.manifest(samples.STAGE, samples.KEY)
        if found is None:
            raise KeyError(subject)
        return {subject: found}
    recipe, standing = recipe_of(world), {}
    for stage in SEQUENCE[: SEQUENCE.index(subject) + 1]:
        parents = {name: standing[name] for name in STAGES[stage].reads}
        manifest = store.manifest(stage, artifact_key(stage, recipe, parents))
        if manifest is None:
            raise KeyError(stage)
        standing[stage] = manifest
    return standing


def verify(world: Path, subject: str) -> IntegrityError | None:
    """Every byte of `subject` and of what it was made from, compared with the manifests."""
    store = Store(str(world / "store"))
    try:
        for manifest in manifests(world, subject).values():
            store.verify(manifest)
    except IntegrityError as error:
        return error
    return None


def digests(world: Path, subject: str) -> dict[str, str]:
    """What each stage up to `subject` made, as one sha256 each."""
    return {stage: _digest(world, stage, manifest) for stage, manifest in manifests(world, subject).items()}


def _digest(world: Path, stage: str, manifest: Manifest) -> str:
    if stage != "evaluate":
        return manifest.content_sha256()
    report = json.loads((world / "store" / manifest.folder / "report.json").read_text())
    timeless = {name: report[name] for name in _TIMELESS}
    return hashlib.sha256(json.dumps(timeless, sort_keys=True).encode()).hexdigest()
