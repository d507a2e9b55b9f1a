"""The plan of a recipe: which stages are in the store, which would run, and why."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from llamarefine_jobs.contract.artifact import MANIFEST, Manifest, artifact_key, checkpoint_path
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.stages import SEQUENCE, STAGES
from llamarefine_jobs.contract.version import __version__
from llamarefine_jobs.store import Store
from llamarefine_k8s.runs.records import RunRecord, all_runs, run_id

_LATEST = 20  # how many of the newest runs of the recipe's name are read


@dataclass(frozen=True)
class PlannedStage:
    """One stage of a plan. A stage whose parents are due has no key yet, because its key depends on their artifacts."""

    stage: str
    state: Literal["there", "due", "follows"]
    key: str | None
    reasons: tuple[str, ...]
    took_s: float | None = None  # in the newest run of the recipe's name that ran the stage, including time in a queue


def plan(recipe: Recipe, store: Store) -> list[PlannedStage]:
    """Return what `Pipeline.drive` would do for a pinned recipe. Reads manifests and records, no other files."""
    candidates = all_runs(store, beginning=f"{recipe.name}-", limit=_LATEST)
    runs = [record for record in candidates if record.run.rpartition("-")[0] == recipe.name]
    this_run = next((record for record in runs if record.run == run_id(recipe)), None)
    last = next((record for record in runs if record is not this_run), None)
    found: dict[str, Manifest] = {}
    planned: list[PlannedStage] = []
    for stage in SEQUENCE:
        due_parents = [name for name in STAGES[stage].reads if name not in found]
        reasons: tuple[str, ...]
        changes = tuple(_changes(stage, recipe, last)) if last else ()
        if due_parents:
            reasons = changes or (f"runs after {due_parents[-1]}",)
            planned.append(PlannedStage(stage, "follows", None, reasons, _took_s(stage, runs)))
            continue
        key = artifact_key(stage, recipe, found)
        manifest = store.manifest(stage, key)
        if manifest:
            found[stage] = manifest
            planned.append(PlannedStage(stage, "there", key, (f"made {manifest.finished_at:%Y-%m-%d %H:%M} UTC",)))
        else:
            reasons = _earlier_attempt(stage, key, this_run, store) or changes or _other_parents(stage, found, last)
            reasons = reasons or (_missing_reason(key, last),)
            planned.append(PlannedStage(stage, "due", key, reasons, _took_s(stage, runs)))
    return planned


def newest_checkpoint(store: Store, stage: str, key: str) -> int | None:
    """Return the step of a training's newest complete checkpoint; None if it has none."""
    prefix = f"{checkpoint_path(stage, key)}/"
    complete = [entry.path for entry in store.entries(prefix) if entry.path.endswith(f"/{MANIFEST}")]
    return max((int(path[len(prefix) :].split("/")[0]) for path in complete), default=None)


def _changes(stage: str, recipe: Recipe, last: RunRecord) -> Iterator[str]:
    """Yield the differences from the last run of the same name in everything that the stage's key depends on."""
    if last.package_version != __version__:
        yield f"llamarefine {last.package_version} → {__version__}"
    try:
        before = Recipe.model_validate(last.recipe)
    except ValidationError:
        yield "the last run's recipe is from another version"
        return
    old, new = (dict(_flat(each.key_payload(stage))) for each in (before, recipe))
    for name in sorted(old | new):
        if old.get(name) == new.get(name):
            continue
        shown = name.removeprefix("common.")
        if name.endswith(".fingerprint"):
            yield f"{shown.removesuffix('.fingerprint')} has different content"
        elif name.endswith(".source") and None in (old.get(name), new.get(name)):
            continue  # reported through its fingerprint
        else:
            yield f"{shown} {_text(old.get(name))} → {_text(new.get(name))}"


def _earlier_attempt(stage: str, key: str, this_run: RunRecord | None, store: Store) -> tuple[str, ...]:
    """Return how an earlier drive of the same run left the stage: a checkpoint, a failure, an interruption."""
    step = newest_checkpoint(store, stage, key) if STAGES[stage].has_checkpoints else None
    if step is not None:
        return (f"resumes from the checkpoint at step {step}",)
    record = this_run.stages.get(stage) if this_run else None
    if not record or record.state not in ("failed", "interrupted"):
        return ()
    return (f"failed before: {record.error}" if record.error else "was interrupted",)


def _other_parents(stage: str, found: Mapping[str, Manifest], last: RunRecord | None) -> tuple[str, ...]:
    """Return which parents have another artifact than in the last run."""
    if not last:
        return ()
    others = [name for name in STAGES[stage].reads if name in last.stages and last.stages[name].key != found[name].key]
    return (f"{' and '.join(others)} changed",) if others else ()


def _missing_reason(key: str, last: RunRecord | None) -> str:
    """Return why the store has no artifact with this key although nothing changed."""
    stages = last.stages.values() if last else ()
    existed = any(stage.key == key and stage.state in ("done", "reused") for stage in stages)
    return "its artifact was deleted from the store" if existed else "never ran"


def _took_s(stage: str, runs: Sequence[RunRecord]) -> float | None:
    """Return how long the stage took in the newest run that ran it to its end."""
    for record in runs:
        ran = record.stages.get(stage)
        if ran and ran.state == "done" and ran.started_at and ran.finished_at:
            return (ran.finished_at - ran.started_at).total_seconds()
    return None


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield nested values by their dotted keys."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _text(value: Any) -> str:
    match value:
        case None:
            return "null"
        case list():
            return "[" + ", ".join(str(item) if not isinstance(item, dict) else "…" for item in value) + "]"
        case float():
            return f"{value:g}"
        case _:
            return str(value)
