"""A training that is killed, preempted by SIGTERM, or repeated ends with the same bytes."""

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
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with recipe.yaml and a store in which sft and dpo ran without interruption."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "recipe.yaml").write_text(tiny.RECIPE)
    prepared = tiny.write_prepared(folder / "prepared")
    tiny.publish_prepared(Store(str(folder / "store")), prepared, tiny.recipe())
    for stage in ("sft", "dpo"):
        exit_code, lines = processes.run(stage, folder / "recipe.yaml", str(folder / "store"))
        assert exit_code == 0, "\n".join(lines)
    return folder


def copy_up_to(uninterrupted: Path, folder: Path, stage: str, copy: Callable[..., object] = shutil.copy2) -> Path:
    """Make a separate store with the artifacts that `stage` reads, and return it; `copy` copies each file."""
    shutil.copytree(uninterrupted / "store", folder / "store", copy_function=copy)
    for later in ("sft", "dpo")[("sft", "dpo").index(stage) :]:
        shutil.rmtree(folder / "store" / "artifacts" / later)
    return folder / "store"


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_training_that_is_killed_at_random_steps_ends_with_the_same_adapter(
    stage: str, uninterrupted: Path, tmp_path: Path
) -> None:
    store = copy_up_to(uninterrupted, tmp_path, stage)
    every = f"{stage}.checkpoint_every_steps={CHECKPOINT_EVERY_STEPS}"
    draw = random.Random(stage)
    resumed_at = 0
    for begin in (4, 9):
        kill_at = draw.randrange(begin, begin + 4)
        waiting = processes.wait_at_step(kill_at)
        process = processes.start(stage, uninterrupted / "recipe.yaml", str(store), "--set", every, environment=waiting)

        def is_due(line: str, at: int = kill_at, before: int = resumed_at) -> bool:
            """Return whether the training is at step `at`, after it has uploaded a checkpoint newer than `before`."""
            until_s = time.monotonic() + 60
            while (is_there := processes.step(line) == at) and newest_checkpoint(store, stage) <= before:
                assert time.monotonic() < until_s, "no checkpoint was uploaded"
                time.sleep(0.01)
            return is_there

        lines = processes.signal_when(process, signal.SIGKILL, is_due)
        assert process.returncode == -signal.SIGKILL
        assert_resumed(lines, stage, resumed_at)
        resumed_at = newest_checkpoint(store, stage)
        assert resumed_at % CHECKPOINT_EVERY_STEPS == 0
    exit_code, lines = processes.run(stage, uninterrupted / "recipe.yaml", str(store), "--set", every)
    assert exit_code == 0, "\n".join(lines)
    assert_resumed(lines, stage, resumed_at)
    assert processes.sha256s(store, stage) == processes.sha256s(uninterrupted / "store", stage)
    left = [path for path in (store / "checkpoints").rglob("*") if path.is_file()]
    assert not left, "checkpoints are left after their training"  # a killed process may leave an empty folder


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_training_saves_a_checkpoint_on_sigterm_and_continues_from_it(
    stage: str, uninterrupted: Path, tmp_path: Path
) -> None:
    store = copy_up_to(uninterrupted, tmp_path, stage)
    process = processes.start(stage, uninterrupted / "recipe.yaml", str(store), environment=processes.wait_at_step(5))

    def is_due(line: str) -> bool:
        if "SIGTERM received: uploading its checkpoint" in line:  # a second SIGTERM, while the checkpoint is saved
            process.send_signal(signal.SIGTERM)
        return processes.step(line) == 5

    lines = processes.signal_when(process, signal.SIGTERM, is_due)
    assert process.returncode == 30, "\n".join(lines)
    assert "its checkpoint at step" in lines[-1]
    stopped_at = newest_checkpoint(store, stage)
    assert stopped_at == 5
    saved = {path.name for path in (store / "checkpoints").rglob("*") if path.is_file()}
    assert saved == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "best.json",
        "manifest.json",
        "optimizer.safetensors",
        "training_state.json",
        *(["reference_logprobs.safetensors"] if stage == "dpo" else []),
    }
    exit_code, lines = processes.run(stage, uninterrupted / "recipe.yaml", str(store))
    assert exit_code == 0, "\n".join(lines)
    assert_resumed(lines, stage, stopped_at)
    assert processes.sha256s(store, stage) == processes.sha256s(uninterrupted / "store", stage)


# A stage that sends itself SIGTERM in one of its validations, and whose checkpoint uploads may hang.
INTERRUPTED = """
import importlib, os, signal, sys, threading
from llamarefine_jobs import entry, store
from llamarefine_jobs.training import loop

def validate_with_sigterm(self, validate=loop.Trainer._validate, calls=[]):
    calls.append(1)
    if len(calls) == int(os.environ.get("SIGTERM_IN_VALIDATION", "0")):
        os.kill(os.getpid(), signal.SIGTERM)
    return validate(self)

def hang(*arguments):
    print("the upload hangs", flush=True)
    threading.Event().wait()

loop.Trainer._validate = validate_with_sigterm
if "UPLOAD_HANGS" in os.environ:
    store.Store.publish_checkpoint = hang
entry.main(sys.argv[1], importlib.import_module("llamarefine_jobs." + sys.argv[1]).work)
"""


def start_interrupted(stage: str, uninterrupted: Path, store: Path, **environment: str) -> subprocess.Popen[str]:
    """Start a stage as INTERRUPTED, with these environment variables."""
    script = store.parent / "interrupted.py"
    script.write_text(INTERRUPTED.replace("sys.argv[1]", repr(stage)))
    return subprocess.Popen(
        [sys.executable, script, "--recipe", uninterrupted / "recipe.yaml", "--store", store],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
    )


@pytest.mark.parametrize(("stage", "validation", "step"), [("sft", 2, 8), ("dpo", 4, 16)])
def test_sigterm_during_validation_saves_a_checkpoint_and_the_next_attempt_validates(
    stage: str, validation: int, step: int, uninterrupted: Path, tmp_path: Path
) -> None:
    store = copy_up_to(uninterrupted, tmp_path, stage)
    process = start_interrupted(stage, uninterrupted, store, SIGTERM_IN_VALIDATION=str(validation))
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 30, output
    assert f"its checkpoint at step {step} is in the store" in output.splitlines()[-1]
    assert output.count("validation loss") == validation - 1
    exit_code, lines = processes.run(stage, uninterrupted / "recipe.yaml", str(store))
    assert exit_code == 0, "\n".join(lines)
    assert_resumed(lines, stage, step)
    assert [line for line in lines if "validation loss" in line and f"at step {step}" in line]
    assert processes.sha256s(store, stage) == processes.sha256s(uninterrupted / "store", stage)
    assert history(store, stage) == history(uninterrupted / "store", stage)


def history(store: Path, stage: str) -> list[dict[str, float]]:
    """Return the training curve that the report draws."""
    (manifest,) = (store / "artifacts" / stage).rglob("manifest.json")
    found: list[dict[str, float]] = json.loads(manifest.read_text())["metrics"]["history"]
    return found


def test_a_training_publishes_when_sigterm_comes_after_its_last_step(uninterrupted: Path, tmp_path: Path) -> None:
    store = copy_up_to(uninterrupted, tmp_path, "sft")
    waiting = processes.wait_after("kept the adapter")
    process = processes.start("sft", uninterrupted / "recipe.yaml", str(store), environment=waiting)
    lines = processes.signal_when(process, signal.SIGTERM, lambda line: "kept the adapter" in line)
    assert process.returncode == 0, "\n".join(lines)
    assert processes.sha256s(store, "sft") == processes.sha256s(uninterrupted / "store", "sft")


def test_the_termination_message_names_a_checkpoint_that_was_not_uploaded_in_time(
    uninterrupted: Path, tmp_path: Path
) -> None:
    store, message = copy_up_to(uninterrupted, tmp_path, "sft"), tmp_path / "termination-message"
    message.touch()
    process = start_interrupted(
        "sft",
        uninterrupted,
        store,
        SIGTERM_IN_VALIDATION="1",
        UPLOAD_HANGS="1",
        LLAMAREFINE_TERMINATION_MESSAGE=str(message),
    )

    lines = processes.signal_when(process, signal.SIGKILL, lambda line: line.strip() == "the upload hangs")
    assert "sft: SIGTERM received: uploading its checkpoint at step 4" in lines
    written = json.loads(message.read_text())
    assert written["reason"] == "preempted"
    assert (
        "step 4 did not reach the store in time, and the same command starts from the beginning" in written["message"]
    )


def test_a_training_is_preempted_also_if_its_checkpoint_cannot_be_uploaded(uninterrupted: Path, tmp_path: Path) -> None:
    store = copy_up_to(uninterrupted, tmp_path, "sft")
    (store / "checkpoints").write_text("a file where a folder has to be")
    process = start_interrupted("sft", uninterrupted, store, SIGTERM_IN_VALIDATION="1")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 30, output
    assert "Traceback" not in output
    assert "its checkpoint at step 4 is not in the store (" in output.splitlines()[-1]
    assert "the same command starts from the beginning" in output.splitlines()[-1]


def test_a_damaged_checkpoint_with_correct_digests_ends_with_a_one_line_error(
    uninterrupted: Path, tmp_path: Path
) -> None:
    store = copy_up_to(uninterrupted, tmp_path, "sft")
    process = start_interrupted("sft", uninterrupted, store, SIGTERM_IN_VALIDATION="2")
    process.communicate(timeout=300)
    assert process.returncode == 30

    damages: dict[str, Callable[[Path], object]] = {  # the second is added to the first, and is detected before it
        "a training cannot resume from it (": lambda it: (it / "training_state.json").write_text("[]"),
        "its best.json names nan as a loss": lambda it: (it / "best/best.json").write_text('{"loss": NaN, "step": 4}'),
    }
    for message, damage in damages.items():
        rewrite_checkpoint(Store(str(store)), tmp_path / message[:8], damage)
        exit_code, lines = processes.run("sft", uninterrupted / "recipe.yaml", str(store))
        assert exit_code == IntegrityError.exit_code, "\n".join(lines)
        assert message in lines[-1]
        assert "Traceback" not in "\n".join(lines)


def rewrite_checkpoint(store: Store, folder: Path, damage: Callable[[Path], object]) -> None:
    """Replace the only checkpoint with one that was damaged before its digests were computed."""
    (manifest_path,) = (entry.path for entry in store.entries("checkpoints/") if entry.path.endswith("manifest.json"))
    stage, key, step = manifest_path.split("/")[1:4]
    manifest = store.checkpoint_manifest(stage, key, int(step))
    assert manifest
    store.fetch_checkpoint(stage, key, folder)
    damage(folder)
    store.remove_checkpoints(stage, key)
    store.publish_checkpoint(int(step), folder, manifest)


def test_the_next_attempt_uses_the_smaller_micro_batches_of_a_preempted_one(
    uninterrupted: Path, tmp_path: Path
) -> None:
    """The first attempt runs out of memory, restarts with fewer rows (as out_of_memory.py does), and is preempted."""
    store = copy_up_to(uninterrupted, tmp_path, "sft")
    halve = ("--set", "sft.on_out_of_memory=halve_micro_batch")
    fewer, ran_out = ("--set", "sft.micro_batch_rows=2"), {"LLAMAREFINE_RAN_OUT_AT_ROWS": "[4]"}
    environment = ran_out | processes.wait_at_step(5)
    process = processes.start("sft", uninterrupted / "recipe.yaml", str(store), *halve, *fewer, environment=environment)
    lines = processes.signal_when(process, signal.SIGTERM, lambda line: processes.step(line) == 5)
    assert process.returncode == 30, "\n".join(lines)
    stopped_at = newest_checkpoint(store, "sft")
    exit_code, lines = processes.run("sft", uninterrupted / "recipe.yaml", str(store), *halve)
    assert exit_code == 0, "\n".join(lines)
    assert_resumed(lines, "sft", stopped_at)
    assert "sft: micro-batches of up to 2 rows, because memory ran out with 4 before; a step still has 8 rows" in lines
    (manifest,) = (store / "artifacts" / "sft").rglob("manifest.json")
    metrics = json.loads(manifest.read_text())["metrics"]
    assert (metrics["micro_batch_rows"], metrics["ran_out_of_memory_at_micro_batch_rows"]) == (2, [4])
    (other,) = (uninterrupted / "store" / "artifacts" / "sft").rglob("manifest.json")
    assert manifest.parent.name == other.parent.name, "the key differs"


def test_the_loss_right_after_a_checkpoint_is_logged_for_any_log_interval(uninterrupted: Path, tmp_path: Path) -> None:
    store = copy_up_to(uninterrupted, tmp_path, "sft")
    options = ("--set", "sft.checkpoint_every_steps=6", "--set", "sft.log_every_steps=100")
    exit_code, lines = processes.run("sft", uninterrupted / "recipe.yaml", str(store), *options)
    assert exit_code == 0, "\n".join(lines)
    assert [step for line in lines if (step := processes.step(line)) is not None] == [0, 7, 13, 16]


def test_a_training_with_dropout_that_is_stopped_draws_the_same_random_numbers_when_it_continues(
    uninterrupted: Path, tmp_path: Path
) -> None:
    made = []
    for environment in ({}, processes.wait_at_step(5)):
        (tmp_path / str(len(made))).mkdir()
        store = copy_up_to(uninterrupted, tmp_path / str(len(made)), "sft")
        command = ("sft", uninterrupted / "recipe.yaml", str(store), "--set", "sft.lora.dropout=0.2")
        if environment:
            process = processes.start(*command, environment=environment)
            processes.signal_when(process, signal.SIGTERM, lambda line: processes.step(line) == 5)
            assert process.returncode == 30
        exit_code, lines = processes.run(*command)
        assert exit_code == 0, "\n".join(lines)
        made.append(processes.sha256s(store, "sft"))
    assert made[0] == made[1] != processes.sha256s(uninterrupted / "store", "sft")


def test_the_same_recipe_in_another_folder_gives_the_same_bytes(uninterrupted: Path, tmp_path: Path) -> None:
    store = copy_up_to(uninterrupted, tmp_path, "sft")
    for stage in ("sft", "dpo"):
        exit_code, lines = processes.run(stage, uninterrupted / "recipe.yaml", str(store))
        assert exit_code == 0, "\n".join(lines)
        assert processes.sha256s(store, stage) == processes.sha256s(uninterrupted / "store", stage)


def test_a_full_disk_ends_the_training_with_a_one_line_error_and_publishes_nothing(
    uninterrupted: Path, tmp_path: Path
) -> None:
    """A limit on the file size simulates a full disk; safetensors reports it with its own error class."""
    store = copy_up_to(uninterrupted, tmp_path, "sft")
    command = [
        sys.executable,
        "-m",
        "llamarefine_jobs.sft",
        "--recipe",
        uninterrupted / "recipe.yaml",
        "--store",
        store,
    ]
    wide = ["--set", "sft.lora.rank=64"]  # an adapter larger than the base
    limited = ["bash", "-c", 'ulimit -f 220; exec "$@"', "limited", *map(str, command), *wide]
    ended = subprocess.run(limited, capture_output=True, text=True, check=False, timeout=240)
    assert ended.returncode == 13, ended.stderr
    assert ended.stderr.strip().splitlines()[-1].startswith("sft: error: no space is left where sft works")
    assert "Traceback" not in ended.stderr
    assert not list((store / "artifacts").glob("sft/*")), "an incomplete artifact is left"


def assert_resumed(lines: list[str], stage: str, step: int) -> None:
    """Assert that the training continued after `step`, made no step twice, and scored DPO's reference only once."""
    resumed = [line for line in lines if "resumes from the checkpoint" in line]
    assert resumed == ([f"{stage}: resumes from the checkpoint at step {step}"] if step else [])
    scored = [line for line in lines if "the reference scores" in line]
    assert scored == (["dpo: the reference scores 120 answers once"] if stage == "dpo" and not step else [])
    steps = [found for line in lines if (found := processes.step(line)) is not None]
    assert steps == list(range(step, max(steps) + 1))


def newest_checkpoint(store: Path, stage: str) -> int:
    complete = [folder for folder, _, files in os.walk(store / "checkpoints" / stage) if "manifest.json" in files]
    return max((int(Path(folder).name) for folder in complete), default=0)
