"""A training that is killed, told to stop, or run twice ends with the same bytes."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from llamarefine_jobs.contract.errors import IntegrityError
from llamarefine_jobs.store import Store
from tests.jobs import processes, tiny

CHECKPOINT_EVERY_STEPS = 3


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recipe.yaml and a store in which prepare, sft and dpo ran without trouble."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "recipe.yaml").write_text(tiny.RECIPE)
    prepared = tiny.write_prepared(folder / "prepared")
    tiny.publish_prepared(Store(str(folder / "store")), prepared, tiny.recipe())
    for stage in ("sft", "dpo"):
        exit_code, lines = processes.run(stage, folder / "recipe.yaml", str(folder / "store"))
        assert exit_code == 0, "\n".join(lines)
    return folder


def copy_up_to(undisturbed: Path, folder: Path, stage: str, copy: Callable[..., object] = shutil.copy2) -> Path:
    """A store of its own, as it stands before `stage`; files copied by `copy`."""
    shutil.copytree(undisturbed / "store", folder / "store", copy_function=copy)
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

    def is_due(line: str) -> bool:
        if "told to stop: its checkpoint" in line:  # once more, while it is saved
            process.send_signal(signal.SIGTERM)
        return processes.step(line) == 5

    lines = processes.signal_when(process, signal.SIGTERM, is_due)
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


# A stage whose validations each wait for something that the test does before it goes on.
DISTURBED = """
import importlib, os, signal, sys, time
from llamarefine_jobs import entry, store
from llamarefine_jobs.process import world

def told(self, work, sum_over_processes=world.World.sum_over_processes, calls=[]):
    calls.append(1)
    if len(calls) == int(os.environ.get("TOLD_IN_VALIDATION", "0")):
        os.kill(os.getpid(), signal.SIGTERM)
    return sum_over_processes(self, work)

def away(*arguments):
    time.sleep(600)

world.World.sum_over_processes = told
if "STORE_IS_AWAY" in os.environ:
    store.Store.publish_checkpoint = away
entry.main(sys.argv[1], importlib.import_module("llamarefine_jobs." + sys.argv[1]).work)
"""


def disturbed(stage: str, undisturbed: Path, store: Path, **environment: str) -> subprocess.Popen[str]:
    """Start a stage to which something happens."""
    script = store.parent / "disturbed.py"
    script.write_text(DISTURBED.replace("sys.argv[1]", repr(stage)))
    return subprocess.Popen(
        [sys.executable, script, "--recipe", undisturbed / "recipe.yaml", "--store", store],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
    )


@pytest.mark.parametrize(("stage", "validation", "step"), [("sft", 2, 8), ("dpo", 4, 16)])
def test_told_to_stop_in_a_validation_it_saves_at_once_and_makes_up_for_it(
    stage: str, validation: int, step: int, undisturbed: Path, tmp_path: Path
) -> None:
    store = copy_up_to(undisturbed, tmp_path, stage)
    process = disturbed(stage, undisturbed, store, TOLD_IN_VALIDATION=str(validation))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 30, output
    assert f"its checkpoint at step {step} is in the store" in output.splitlines()[-1]
    assert output.count("validation loss") == validation - 1
    exit_code, lines = processes.run(stage, undisturbed / "recipe.yaml", str(store))
    assert exit_code == 0, "\n".join(lines)
    assert_resumed(lines, stage, step)
    assert [line for line in lines if "validation loss" in line and f"at step {step}" in line]
    assert processes.sha256s(store, stage) == processes.sha256s(undisturbed / "store", stage)
    assert history(store, stage) == history(undisturbed / "store", stage)


def history(store: Path, stage: str) -> list[dict[str, float]]:
    """What the report draws of a training."""
    (manifest,) = (store / "artifacts" / stage).rglob("manifest.json")
    found: list[dict[str, float]] = json.loads(manifest.read_text())["metrics"]["history"]
    return found


def test_told_to_stop_after_its_last_step_it_publishes(undisturbed: Path, tmp_path: Path) -> None:
    store = copy_up_to(undisturbed, tmp_path, "sft")
    process = processes.start("sft", undisturbed / "recipe.yaml", str(store))
    lines = processes.signal_when(process, signal.SIGTERM, lambda line: "kept the adapter" in line)
    assert process.returncode == 0, "\n".join(lines)
    assert processes.sha256s(store, "sft") == processes.sha256s(undisturbed / "store", "sft")


def test_a_checkpoint_that_does_not_reach_the_store_in_time_is_the_last_word(undisturbed: Path, tmp_path: Path) -> None:
    store, last_words = copy_up_to(undisturbed, tmp_path, "sft"), tmp_path / "last-words"
    last_words.touch()
    words = {"LLAMAREFINE_TERMINATION_MESSAGE": str(last_words)}
    process = disturbed("sft", undisturbed, store, TOLD_IN_VALIDATION="1", STORE_IS_AWAY="1", **words)

    def is_killed(line: str) -> bool:  # as when the grace period is over
        if "told to stop: its checkpoint at step 4 goes to the store" not in line:
            return False
        while not last_words.read_text():
            time.sleep(0.05)
        return True

    processes.signal_when(process, signal.SIGKILL, is_killed)
    said = json.loads(last_words.read_text())
    assert said["reason"] == "preempted"
    assert (
        "its checkpoint at step 4 did not reach the store in time, and the same command begins again"
        in (said["message"])
    )


def test_a_checkpoint_that_the_store_refuses_is_told_and_it_is_preempted_all_the_same(
    undisturbed: Path, tmp_path: Path
) -> None:
    store = copy_up_to(undisturbed, tmp_path, "sft")
    (store / "checkpoints").write_text("a file where a folder has to be")
    process = disturbed("sft", undisturbed, store, TOLD_IN_VALIDATION="1")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 30, output
    assert "Traceback" not in output
    assert "its checkpoint at step 4 is not in the store (" in output.splitlines()[-1]
    assert "the same command begins again" in output.splitlines()[-1]


def test_a_checkpoint_that_is_damaged_though_its_digests_fit_is_one_line(undisturbed: Path, tmp_path: Path) -> None:
    store = copy_up_to(undisturbed, tmp_path, "sft")
    process = disturbed("sft", undisturbed, store, TOLD_IN_VALIDATION="2")
    process.communicate(timeout=300)
    assert process.returncode == 30

    harms: dict[str, Callable[[Path], object]] = {  # one on top of the other: the second is met earlier
        "a training cannot go on from it (": lambda it: (it / "trainer_state.json").write_text("[]"),
        "its best.json names nan as a loss": lambda it: (it / "best/best.json").write_text('{"loss": NaN, "step": 4}'),
    }
    for said, harm in harms.items():
        rewrite_checkpoint(Store(str(store)), tmp_path / said[:8], harm)
        exit_code, lines = processes.run("sft", undisturbed / "recipe.yaml", str(store))
        assert exit_code == IntegrityError.exit_code, "\n".join(lines)
        assert said in lines[-1]
        assert "Traceback" not in "\n".join(lines)


def rewrite_checkpoint(store: Store, folder: Path, harm: Callable[[Path], object]) -> None:
    """Replace the only checkpoint by one that was harmed before it was published."""
    (manifest_path,) = (entry.path for entry in store.entries("checkpoints/") if entry.path.endswith("manifest.json"))
    stage, key, step = manifest_path.split("/")[1:4]
    manifest = store.checkpoint_manifest(stage, key, int(step))
    assert manifest
    store.fetch_checkpoint(stage, key, folder)
    harm(folder)
    store.remove_checkpoints(stage, key)
    store.publish_checkpoint(int(step), folder, manifest)


def test_micro_batches_that_were_too_large_are_remembered_by_the_next_pod(undisturbed: Path, tmp_path: Path) -> None:
    """The first pod has begun anew with fewer rows, as out_of_memory.py does it, before it is preempted."""
    store = copy_up_to(undisturbed, tmp_path, "sft")
    halve = ("--set", "sft.on_out_of_memory=halve_micro_batch")
    fewer, ran_out = ("--set", "sft.micro_batch_rows=2"), {"LLAMAREFINE_RAN_OUT_AT_ROWS": "[4]"}
    process = processes.start("sft", undisturbed / "recipe.yaml", str(store), *halve, *fewer, environment=ran_out)
    lines = processes.signal_when(process, signal.SIGTERM, lambda line: processes.step(line) == 5)
    assert process.returncode == 30, "\n".join(lines)
    stopped_at = newest_checkpoint(store, "sft")
    exit_code, lines = processes.run("sft", undisturbed / "recipe.yaml", str(store), *halve)
    assert exit_code == 0, "\n".join(lines)
    assert_resumed(lines, "sft", stopped_at)
    assert "sft: micro-batches of 2 rows, because memory ran out with 4 before; a step still has 8 rows" in lines
    (manifest,) = (store / "artifacts" / "sft").rglob("manifest.json")
    metrics = json.loads(manifest.read_text())["metrics"]
    assert (metrics["micro_batch_rows"], metrics["ran_out_of_memory_at_micro_batch_rows"]) == (2, [4])
    (other,) = (undisturbed / "store" / "artifacts" / "sft").rglob("manifest.json")
    assert manifest.parent.name == other.parent.name, "it has another key"


def test_a_checkpoint_is_proved_by_the_next_step_however_seldom_a_loss_is_logged(
    undisturbed: Path, tmp_path: Path
) -> None:
    store = copy_up_to(undisturbed, tmp_path, "sft")
    options = ("--set", "sft.checkpoint_every_steps=6", "--set", "sft.log_every_steps=100")
    exit_code, lines = processes.run("sft", undisturbed / "recipe.yaml", str(store), *options)
    assert exit_code == 0, "\n".join(lines)
    assert [step for line in lines if (step := processes.step(line)) is not None] == [0, 7, 13, 16]


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
