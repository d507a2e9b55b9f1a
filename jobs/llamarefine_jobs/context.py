"""Inputs and services that a stage's work function receives: recipe, inputs, output folder, store, log.

Arguments, signals, publishing and the exit code are handled by entry.py, around the work.
"""

import contextlib
import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from llamarefine_jobs.contract.artifact import Manifest, Parent
from llamarefine_jobs.contract.environment import GIT_COMMIT, IMAGE_DIGEST
from llamarefine_jobs.contract.errors import PreemptedError
from llamarefine_jobs.contract.progress import Progress
from llamarefine_jobs.contract.prompt import TEMPLATE_SHA256
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.stages import Stage
from llamarefine_jobs.contract.version import __version__
from llamarefine_jobs.process.sigterm import Stop
from llamarefine_jobs.process.world import World
from llamarefine_jobs.store import Store

_LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "tokenizers",
    "safetensors",
    "unsloth",
    "bitsandbytes",
)


@dataclass
class Context:
    """Inputs and services that a stage's work function receives."""

    stage: Stage
    recipe: Recipe
    store: Store
    key: str
    parents: dict[str, Manifest]
    inputs: dict[str, Path]  # parent -> folder with the parts that the stage reads, as stages.py lists them
    output: Path  # files left here become the artifact
    work: Path  # for all other files; removed afterwards
    started_at: datetime
    stop: Stop  # after `defer_exit`, set by SIGTERM: finish the step, save, raise PreemptedError
    world: World = field(default_factory=World)  # the processes that train together, and the rank of this one
    backend: str | None = None
    accelerator: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)

    def note(self, text: str) -> None:
        """Print one line to the stage's log. Of several processes only rank 0 prints."""
        if self.world.is_first:
            print(f"{self.stage.name}: {text}", flush=True)

    def progress(self, step: int, steps: int, **figures: Any) -> None:
        """Print a progress line, which people read and the launcher parses. Of several processes only rank 0 prints."""
        if self.world.is_first:
            print(Progress(self.stage.name, step, steps, **figures).line(), flush=True)

    def check_stop(self) -> None:
        """Raise PreemptedError if SIGTERM has arrived. Long work calls this, so that it does not delay a checkpoint."""
        if self.stop.is_set():
            raise PreemptedError(f"{self.stage.name} was stopped by SIGTERM")

    def fetch_checkpoint(self) -> Path | None:
        """Download the newest complete checkpoint of this key; return its folder, shared by the node, or None."""
        folder = (self.world.shared or self.work) / "resume"
        found = None
        if self.world.is_first_on_node:
            found = self.store.fetch_checkpoint(self.stage.name, self.key, folder)
        step = self.world.agree_on_checkpoint(found)
        if step is None:
            return None
        self.note(f"resumes from the checkpoint at step {step}")
        return folder

    def publish(self) -> Manifest:
        """Publish `output` as the artifact and remove its checkpoints. SIGTERM no longer ends the process."""
        self.stop.defer_exit()
        missing = [name for name in self.stage.writes if not (self.output / name).exists()]
        if missing:
            raise AssertionError(f"{self.stage.name} did not write {', '.join(missing)}")
        self.store.retry_policy.restart_outage()  # after failed checkpoints, too: what was trained exists only here
        manifest = self.store.publish(self.output, self.draft())
        if self.stage.has_checkpoints:
            self.store.remove_checkpoints(self.stage.name, self.key)
        return manifest

    def draft(self) -> Manifest:
        """Return the manifest of this artifact without its files, with the metrics so far; checkpoints use it, too."""
        return Manifest(
            stage=self.stage.name,
            key=self.key,
            parents={
                name: Parent(key=parent.key, manifest_sha256=parent.sha256()) for name, parent in self.parents.items()
            },
            recipe=self.recipe.key_payload(self.stage.name),
            seed=self.recipe.seed,
            prompt_template_sha256=TEMPLATE_SHA256,
            package_version=__version__,
            git_commit=os.environ.get(GIT_COMMIT),
            image_digest=os.environ.get(IMAGE_DIGEST),
            libraries=_versions(),
            backend=self.backend,
            accelerator=self.accelerator,
            started_at=self.started_at,
            finished_at=datetime.now(UTC),
            metrics=self.metrics,
        )


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
