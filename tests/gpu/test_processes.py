"""Stages as processes on this machine's backend: stopped, killed, out of memory; and both backends compared."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from llamarefine_jobs.store import Store
from tests.gpu.shapes import BACKEND, INTERPRETED, TINY, Shape, prepared_folder
from tests.jobs import processes, tiny
from tests.jobs.training.test_resume import copy_up_to, newest_checkpoint

EVERY = 1 if INTERPRETED else 3  # steps between checkpoints
# The memory that a limited process may use on the card: the model fits, a step of 48 rows does not.
_LIMIT_BYTES = {"tiny": 40 << 20, "tinyllama": 3 << 30}


@pytest.fixture(scope="module")
def undisturbed(shape: Shape, cuda: bool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with recipe.yaml and a store in which prepare, sft and dpo have finished undisturbed."""
    from llamarefine_jobs.recipe_file import load_recipe, parse_recipe
    from llamarefine_jobs.sources.pinning import pin

    folder = tmp_path_factory.mktemp(f"undisturbed-{shape.name}")
    # More epochs for the tiny model: a card would finish before a checkpoint is in the store.
    epochs = ("sft.epochs=20", "dpo.epochs=20") if cuda and not INTERPRETED and shape == TINY else ()
    chosen = [f"{stage}.{key}" for stage in ("sft", "dpo") for key in (f"backend={BACKEND}", "micro_batch_rows=null")]
    recipe = parse_recipe(tiny.RECIPE, "tiny", (*shape.settings, *epochs, *chosen))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    pinned = pin(load_recipe(folder / "recipe.yaml", ()))
    tiny.publish_prepared(Store(str(folder / "store")), prepared_folder(shape, folder / "prepared"), pinned)
    for stage in ("sft", "dpo"):
        exit_code, lines = processes.run(stage, folder / "recipe.yaml", str(folder / "store"))
        assert exit_code == 0, "\n".join(lines)
    return folder


@pytest.mark.parametrize("stage", ["sft", "dpo"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_stopped_or_killed_training_resumes_and_ends_with_the_same_adapter(
    stage: str, number: signal.Signals, undisturbed: Path, tmp_path: Path, cuda: bool
) -> None:
    store, recipe = copy_up_to(undisturbed, tmp_path, stage, os.link), undisturbed / "recipe.yaml"
    every = f"{stage}.checkpoint_every_steps={EVERY}"
    process = processes.start(stage, recipe, str(store), "--set", every)

    def is_due(line: str) -> bool:
        return (processes.step(line) or 0) > 2 * EVERY and newest_checkpoint(store, stage) > 0

    lines = processes.signal_when(process, number, is_due)
    assert process.returncode == (30 if number == signal.SIGTERM else -signal.SIGKILL), "\n".join(lines)
    exit_code, lines = processes.run(stage, recipe, str(store), "--set", every)
    assert exit_code == 0, "\n".join(lines)
    resumed = next(re.search(r"resumes from the checkpoint at step (\d+)", line) for line in lines if "resumes" in line)
    assert resumed
    assert int(resumed[1]) >= EVERY
    expected, found = adapter_of(undisturbed / "store", stage), adapter_of(store, stage)
    assert found.keys() == expected.keys()
    if not cuda:
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        return
    # Kernels on a GPU may add in another order each time, so the difference must only be small beside the training's.
    difference = max(float((found[name] - expected[name]).abs().max()) for name in expected)
    trained = max(float(tensor.abs().max()) for name, tensor in expected.items() if "lora_B" in name)
    assert difference < trained / 20


# Prints a line when a training begins to compile its layers, or to capture its first CUDA graph.
_WATCHED = {
    "compile": "StepGradient.compile_layers = saying(StepGradient.compile_layers)",
    "capture": "gradient._CapturedPass.__init__ = saying(gradient._CapturedPass.__init__)",
    # Without CUDA it has nothing to do, so here it takes a minute in which the signal comes.
    "prepare": "StepGradient.prepare = saying(lambda *arguments, **named: time.sleep(60))",
}


@pytest.mark.parametrize("what", ["compile", "capture", "prepare"])
def test_sigterm_before_the_first_step_ends_the_process_at_once(
    what: str, undisturbed: Path, tmp_path: Path, cuda: bool
) -> None:
    """Nothing is lost by then, so no checkpoint is written."""
    if (what == "prepare") is (cuda and not INTERPRETED and BACKEND == "packed"):
        pytest.skip("layers are compiled and captured on CUDA only, in the packed step")
    store = copy_up_to(undisturbed, tmp_path, "sft", os.link)
    code = (
        "import time\n"
        "from llamarefine_jobs import entry, sft\n"
        "from llamarefine_jobs.training import gradient\n"
        "from llamarefine_jobs.training.gradient import StepGradient\n"
        "def saying(function):\n"
        "    def begin(*arguments, **named):\n"
        "        print('begins', flush=True)\n"
        "        return function(*arguments, **named)\n"
        "    return begin\n"
        f"{_WATCHED[what]}\n"
        "entry.main('sft', sft.work)"
    )
    command = [sys.executable, "-c", code, "--recipe", undisturbed / "recipe.yaml", "--store", store]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = processes.signal_when(process, signal.SIGTERM, lambda line: line.startswith("begins"))
    assert process.returncode == 30, "\n".join(lines)
    assert newest_checkpoint(store, "sft") == 0
    assert not any(processes.step(line) for line in lines), "it made a step"


def test_running_out_of_gpu_memory_exits_with_the_setting_to_lower(
    undisturbed: Path, tmp_path: Path, shape: Shape, cuda: bool
) -> None:
    """The process may use so little of the card's memory that its first large tensor does not fit."""
    if INTERPRETED or not cuda:
        pytest.skip("a limit on a GPU's memory needs a CUDA device")
    store = copy_up_to(undisturbed, tmp_path, "sft", os.link)
    ended = train_with_little_memory(undisturbed, store, shape)
    assert ended.returncode == 14, ended.stdout + ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("sft: error: the GPU's memory is too small")
    assert "sft.on_out_of_memory to halve_micro_batch" in last
    assert not list((store / "artifacts").glob("sft/*"))


def test_after_running_out_of_gpu_memory_a_process_with_half_the_rows_has_all_memory(
    undisturbed: Path, tmp_path: Path, shape: Shape, cuda: bool
) -> None:
    if INTERPRETED or not cuda:
        pytest.skip("a limit on a GPU's memory needs a CUDA device")
    store = copy_up_to(undisturbed, tmp_path, "sft", os.link)
    ended = train_with_little_memory(undisturbed, store, shape, "sft.on_out_of_memory=halve_micro_batch")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "memory ran out with micro-batches of up to 48 rows: restarts with 24" in ended.stdout
    assert list((store / "artifacts").glob("sft/*/manifest.json"))


def train_with_little_memory(
    undisturbed: Path, store: Path, shape: Shape, *options: str
) -> "subprocess.CompletedProcess[str]":
    """Run sft in a process that may use little memory of the card; a process that replaces it may use all."""
    code = (
        "import torch; whole = torch.cuda.get_device_properties(0).total_memory\n"
        f"torch.cuda.set_per_process_memory_fraction({_LIMIT_BYTES[shape.name]} / whole, 0)\n"
        "from llamarefine_jobs import entry, sft; entry.main('sft', sft.work)"
    )
    changes = [
        word for option in ("sft.batch_rows=48", "sft.micro_batch_rows=48", *options) for word in ("--set", option)
    ]
    command = [sys.executable, "-c", code, "--recipe", undisturbed / "recipe.yaml", "--store", store, *changes]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, timeout=400)


def test_both_backends_give_the_same_log_probabilities_and_gradients(
    shape: Shape, prepared: Path, trained: Path, tmp_path: Path, cuda: bool
) -> None:
    """Equal within bf16 rounding; on the CPU, where Unsloth does not run, the packed backend replaces it."""
    if cuda and importlib.util.find_spec("unsloth") is None:
        pytest.skip("unsloth is not installed: there is one backend only")
    names = ["transformers", "unsloth"] if cuda else ["transformers", "packed"]
    files = [tmp_path / f"{place}.safetensors" for place in range(2)]
    answers = [run_backend(name, prepared, trained / "adapter", file) for name, file in zip(names, files, strict=True)]
    assert [answer["backend"] for answer in answers] == names
    for model in ("base", "sft"):
        one, other = (answer["nats_per_token"][model] for answer in answers)
        distance = sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)
        assert distance < (3e-2 if cuda else 1e-6), (
            f"{model}: {distance} nats per token apart at the shape {shape.name}"
        )
    one, other = map(load_file, files)
    assert one.keys() == other.keys()
    for layer in ("lora_A", "lora_B"):
        first, second = (
            torch.cat([found[name].flatten() for name in sorted(found) if layer in name]) for found in (one, other)
        )
        assert float(first.norm()) > 0
        apart = float((first - second).norm() / first.norm())
        assert apart < (5e-2 if cuda else 1e-6), (
            f"{layer}: the gradients differ by {apart:.1%} at the shape {shape.name}"
        )


def run_backend(backend: str, prepared: Path, adapter: Path, gradient: Path) -> dict[str, Any]:
    """Run tests.gpu.logprobs with this backend; return what it prints."""
    command = [sys.executable, "-m", "tests.gpu.logprobs", backend, *map(str, (prepared, adapter, gradient))]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def adapter_of(store: Path, stage: str) -> dict[str, torch.Tensor]:
    (weights,) = (store / "artifacts" / stage).rglob("adapter_model.safetensors")
    return load_file(weights)
