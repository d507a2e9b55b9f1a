"""What every stage does around its work: arguments, seed, SIGTERM, progress, publishing, the exit code.

A stage needs a recipe and a store, nothing else: it finds its parents by their keys, so
``python -m llamarefine_jobs.sft --recipe recipe.yaml --store s3://bucket/prefix`` runs alone.
"""

import argparse
import contextlib
import logging
import os
import random
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from llamarefine_jobs import __version__, distributed, sources, stopping
from llamarefine_jobs.agent import find_agent
from llamarefine_jobs.contract.artifact import Manifest, Parent, artifact_key, short
from llamarefine_jobs.contract.errors import (
    DataError,
    DiskFullError,
    IntegrityError,
    LlamaRefineError,
    PeerLostError,
    PreemptedError,
    first_line,
    from_os_error,
)
from llamarefine_jobs.contract.patience import of_a_stage
from llamarefine_jobs.contract.progress import Progress
from llamarefine_jobs.contract.prompt import TEMPLATE_SHA256
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.stages import STAGES, Stage
from llamarefine_jobs.discretion import be_discreet
from llamarefine_jobs.distributed import World
from llamarefine_jobs.out_of_memory import described, halving_micro_batches, is_out_of_memory, recall
from llamarefine_jobs.recipe_file import load_recipe
from llamarefine_jobs.screen import clean
from llamarefine_jobs.stopping import Stop
from llamarefine_jobs.store import Store

# The last is torch's, when what it wrote last is not in the file.
_DISK_FULL = re.compile(r"No space left on device|File too large|Disk quota exceeded|unexpected pos \d+ vs \d+")
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
        self.stop.hold()
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


Work = Callable[[Context], None]


def main(stage_name: str, work: Work) -> None:
    """Run one stage as a process: parse its arguments, do its work, exit with its code."""
    parser = argparse.ArgumentParser(
        prog=f"python -m llamarefine_jobs.{stage_name}",
        description=f"Run the stage {stage_name}: read its parents from the store, publish its artifact there.",
    )
    parser.add_argument("--recipe", type=Path, required=True, help="the recipe, a YAML file")
    parser.add_argument("--store", required=True, help="file:///folder or s3://bucket/prefix")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="on top of the recipe; may repeat"
    )
    options = parser.parse_args()
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries, read when tqdm is imported; progress is ours
    with stopping.closed_at_the_end(), exit_code(stage_name):
        recipe = sources.pin(load_recipe(options.recipe, options.set), check=stage_name == "prepare")
        run(stage_name, work, recipe, open_store(stage_name, options.store))


def open_store(stage_name: str, uri: str) -> Store:
    """The store of a stage, which waits out a bucket's outage and says so."""
    return Store(uri, of_a_stage(stage_name))


def run(stage_name: str, work: Work, recipe: Recipe, store: Store) -> Manifest:
    """Do the work of one stage and publish it; what is there already is returned as it is."""
    stage = STAGES[stage_name]
    stop = stopping.listen()
    stop.stage = stage_name
    stopping.stop_with_launcher()
    parents = find_parents(stage_name, recipe, store)
    key = artifact_key(stage_name, recipe, parents)
    standing = store.manifest(stage_name, key)
    if standing is not None:
        print(f"{stage_name}: {short(key)} is in the store already; nothing to do", flush=True)
        return standing
    recipe = recall(stage_name, recipe, store, key)
    with (
        halving_micro_batches(stage_name, recipe),
        tempfile.TemporaryDirectory(
            prefix=f"llamarefine-{stage_name}-", dir=os.environ.get("LLAMAREFINE_WORK")
        ) as folder,
    ):
        stop.litter = work_folder = Path(folder)
        output = work_folder / "output"
        output.mkdir()
        context = Context(
            stage=stage,
            recipe=recipe,
            store=store,
            key=key,
            parents=parents,
            inputs=fetch_inputs(stage, parents, store, work_folder / "inputs"),
            output=output,
            work=work_folder,
            started_at=datetime.now(UTC),
            stop=stop,
        )
        context.note(f"makes {short(key)} from " + (_names(parents) or "the recipe's sources"))
        agent = find_agent(stage_name, recipe, work_folder)
        if agent is None:
            with settled_threads(recipe):
                work(context)
        else:
            stop.hold()  # its processes may have something to save: what they answer is the answer
            outcome = agent.work(recipe, store.uri, stop)
            if not agent.node.is_first:
                return agent.await_publication(store, key, stop)
            context.backend, context.accelerator = outcome["backend"], outcome["accelerator"]
            context.metrics |= outcome["metrics"]
        manifest = context.publish()
        seconds = (manifest.finished_at - manifest.started_at).total_seconds()
        context.note(f"published {short(key)}, {len(manifest.files)} files, after {seconds:.0f} s")
        return manifest


def find_parents(
    stage_name: str, recipe: Recipe, store: Store, names: Iterable[str] | None = None
) -> dict[str, Manifest]:
    """The manifests of a stage's parents, or of those `names` among them, found by their keys."""
    found: dict[str, Manifest] = {}
    for name in names or STAGES[stage_name].reads:
        key = artifact_key(name, recipe, find_parents(name, recipe, store))
        manifest = store.manifest(name, key)
        if manifest is None:
            raise DataError(
                f"{stage_name} needs the artifact of {name} for this recipe ({short(key)}), and {store.uri} has none; "
                f"run {name} first, on this recipe and this store"
            )
        check_template(manifest)
        found[name] = manifest
    return found


def check_template(manifest: Manifest) -> None:
    """Refuse a parent that was rendered with another chat template."""
    if manifest.prompt_template_sha256 != TEMPLATE_SHA256:
        raise IntegrityError(
            f"{manifest.stage} {short(manifest.key)} was made with the chat template "
            f"{short(manifest.prompt_template_sha256)}, this version uses {short(TEMPLATE_SHA256)}; make it anew"
        )


def fetch_inputs(stage: Stage, parents: dict[str, Manifest], store: Store, into: Path) -> dict[str, Path]:
    """Download the parts of each of `parents` that the stage reads, verified."""
    return {name: store.fetch(parent, into / name, *stage.reads[name]) for name, parent in parents.items()}


@contextlib.contextmanager
def settled_threads(recipe: Recipe) -> Iterator[None]:
    """Seed everything and hold torch to the recipe's number of CPU threads."""
    import numpy as np
    import torch

    before = torch.get_num_threads()
    if recipe.cpu_threads:
        torch.set_num_threads(recipe.cpu_threads)
    random.seed(recipe.seed)  # not by transformers: Unsloth must be imported before it
    np.random.seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def exit_code(stage_name: str) -> Iterator[None]:
    """End the process as errors.py says: one line for a reason, a traceback only for our own mistakes."""
    be_discreet()
    try:
        yield
    except LlamaRefineError as error:
        _end(stage_name, error)
    except KeyboardInterrupt:
        _end(stage_name, PreemptedError(f"{stage_name} was interrupted"))
    except Exception as error:
        if is_out_of_memory(error):
            _end(stage_name, described(stage_name, error))
        if isinstance(error, OSError):
            _end(stage_name, from_os_error(error))
        if full := _DISK_FULL.search(str(error)):  # torch and safetensors report it as errors of their own
            _end(
                stage_name,
                DiskFullError(f"no space is left where {stage_name} works ({full[0]}): free some, run again"),
            )
        if stopping.is_member(os.environ) and distributed.means_lost_peer(error):
            _end(stage_name, PeerLostError(f"{stage_name} lost another process; it goes on from the last checkpoint"))
        traceback.print_exc()
        _end(
            stage_name,
            LlamaRefineError(f"{stage_name} failed unexpectedly: {type(error).__name__}: {first_line(error)}"),
        )


def _end(stage_name: str, error: LlamaRefineError) -> None:
    """Say why, where a person and where Kubernetes looks, and leave."""
    if not stopping.is_member(os.environ):  # the agent says it, once for all
        print(clean(f"{stage_name}: error: {error}"), file=sys.stderr, flush=True)
    stopping.leave_word(stage_name, error)
    logging.shutdown()
    sys.exit(error.exit_code)


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _names(parents: dict[str, Manifest]) -> str:
    return ", ".join(f"{name} {short(parent.key)}" for name, parent in parents.items())
