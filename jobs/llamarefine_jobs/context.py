"""What a stage's work function receives: recipe, inputs, output folder, store, and the log.

Everything around the work (arguments, signals, publishing, the exit code) is in entry.py.
"""

import contextlib
import os
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from llamarefine_jobs.contract.artifact import Manifest, Parent
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
    "trl",
    "peft",
    "datasets",
    "tokenizers",
    "safetensors",
    "unsloth",
    "bitsandbytes",
)


@dataclass
class Context:
    """What a stage's work is given."""

    stage: Stage
    recipe: Recipe
    store: Store
    key: str
    parents: dict[str, Manifest]
    inputs: dict[str, Path]  # parent -> folder with the parts that stages.py says this stage reads
    output: Path  # what is left here becomes the artifact
    work: Path  # for everything else; gone afterwards
    started_at: datetime
    stop: Stop  # once held, set by SIGTERM: finish the step, save, raise PreemptedError
    world: World = field(default_factory=World)  # the processes that train together, and which of them this one is
    backend: str | None = None
    accelerator: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)

    def note(self, text: str) -> None:
        """One line of the stage's log; of several processes the first one speaks."""
        if self.world.is_first:
            print(f"{self.stage.name}: {text}", flush=True)

    def progress(self, step: int, steps: int, **figures: Any) -> None:
        """Where the stage stands, as a line that people read and the launcher parses."""
        if self.world.is_first:
            print(Progress(self.stage.name, step, steps, **figures).line(), flush=True)

    def check_stop(self) -> None:
        """Raise PreemptedError once SIGTERM has come; for what takes long and would keep a checkpoint waiting."""
        if self.stop.is_set():
            raise PreemptedError(f"{self.stage.name} was told to stop")

    def fetch_checkpoint(self) -> Path | None:
        """The newest complete checkpoint of this very training, as a local folder that the node's processes share."""
        folder = (self.world.shared or self.work) / "resume"
        found = None
        if self.world.is_first_on_node:
            found = self.store.fetch_checkpoint(self.stage.name, self.key, folder)
        step = self.world.agreed(found)
        if step is None:
            return None
        self.note(f"goes on from the checkpoint at step {step}")
        return folder

    def publish(self) -> Manifest:
        """Publish `output` as the artifact, whatever signal comes; its checkpoints are not needed any more."""
        self.stop.defer_exit()
        missing = [name for name in self.stage.writes if not (self.output / name).exists()]
        if missing:
            raise AssertionError(f"{self.stage.name} did not write {', '.join(missing)}")
        manifest = self.store.publish(self.output, self.draft())
        if self.stage.has_checkpoints:
            self.store.remove_checkpoints(self.stage.name, self.key)
        return manifest

    def draft(self) -> Manifest:
        """The manifest of what is made here, as far as it is known now."""
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
            git_commit=os.environ.get("LLAMAREFINE_GIT_COMMIT"),
            image_digest=os.environ.get("LLAMAREFINE_IMAGE_DIGEST"),
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
