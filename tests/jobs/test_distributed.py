"""Several processes train what one process trains: real trainers, gloo on the CPU.

Sums are made in another order, and Adam divides small gradients by small numbers: adapters are compared within 2e-4,
their losses within 1e-4.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from . import processes, tiny

STAGES = ("sft", "dpo")
# Sixty rows in batches of eight: the last one of an epoch has four of its own.
IN_ONE = ("{0}.micro_batch_rows=4",)
IN_TWO = ("{0}.micro_batch_rows=4", "{0}.gpus=2")
TOLERANCE, LOSS_TOLERANCE = 2e-4, 1e-4


@pytest.fixture(scope="module")
def in_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with recipe.yaml and a store in which prepare, sft and dpo ran, each in one process."""
    from llamarefine_jobs.store import Store

    folder = tmp_path_factory.mktemp("in-one")
    (folder / "recipe.yaml").write_text(tiny.RECIPE)
    tiny.publish_prepared(Store(str(folder / "store")), tiny.write_prepared(folder / "prepared"), tiny.recipe())
    for stage in STAGES:
        exit_code, lines = processes.run(stage, folder / "recipe.yaml", str(folder / "store"), *given(stage, IN_ONE))
        assert exit_code == 0, "\n".join(lines)
    return folder


@pytest.fixture(scope="module")
def in_two(in_one: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[str]]]:
    """A stage trained in two processes, undisturbed: its store and its lines."""
    done: dict[str, tuple[Path, list[str]]] = {}

    def train(stage: str) -> tuple[Path, list[str]]:
        if stage not in done:
            store = copy_up_to(in_one, tmp_path_factory.mktemp(f"in-two-{stage}"), stage)
            exit_code, lines = processes.run(stage, in_one / "recipe.yaml", str(store), *given(stage, IN_TWO))
            assert exit_code == 0, "\n".join(lines)
            done[stage] = (store, lines)
        return done[stage]

    return train


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_what_one_trains(
    stage: str, in_one: Path, in_two: Callable[[str], tuple[Path, list[str]]]
) -> None:
    store, lines = in_two(stage)
    assert_the_same_training(store, in_one / "store", stage)
    assert manifest(store, stage)["metrics"]["processes"] == 2
    # One speaks for both: every step is told once.
    assert [at for line in lines if (at := processes.step(line)) is not None] == list(range(17))
    assert len([line for line in lines if "published" in line]) == 1
    assert f"{stage}: trains in 2 processes, 2 on each node" in lines


def given(stage: str, overrides: tuple[str, ...], *more: str) -> list[str]:
    return [word for each in (*overrides, *more) for word in ("--set", each.format(stage))]


def copy_up_to(done: Path, folder: Path, stage: str) -> Path:
    """A store of its own, as it stands before `stage`."""
    shutil.copytree(done / "store", folder / "store")
    for later in STAGES[STAGES.index(stage) :]:
        shutil.rmtree(folder / "store" / "artifacts" / later)
    return folder / "store"


def manifest(store: Path, stage: str) -> dict[str, Any]:
    (file,) = (store / "artifacts" / stage).rglob("manifest.json")
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def adapter(store: Path, stage: str) -> dict[str, Any]:
    (file,) = (store / "artifacts" / stage).rglob("adapter_model.safetensors")
    return load_file(file)


def assert_the_same_training(found: Path, expected: Path, stage: str) -> None:
    one, other = manifest(expected, stage), manifest(found, stage)
    assert one["key"] == other["key"], "how many processes train is no part of what they make"
    for name in ("validation_loss", "train_loss"):
        assert other["metrics"][name] == pytest.approx(one["metrics"][name], abs=LOSS_TOLERANCE)
    assert one["metrics"]["best_step"] == other["metrics"]["best_step"]
    histories = [run["metrics"]["history"] for run in (one, other)]
    assert len(histories[0]) == len(histories[1])
    for expected_row, found_row in zip(*histories, strict=True):
        assert found_row == pytest.approx(expected_row, abs=1e-3)
    weights = adapter(found, stage)
    for name, tensor in adapter(expected, stage).items():
        torch.testing.assert_close(weights[name], tensor, atol=TOLERANCE, rtol=0)
