"""A training that is killed, told to stop, or run twice ends with the same bytes."""

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from . import processes, tiny

CHECKPOINT_EVERY_STEPS = 3


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recipe.yaml and a store in which prepare, sft and dpo ran without trouble."""
    from llamarefine_jobs.store import Store

    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "recipe.yaml").write_text(tiny.RECIPE)
    prepared = tiny.write_prepared(folder / "prepared")
    tiny.publish_prepared(Store(str(folder / "store")), prepared, tiny.recipe())
    for stage in ("sft", "dpo"):
        exit_code, lines = processes.run(stage, folder / "recipe.yaml", str(folder / "store"))
        assert exit_code == 0, "\n".join(lines)
    return folder


def copy_up_to(undisturbed: Path, folder: Path, stage: str) -> Path:
    """A store of its own, as it stands before `stage`."""
    shutil.copytree(undisturbed / "store", folder / "store")
    for later in ("sft", "dpo")[("sft", "dpo").index(stage) :]:
        shutil.rmtree(folder / "store" / "artifacts" / later)
    return folder / "store"


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_killed_at_random_steps_a_training_ends_with_the_same_adapter(
    stage: str, undisturbed: Path, tmp_path: Path
) -> None:
    store = copy_up_to(undisturbed, tmp_path, stage)
    every = f"{stage}.checkpoint_every_steps={CHECKPOINT_EVERY_STEPS}"
    draw = random.Random(stage)
    resumed_at = 0
    for begin in (4, 9):
        kill_at = draw.randrange(begin, begin + 4)
        process = processes.start(stage, undisturbed / "recipe.yaml", str(store), "--set", every)

        def is_due(line: str, at: int = kill_at, before: int = resumed_at) -> bool:
            """Past the step, and a checkpoint is complete: they are uploaded beside the training."""
            return (processes.step(line) or 0) >= at and newest_checkpoint(store, stage) > before

        lines = processes.signal_when(process, signal.SIGKILL, is_due)
        assert process.returncode == -signal.SIGKILL
        assert_resumed(lines, stage, resumed_at)
        resumed_at = newest_checkpoint(store, stage)
        assert resumed_at % CHECKPOINT_EVERY_STEPS == 0
    exit_code, lines = processes.run(stage, undisturbed / "recipe.yaml", str(store), "--set", every)
    assert exit_code == 0, "\n".join(lines)
    assert_resumed(lines, stage, resumed_at)
    assert processes.sha256s(store, stage) == processes.sha256s(undisturbed / "store", stage)
    assert not (store / "checkpoints").exists(), "checkpoints outlive the training they belong to"


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_told_to_stop_a_training_saves_its_last_step_and_goes_on_from_it(
    stage: str, undisturbed: Path, tmp_path: Path
) -> None:
    store = copy_up_to(undisturbed, tmp_path, stage)
    process = processes.start(stage, undisturbed / "recipe.yaml", str(store))
    lines = processes.signal_when(process, signal.SIGTERM, lambda line: processes.step(line) == 5)
    assert process.returncode == 30, "\n".join(lines)
    assert "its checkpoint at step" in lines[-1]
    stopped_at = newest_checkpoint(store, stage)
    assert stopped_at >= 5
    saved = {path.name for path in (store / "checkpoints").rglob("*") if path.is_file()}
    assert "adapter_model.safetensors" in saved
    assert "training_args.bin" not in saved, "a pickle that nothing needs"
    exit_code, lines = processes.run(stage, undisturbed / "recipe.yaml", str(store))
    assert exit_code == 0, "\n".join(lines)
    assert_resumed(lines, stage, stopped_at)
    assert processes.sha256s(store, stage) == processes.sha256s(undisturbed / "store", stage)


def test_the_same_recipe_in_another_folder_gives_the_same_bytes(undisturbed: Path, tmp_path: Path) -> None:
    store = copy_up_to(undisturbed, tmp_path, "sft")
    for stage in ("sft", "dpo"):
        exit_code, lines = processes.run(stage, undisturbed / "recipe.yaml", str(store))
        assert exit_code == 0, "\n".join(lines)
        assert processes.sha256s(store, stage) == processes.sha256s(undisturbed / "store", stage)


def test_a_disk_that_fills_up_while_training_is_one_line_and_nothing_is_published(
    undisturbed: Path, tmp_path: Path
) -> None:
    """A limit on the size of files stands for the disk; safetensors reports it in its own kind of error."""
    store = copy_up_to(undisturbed, tmp_path, "sft")
    command = [sys.executable, "-m", "llamarefine_jobs.sft", "--recipe", undisturbed / "recipe.yaml", "--store", store]
    wide = ["--set", "sft.lora.rank=64"]  # an adapter larger than the base
    limited = ["bash", "-c", 'ulimit -f 220; exec "$@"', "limited", *map(str, command), *wide]
    ended = subprocess.run(limited, capture_output=True, text=True, check=False, timeout=240)
    assert ended.returncode == 13, ended.stderr
    assert ended.stderr.strip().splitlines()[-1].startswith("sft: error: no space is left where sft works")
    assert "Traceback" not in ended.stderr
    assert not list((store / "artifacts").glob("sft/*")), "something half-written stays"


def assert_resumed(lines: list[str], stage: str, step: int) -> None:
    """The training began right after `step`, and no step was done twice."""
    said = [line for line in lines if "goes on from the checkpoint" in line]
    assert said == ([f"{stage}: goes on from the checkpoint at step {step}"] if step else [])
    steps = [found for line in lines if (found := processes.step(line)) is not None]
    assert steps == list(range(step, max(steps) + 1))


def newest_checkpoint(store: Path, stage: str) -> int:
    complete = [folder for folder, _, files in os.walk(store / "checkpoints" / stage) if "manifest.json" in files]
    return max((int(Path(folder).name) for folder in complete), default=0)
