"""Several processes train what one process trains: real trainers, gloo on the CPU.

Sums are made in another order, and Adam divides small gradients by small numbers: weights of up to 0.2 are compared
within 1e-5 (6e-7 was seen), losses too.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llamarefine_jobs.contract.errors import (
    DataError,
    Disposition,
    LlamaRefineError,
    PeerLostError,
    PreemptedError,
    RecipeError,
    by_exit_code,
)
from llamarefine_jobs.process.world import World
from tests.jobs import processes, tiny

STAGES = ("sft", "dpo")
# Sixty rows in batches of eight: the last one of an epoch has four of its own.
IN_ONE = ("{0}.micro_batch_rows=4",)
IN_TWO = ("{0}.micro_batch_rows=4", "{0}.gpus=2")
TOLERANCE = 1e-5


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
        assert other["metrics"][name] == pytest.approx(one["metrics"][name], abs=TOLERANCE)
    assert one["metrics"]["best_step"] == other["metrics"]["best_step"]
    histories = [run["metrics"]["history"] for run in (one, other)]
    assert len(histories[0]) == len(histories[1])
    for expected_row, found_row in zip(*histories, strict=True):
        assert found_row == pytest.approx(expected_row, abs=1e-4)
    weights = adapter(found, stage)
    for name, tensor in adapter(expected, stage).items():
        torch.testing.assert_close(weights[name], tensor, atol=TOLERANCE, rtol=0)


def test_told_to_stop_both_end_at_one_step_and_go_on_to_the_same_result(
    in_one: Path, in_two: Callable[[str], tuple[Path, list[str]]], tmp_path: Path
) -> None:
    store = copy_up_to(in_one, tmp_path, "sft")
    process = processes.start("sft", in_one / "recipe.yaml", str(store), *given("sft", IN_TWO))
    lines = processes.signal_when(process, signal.SIGTERM, lambda line: processes.step(line) == 5)
    assert process.returncode == 30, "\n".join(lines)
    assert "its checkpoint at step" in lines[-1]
    assert len([line for line in lines if "error:" in line]) == 1, "one word for both"
    (states,) = (store / "checkpoints" / "sft").rglob("rng_state_1.pth")
    assert (states.parent / "rng_state_0.pth").exists()
    other = tmp_path / "other"
    shutil.copytree(store, other)
    exit_code, lines = processes.run("sft", in_one / "recipe.yaml", str(store), *given("sft", IN_TWO))
    assert exit_code == 0, "\n".join(lines)
    assert any("goes on from the checkpoint" in line for line in lines)
    undisturbed, _ = in_two("sft")
    assert processes.sha256s(store, "sft") == processes.sha256s(undisturbed, "sft"), "it is another adapter"
    # And in one process, where the machine for two is gone.
    exit_code, lines = processes.run("sft", in_one / "recipe.yaml", str(other), *given("sft", IN_ONE))
    assert exit_code == 0, "\n".join(lines)
    assert any("goes on from the checkpoint" in line for line in lines)
    assert_the_same_training(other, in_one / "store", "sft")


def test_a_process_that_is_killed_ends_all_and_the_training_goes_on_from_its_checkpoint(
    in_one: Path, in_two: Callable[[str], tuple[Path, list[str]]], tmp_path: Path
) -> None:
    store = copy_up_to(in_one, tmp_path, "sft")
    often = "{0}.checkpoint_every_steps=3"
    process = processes.start("sft", in_one / "recipe.yaml", str(store), *given("sft", IN_TWO, often))
    members: list[int] = []
    lines = []
    assert process.stdout
    for line in process.stdout:
        lines.append(line.rstrip())
        if processes.step(line) == 5:
            members = children(process.pid)
            os.kill(members[1], signal.SIGKILL)
    assert process.wait(timeout=60) == PeerLostError.exit_code, "\n".join(lines)
    assert by_exit_code(process.returncode).disposition is Disposition.RETRY
    assert len(members) == 2
    assert not any(map(is_alive, members))
    assert "was killed by SIGKILL" in lines[-1]
    exit_code, lines = processes.run("sft", in_one / "recipe.yaml", str(store), *given("sft", IN_TWO, often))
    assert exit_code == 0, "\n".join(lines)
    # It may be at work for some more steps before the signal reaches it.
    assert any(re.fullmatch(r"sft: goes on from the checkpoint at step [369]", line) for line in lines)
    undisturbed, _ = in_two("sft")
    assert processes.sha256s(store, "sft") == processes.sha256s(undisturbed, "sft"), "it is another adapter"


def test_an_agent_that_is_killed_leaves_no_process_behind(in_one: Path, tmp_path: Path) -> None:
    store = copy_up_to(in_one, tmp_path, "sft")
    process = processes.start("sft", in_one / "recipe.yaml", str(store), *given("sft", IN_TWO))
    members: list[int] = []
    assert process.stdout
    for line in process.stdout:  # ends when the last process that could write is gone
        if processes.step(line) == 2:
            members = children(process.pid)
            process.kill()
    assert len(members) == 2
    until_s = time.monotonic() + 60
    while any(map(is_alive, members)):
        assert time.monotonic() < until_s, "processes outlive their agent"
        time.sleep(0.1)
    assert not (store / "artifacts" / "sft").exists()


def test_two_nodes_train_what_one_trains_and_the_first_publishes(in_one: Path, tmp_path: Path) -> None:
    """Two agents on this machine, as two pods are: each fetches for itself, and nothing but the network is shared."""
    store = copy_up_to(in_one, tmp_path, "dpo")
    overrides = given("dpo", ("{0}.micro_batch_rows=4", "{0}.nodes=2"))
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    nodes = [
        processes.start("dpo", in_one / "recipe.yaml", str(store), *overrides, environment=place | {"NODE_RANK": rank})
        for rank in ("1", "0")
    ]
    second, first = [node.communicate(timeout=400)[0].splitlines() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join([*first, *second])
    assert_the_same_training(store, in_one / "store", "dpo")
    assert any("published" in line for line in first)
    assert "dpo: trains in 2 processes, 1 on each node, this is node 1" in second
    assert not any("progress" in line or "published" in line for line in second)


def test_a_node_that_waits_for_another_ends_when_it_is_told_to(in_one: Path, tmp_path: Path) -> None:
    store = copy_up_to(in_one, tmp_path, "sft")
    overrides = given("sft", ("{0}.micro_batch_rows=4", "{0}.nodes=2"))
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0"}
    process = processes.start("sft", in_one / "recipe.yaml", str(store), *overrides, environment=place)
    lines = processes.signal_when(process, signal.SIGTERM, lambda line: "trains in" in line)
    assert process.returncode == PreemptedError.exit_code, "\n".join(lines)


def test_a_node_that_does_not_know_its_place_is_refused_in_one_line(in_one: Path, tmp_path: Path) -> None:
    store = copy_up_to(in_one, tmp_path, "sft")
    overrides = given("sft", ("{0}.micro_batch_rows=4", "{0}.nodes=2"))
    exit_code, lines = processes.run("sft", in_one / "recipe.yaml", str(store), *overrides)
    assert exit_code == RecipeError.exit_code
    assert lines[-1].startswith("sft: error: sft.nodes is 2: expected MASTER_ADDR and a NODE_RANK from 0 to 1")
    assert "Traceback" not in "\n".join(lines)


@pytest.mark.parametrize("batch_rows", [8, 7, 60, 100])
def test_every_row_is_trained_once_an_epoch_and_each_batch_is_whole(batch_rows: int) -> None:
    from llamarefine_jobs.training.batches import WholeBatches

    orders = [list(WholeBatches(60, batch_rows, 3, lambda epoch=epoch: epoch)) for epoch in (0, 1)]
    for order in orders:
        assert len(order) % batch_rows == 0
        assert sorted(order[:60]) == list(range(60))
        assert order[60:] == (order[:60] * 2)[: len(order) - 60]
    assert orders[0] != orders[1]
    assert orders[0] == list(WholeBatches(60, batch_rows, 3, lambda: 0))


def test_each_step_takes_the_same_rows_from_the_longest_to_the_shortest() -> None:
    from llamarefine_jobs.training.batches import WholeBatches

    lengths = [place * 37 % 50 for place in range(60)]
    order, by_length = (list(WholeBatches(60, 8, 3, lambda: 1, known)) for known in (None, lengths))
    for start in range(0, len(order), 8):
        step = by_length[start : start + 8]
        assert sorted(step) == sorted(order[start : start + 8])
        assert [lengths[row] for row in step] == sorted((lengths[row] for row in step), reverse=True)


def test_parts_of_the_rows_hold_each_row_once() -> None:
    rows = list(range(11))
    for size in (1, 2, 3, 16):
        parts = [World(rank=rank, size=size).share(rows) for rank in range(size)]
        assert sorted(row for part in parts for row in part) == rows


@pytest.mark.parametrize(
    ("codes", "told", "expected"),
    [
        ({0: 21, 1: 11}, False, (DataError, "words of 1")),  # one found bad data, the other lost it
        ({0: 21, 1: -9}, False, (PeerLostError, "process 1 of 2 was killed by SIGKILL")),
        ({0: 30, 1: 30}, True, (PreemptedError, "words of 0")),
        ({0: -15, 1: 30}, True, (PreemptedError, "words of 1")),  # it was leaving, too
        ({0: -15, 1: 30}, False, (PreemptedError, "words of 1")),  # another node was told
        ({0: 21, 1: 30}, True, (PreemptedError, "words of 1")),
        ({0: 21, 1: 30}, False, (PeerLostError, "words of 0")),  # torch ended the other one, which had nothing to save
        ({0: -15, 1: -15}, True, (PreemptedError, "ended before it had saved")),
        ({0: 1, 1: 21}, False, (LlamaRefineError, "words of 0")),
    ],
)
def test_the_cause_is_told_and_not_what_follows_from_it(
    codes: dict[int, int], told: bool, expected: tuple[type[LlamaRefineError], str], tmp_path: Path
) -> None:
    from llamarefine_jobs.process.agent import Agent

    agent = Agent("sft", tiny.recipe("sft.gpus=2", "sft.micro_batch_rows=4").sft, tmp_path)
    for rank in codes:
        (tmp_path / f"last-words-{rank}").write_text(json.dumps({"message": f"words of {rank}"}))
    error = agent._how_it_ended(codes, told=told)
    assert type(error) is expected[0]
    assert expected[1] in str(error)


def test_a_batch_that_the_processes_cannot_share_is_refused() -> None:
    with pytest.raises(RecipeError, match="batch_rows 8 is shared by 3 gpus x 1 nodes: it must be a multiple of 12"):
        tiny.recipe("sft.gpus=3")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def children(pid: int) -> list[int]:
    """The processes that a process started, by age."""
    found = subprocess.run(["pgrep", "-P", str(pid), "-f", "llamarefine_jobs.worker"], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
