"""Run a stage around its work function: arguments, seed, SIGTERM, inputs, publishing, the exit code.

A stage needs only a recipe and a store, because it finds its parents by their keys:
``python -m llamarefine_jobs.sft --recipe recipe.yaml --store s3://bucket/prefix`` runs by itself.
"""

import argparse
import atexit
import contextlib
import logging
import os
import random
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from llamarefine_jobs.context import Context
from llamarefine_jobs.contract.artifact import Manifest, artifact_key, short
from llamarefine_jobs.contract.environment import WORK_FOLDER
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
from llamarefine_jobs.contract.prompt import TEMPLATE_SHA256
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.retry import stage_retry_policy
from llamarefine_jobs.contract.stages import STAGES, Stage
from llamarefine_jobs.process import sigterm
from llamarefine_jobs.process.agent import find_agent
from llamarefine_jobs.process.out_of_memory import (
    halving_micro_batches,
    is_out_of_memory,
    out_of_memory_error,
    with_remembered_micro_batch,
)
from llamarefine_jobs.process.world import means_lost_peer
from llamarefine_jobs.recipe_file import load_recipe
from llamarefine_jobs.sources import pinning
from llamarefine_jobs.store import Store
from llamarefine_jobs.untrusted.control_characters import strip_control_characters
from llamarefine_jobs.untrusted.log_redaction import redact_logs

# The last alternative is torch's message if the end of a file that it wrote is missing.
_DISK_FULL = re.compile(r"No space left on device|File too large|Disk quota exceeded|unexpected pos \d+ vs \d+")


Work = Callable[[Context], None]


def main(stage_name: str, work: Work) -> None:
    """Run one stage as a process: parse its arguments, do its work, exit with the exit code of its error."""
    parser = argparse.ArgumentParser(
        prog=f"python -m llamarefine_jobs.{stage_name}",
        description=f"Run the stage {stage_name}: read its parents from the store, publish its artifact there.",
    )
    parser.add_argument("--recipe", type=Path, required=True, help="the recipe, a YAML file")
    parser.add_argument("--store", required=True, help="file:///folder or s3://bucket/prefix")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override a key of the recipe; can be repeated",
    )
    options = parser.parse_args()
    os.environ.setdefault("TQDM_DISABLE", "1")  # no progress bars of libraries; tqdm reads this when it is imported
    with sigterm.ignoring_sigterm_at_exit(), exit_code(stage_name):
        recipe = pinning.pin(load_recipe(options.recipe, options.set), check=stage_name == "prepare")
        run(stage_name, work, recipe, open_store(stage_name, options.store))
    end_at_once()


def open_store(stage_name: str, uri: str) -> Store:
    """Open the store of a stage. An outage of the bucket is retried, and reported in the stage's log."""
    return Store(uri, stage_retry_policy(stage_name))


def run(stage_name: str, work: Work, recipe: Recipe, store: Store) -> Manifest:
    """Do one stage's work, publish the artifact and return its manifest. An existing artifact is not made again."""
    stage = STAGES[stage_name]
    stop = sigterm.install_handler()
    stop.stage = stage_name
    sigterm.stop_when_launcher_dies()
    parents = find_parents(stage_name, recipe, store)
    key = artifact_key(stage_name, recipe, parents)
    existing = store.manifest(stage_name, key)
    if existing is not None:
        print(f"{stage_name}: {short(key)} is in the store already; nothing to do", flush=True)
        return existing
    recipe = with_remembered_micro_batch(stage_name, recipe, store, key)
    with (
        halving_micro_batches(stage_name, recipe),
        tempfile.TemporaryDirectory(prefix=f"llamarefine-{stage_name}-", dir=os.environ.get(WORK_FOLDER)) as folder,
    ):
        stop.cleanup_folder = work_folder = Path(folder)
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
        context.note(f"makes {short(key)} from " + (_describe_parents(parents) or "the recipe's sources"))
        agent = find_agent(stage_name, recipe, work_folder)
        if agent is None:
            with seeded_threads(recipe):
                work(context)
        else:
            stop.defer_exit()  # the workers decide: they may have a checkpoint to save
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
    """Return the manifests of a stage's parents, or of the parents in `names`, found by their keys.

    Raises DataError if the store lacks one, IntegrityError if one was made with another chat template.
    """
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
    """Raise IntegrityError if a parent was made with another chat template."""
    if manifest.prompt_template_sha256 != TEMPLATE_SHA256:
        raise IntegrityError(
            f"{manifest.stage} {short(manifest.key)} was made with the chat template "
            f"{short(manifest.prompt_template_sha256)}, this version uses {short(TEMPLATE_SHA256)}; "
            "make it again with this version"
        )


def fetch_inputs(stage: Stage, parents: dict[str, Manifest], store: Store, into: Path) -> dict[str, Path]:
    """Download and verify the parts of each of `parents` that the stage reads; return a folder per parent."""
    return {
        name: store.fetch(parent, into / name, *stage.reads[name])
        for name, parent in parents.items()
        if name not in stage.key_only
    }


@contextlib.contextmanager
def seeded_threads(recipe: Recipe) -> Iterator[None]:
    """Seed all random number generators, and limit torch to the recipe's number of CPU threads within the block."""
    import numpy as np
    import torch

    before = torch.get_num_threads()
    if recipe.cpu_threads:
        torch.set_num_threads(recipe.cpu_threads)
    random.seed(recipe.seed)  # not transformers.set_seed: Unsloth must be imported before transformers
    np.random.seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def exit_code(stage_name: str) -> Iterator[None]:
    """End the process on an exception, with its exit code. Prints a traceback only for an unexpected error."""
    redact_logs()
    try:
        yield
    except LlamaRefineError as error:
        _end(stage_name, error)
    except KeyboardInterrupt:
        _end(stage_name, PreemptedError(f"{stage_name} was interrupted"))
    except Exception as error:
        if is_out_of_memory(error):
            _end(stage_name, out_of_memory_error(stage_name, error))
        if isinstance(error, OSError):
            _end(stage_name, from_os_error(error))
        if full := _DISK_FULL.search(str(error)):  # torch and safetensors raise errors of their own
            _end(
                stage_name,
                DiskFullError(f"no space is left where {stage_name} works ({full[0]}): free some, then run again"),
            )
        if sigterm.is_worker(os.environ) and means_lost_peer(error):
            _end(stage_name, PeerLostError(f"{stage_name} lost another process; it resumes from the last checkpoint"))
        traceback.print_exc()
        _end(
            stage_name,
            LlamaRefineError(f"{stage_name} failed unexpectedly: {type(error).__name__}: {first_line(error)}"),
        )


def _end(stage_name: str, error: LlamaRefineError) -> None:
    """Print the error, write the termination message that Kubernetes reads, and exit."""
    if not sigterm.is_worker(os.environ):  # its agent prints the error, once for all workers
        print(strip_control_characters(f"{stage_name}: error: {error}"), file=sys.stderr, flush=True)
    sigterm.write_termination_message(stage_name, error)
    logging.shutdown()
    sys.exit(error.exit_code)


def end_at_once() -> None:
    """End the process with exit code 0 after what was registered for its end, without tearing down Python's modules.

    With torch loaded, that takes more than a second, in which a stage would hold its GPU for nothing.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _describe_parents(parents: dict[str, Manifest]) -> str:
    return ", ".join(f"{name} {short(parent.key)}" for name, parent in parents.items())
