"""Worker process: one of several that train together. The agent of its node starts it.

    python -m llamarefine_jobs.worker sft --recipe recipe.yaml --store s3://bucket/prefix

A worker runs only the stage's work function. It reads the inputs from the folder that the agent prepared, and rank 0
leaves the output there for the agent to publish.
"""

import argparse
import importlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path

from llamarefine_jobs.context import Context
from llamarefine_jobs.contract.artifact import artifact_key
from llamarefine_jobs.contract.environment import SHARED_FOLDER
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.stages import STAGES
from llamarefine_jobs.entry import end_at_once, exit_code, find_parents, open_store, seeded_threads
from llamarefine_jobs.process import sigterm
from llamarefine_jobs.process.agent import OUTCOME
from llamarefine_jobs.process.world import join
from llamarefine_jobs.recipe_file import load_recipe
from llamarefine_jobs.sources import pinning
from llamarefine_jobs.store import Store


def main() -> None:
    """Run one worker process: parse its arguments, do the work, exit with its code."""
    parser = argparse.ArgumentParser(prog="python -m llamarefine_jobs.worker", description=__doc__)
    parser.add_argument("stage", choices=[name for name, stage in STAGES.items() if stage.has_checkpoints])
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--store", required=True)
    options = parser.parse_args()
    os.environ.setdefault("TQDM_DISABLE", "1")
    with sigterm.ignoring_sigterm_at_exit(), exit_code(options.stage):
        recipe = pinning.pin(load_recipe(options.recipe), check=False)  # as in a training in one process
        work(options.stage, recipe, open_store(options.stage, options.store))
    end_at_once()


def work(stage_name: str, recipe: Recipe, store: Store) -> None:
    """Join the other workers, train, and write the outcome for the agent."""
    stop = sigterm.install_handler()
    world = join()
    parents = find_parents(stage_name, recipe, store)
    shared = Path(os.environ[SHARED_FOLDER])
    own_folder = shared / f"process-{world.rank}"
    own_folder.mkdir()
    context = Context(
        stage=STAGES[stage_name],
        recipe=recipe,
        store=store,
        key=artifact_key(stage_name, recipe, parents),
        parents=parents,
        inputs={name: shared / "inputs" / name for name in parents},
        output=shared / "output",
        work=own_folder,
        started_at=datetime.now(UTC),
        stop=stop,
        world=world,
    )
    with seeded_threads(recipe):
        importlib.import_module(f"llamarefine_jobs.{stage_name}").work(context)
    if world.is_first:
        outcome = {"backend": context.backend, "accelerator": context.accelerator, "metrics": context.metrics}
        (shared / OUTCOME).write_text(json.dumps(outcome), encoding="utf-8")
    world.shutdown()


if __name__ == "__main__":
    main()
