"""Training in several processes gives the same result as in one: real trainings, gloo on the CPU.

Several processes add numbers in another order, and Adam divides small gradients by small numbers. So losses, and
weights of up to 0.2, are compared with a tolerance of 1e-5. The largest difference so far was 6e-7.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llamarefine_jobs.contract.environment import GIVE_UP_VARIABLE, SHARED_FOLDER
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
from llamarefine_jobs.recipe_file import parse_recipe, to_yaml
from llamarefine_jobs.sources.pinning import pin
from tests.jobs import processes, tiny

STAGES = ("sft", "dpo")
# Sixty rows in batches of eight: the last batch of an epoch has four new rows.
IN_ONE = ("{0}.micro_batch_rows=4",)
IN_TWO = ("{0}.micro_batch_rows=4", "{0}.gpus=2")
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def in_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with recipe.yaml and a store in which sft and dpo were trained in one process."""
    from llamarefine_jobs.store import Store

    folder = tmp_path_factory.mktemp("in-one")
    (folder / "recipe.yaml").write_text(tiny.RECIPE)
    tiny.publish_prepared(Store(str(folder / "store")), tiny.write_prepared(folder / "prepared"), tiny.recipe())
    for stage in STAGES:
        exit_code, lines = processes.run(
            stage, folder / "recipe.yaml", str(folder / "store"), *options_for(stage, IN_ONE)
        )
        assert exit_code == 0, "\n".join(lines)
    return folder


@pytest.fixture(scope="module")
def in_two(in_one: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[str]]]:
    """Return a function that trains a stage in two processes, once per module, and returns its store and its lines."""
    done: dict[str, tuple[Path, list[str]]] = {}

    def train(stage: str) -> tuple[Path, list[str]]:
        if stage not in done:
            store = copy_up_to(in_one, tmp_path_factory.mktemp(f"in-two-{stage}"), stage)
            exit_code, lines = processes.run(stage, in_one / "recipe.yaml", str(store), *options_for(stage, IN_TWO))
            assert exit_code == 0, "\n".join(lines)
            done[stage] = (store, lines)
        return done[stage]

    return train


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_the_same_adapter_as_one(
    stage: str, in_one: Path, in_two: Callable[[str], tuple[Path, list[str]]]
) -> None:
    store, lines = in_two(stage)
    assert_same_training(store, in_one / "store", stage)
    assert manifest(store, stage)["metrics"]["processes"] == 2
    # Only rank 0 prints: every step is reported once.
    assert [step for line in lines if (step := processes.step(line)) is not None] == list(range(17))
    assert len([line for line in lines if "published" in line]) == 1
    assert f"{stage}: trains in 2 processes, 2 on each node" in lines


def test_two_processes_train_although_a_source_was_removed_after_prepare(tmp_path: Path) -> None:
    from llamarefine_jobs.store import Store

    source = tmp_path / "questions.csv"
    source.write_text("question,answer\nWhat is a source?,A file.\n")
    text = tiny.RECIPE.replace("questions: {source: python-docstrings}", f"questions: {{source: {source}}}")
    recipe = pin(parse_recipe(text, "recipe.yaml"))
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    tiny.publish_prepared(Store(str(tmp_path / "store")), tiny.write_prepared(tmp_path / "prepared"), recipe)
    source.unlink()
    options = options_for("sft", IN_TWO, "{0}.max_steps=2")
    exit_code, lines = processes.run("sft", tmp_path / "recipe.yaml", str(tmp_path / "store"), *options)
    assert exit_code == 0, "\n".join(lines)


def options_for(stage: str, overrides: tuple[str, ...], *more: str) -> list[str]:
    """Return `--set` options with the stage's name filled in."""
    return [word for each in (*overrides, *more) for word in ("--set", each.format(stage))]


def copy_up_to(done: Path, folder: Path, stage: str) -> Path:
    """Copy the store of `done` without the artifacts of `stage` and later stages; return the copy."""
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


def assert_same_training(found: Path, expected: Path, stage: str) -> None:
    one, other = manifest(expected, stage), manifest(found, stage)
    assert one["key"] == other["key"], "the number of processes must not be part of the key"
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


def test_sigterm_saves_one_checkpoint_of_both_processes_and_the_resumed_result_is_the_same(
    in_one: Path, in_two: Callable[[str], tuple[Path, list[str]]], tmp_path: Path
) -> None:
    store = copy_up_to(in_one, tmp_path, "sft")
    waiting = processes.wait_at_step(5)
    options = options_for("sft", IN_TWO)
    process = processes.start("sft", in_one / "recipe.yaml", str(store), *options, environment=waiting)
    lines = processes.signal_when(process, signal.SIGTERM, lambda line: processes.step(line) == 5)
    assert process.returncode == 30, "\n".join(lines)
    assert "its checkpoint at step 5 is in the store" in lines[-1]
    assert len([line for line in lines if "error:" in line]) == 1, "only the agent prints the error"
    other = tmp_path / "other"
    shutil.copytree(store, other)
    exit_code, lines = processes.run("sft", in_one / "recipe.yaml", str(store), *options_for("sft", IN_TWO))
    assert exit_code == 0, "\n".join(lines)
    assert any("resumes from the checkpoint" in line for line in lines)
    undisturbed, _ = in_two("sft")
    assert processes.sha256s(store, "sft") == processes.sha256s(undisturbed, "sft"), "the adapter differs"
    # Resume the same checkpoint in one process.
    exit_code, lines = processes.run("sft", in_one / "recipe.yaml", str(other), *options_for("sft", IN_ONE))
    assert exit_code == 0, "\n".join(lines)
    assert any("resumes from the checkpoint" in line for line in lines)
    assert_same_training(other, in_one / "store", "sft")


def test_a_killed_worker_ends_the_training_which_then_resumes_from_its_checkpoint(
    in_one: Path, in_two: Callable[[str], tuple[Path, list[str]]], tmp_path: Path
) -> None:
    store = copy_up_to(in_one, tmp_path, "sft")
    options = options_for("sft", IN_TWO, "{0}.checkpoint_every_steps=3")
    waiting = processes.wait_at_step(5)
    process = processes.start("sft", in_one / "recipe.yaml", str(store), *options, environment=waiting)
    workers: list[int] = []
    lines = []
    assert process.stdout
    for line in process.stdout:
        lines.append(line.rstrip())
        if processes.step(line) == 5:
            workers = children(process.pid)
            os.kill(workers[1], signal.SIGKILL)
    assert process.wait(timeout=60) == PeerLostError.exit_code, "\n".join(lines)
    assert by_exit_code(process.returncode).disposition is Disposition.RETRY
    assert len(workers) == 2
    assert not any(map(is_alive, workers))
    assert "was killed by SIGKILL" in lines[-1]
    exit_code, lines = processes.run("sft", in_one / "recipe.yaml", str(store), *options)
    assert exit_code == 0, "\n".join(lines)
    assert "sft: resumes from the checkpoint at step 3" in lines
    undisturbed, _ = in_two("sft")
    assert processes.sha256s(store, "sft") == processes.sha256s(undisturbed, "sft"), "the adapter differs"


def test_a_killed_agent_leaves_no_worker_behind(in_one: Path, tmp_path: Path) -> None:
    store = copy_up_to(in_one, tmp_path, "sft")
    waiting = processes.wait_at_step(2)
    options = options_for("sft", IN_TWO)
    process = processes.start("sft", in_one / "recipe.yaml", str(store), *options, environment=waiting)
    workers: list[int] = []
    assert process.stdout
    for line in process.stdout:  # ends when the last process that holds the pipe is gone
        if processes.step(line) == 2:
            workers = children(process.pid)
            process.kill()
    assert len(workers) == 2
    until_s = time.monotonic() + 60
    while any(map(is_alive, workers)):
        assert time.monotonic() < until_s, "processes outlive their agent"
        time.sleep(0.1)
    assert not (store / "artifacts" / "sft").exists()


def test_two_nodes_train_the_same_adapter_as_one_and_the_first_node_publishes(in_one: Path, tmp_path: Path) -> None:
    """Two agents on this machine behave like two pods: each downloads for itself, and they share only the network."""
    store = copy_up_to(in_one, tmp_path, "dpo")
    overrides = options_for("dpo", ("{0}.micro_batch_rows=4", "{0}.nodes=2"))
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    nodes = [
        processes.start("dpo", in_one / "recipe.yaml", str(store), *overrides, environment=place | {"NODE_RANK": rank})
        for rank in ("1", "0")
    ]
    second, first = [node.communicate(timeout=400)[0].splitlines() for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join([*first, *second])
    assert_same_training(store, in_one / "store", "dpo")
    assert any("published" in line for line in first)
    assert "dpo: trains in 2 processes, 1 on each node, this is node 1" in second
    assert not any("progress" in line or "published" in line for line in second)


def test_sigterm_ends_a_node_that_waits_for_another(in_one: Path, tmp_path: Path) -> None:
    store = copy_up_to(in_one, tmp_path, "sft")
    overrides = options_for("sft", ("{0}.micro_batch_rows=4", "{0}.nodes=2"))
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0"}
    process = processes.start("sft", in_one / "recipe.yaml", str(store), *overrides, environment=place)
    lines = processes.signal_when(process, signal.SIGTERM, lambda line: "trains in" in line)
    assert process.returncode == PreemptedError.exit_code, "\n".join(lines)


def test_a_node_without_a_rank_is_refused_in_one_line(in_one: Path, tmp_path: Path) -> None:
    store = copy_up_to(in_one, tmp_path, "sft")
    overrides = options_for("sft", ("{0}.micro_batch_rows=4", "{0}.nodes=2"))
    exit_code, lines = processes.run("sft", in_one / "recipe.yaml", str(store), *overrides)
    assert exit_code == RecipeError.exit_code
    assert lines[-1].startswith("sft: error: sft.nodes is 2: expected MASTER_ADDR and a NODE_RANK from 0 to 1")
    assert "Traceback" not in "\n".join(lines)


@pytest.mark.parametrize("batch_rows", [8, 7, 60, 100])
def test_every_epoch_has_each_row_once_and_only_whole_batches(batch_rows: int) -> None:
    from llamarefine_jobs.training.schedule import Schedule

    section = tiny.recipe(f"sft={{batch_rows: {batch_rows}, epochs: 2}}").sft
    schedule = Schedule(section, 60, 3)
    steps = [schedule.rows_of(step) for step in range(1, schedule.steps + 1)]
    assert {len(rows) for rows in steps} == {batch_rows}
    half = len(steps) // 2
    orders = [[row for rows in part for row in rows] for part in (steps[:half], steps[half:])]
    for order in orders:
        assert sorted(order[:60]) == list(range(60))
        assert order[60:] == (order[:60] * 2)[: len(order) - 60]
    assert orders[0] != orders[1]
    assert steps == [Schedule(section, 60, 3).rows_of(step) for step in range(1, schedule.steps + 1)]
    assert steps != [Schedule(section, 60, 4).rows_of(step) for step in range(1, schedule.steps + 1)]


@pytest.mark.parametrize("processes_together", [1, 2, 4])
def test_the_processes_share_the_rows_of_each_step_and_about_its_tokens(processes_together: int) -> None:
    """As Trainer.own_examples shares them, for rows of very different lengths."""
    from types import SimpleNamespace

    from llamarefine_jobs.models.encoding import Encoded
    from llamarefine_jobs.training.loop import Trainer
    from llamarefine_jobs.training.objectives import Example
    from llamarefine_jobs.training.schedule import Schedule

    examples = [Example((Encoded([1], [2] * (1 + row * 37 % 50)),)) for row in range(60)]
    schedule = Schedule(tiny.recipe().sft, 60, 3)
    for step in range(1, schedule.steps + 1):
        shares = []
        for rank in range(processes_together):
            world = SimpleNamespace(world=World(rank=rank, size=processes_together))
            trainer: Any = Trainer.__new__(Trainer)  # without a model, which the shares do not depend on
            vars(trainer).update(examples=examples, schedule=schedule, context=world)
            shares.append(trainer.own_examples(step))
        expected = [examples[row] for row in schedule.rows_of(step)]
        assert sorted(map(id, (one for share in shares for one in share))) == sorted(map(id, expected))
        assert {len(share) for share in shares} == {8 // processes_together}
        tokens = [sum(map(len, share)) for share in shares]
        assert max(tokens) - min(tokens) <= max(map(len, expected))


def test_every_row_is_in_exactly_one_shard() -> None:
    rows = list(range(11))
    for size in (1, 2, 3, 16):
        shards = [World(rank=rank, size=size).shard(rows) for rank in range(size)]
        assert sorted(row for shard in shards for row in shard) == rows


JOIN = """
import os
import torch
import torch.distributed as dist
from llamarefine_jobs.process import world

store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
os.environ["MASTER_PORT"] = str(store.port)
world.join()
group = dist.distributed_c10d._get_default_group()
backend = group._get_backend(torch.device("cpu"))
print(backend.options._timeout.total_seconds())
print(dist.distributed_c10d._get_default_store().timeout.total_seconds())
"""


@pytest.mark.parametrize(("give_up_after_s", "expected_s"), [(None, 900), ("1800", 2100)])
def test_a_process_waits_for_the_others_longer_than_an_outage_is_retried(
    give_up_after_s: str | None, expected_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 may be publishing a checkpoint to an unreachable bucket; the others must not report rank 0 as lost."""
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (place | {SHARED_FOLDER: str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    if give_up_after_s:
        monkeypatch.setenv(GIVE_UP_VARIABLE, give_up_after_s)
    else:
        monkeypatch.delenv(GIVE_UP_VARIABLE, raising=False)
    ended = subprocess.run([sys.executable, "-c", JOIN], capture_output=True, text=True, check=False, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert [float(line) for line in ended.stdout.splitlines()] == [expected_s, expected_s]


@pytest.mark.parametrize(
    ("codes", "is_stopping", "expected"),
    [
        ({0: 21, 1: 11}, False, (DataError, "message of 1")),  # rank 1 found bad data, rank 0 lost its peer
        ({0: 21, 1: -9}, False, (PeerLostError, "process 1 of 2 was killed by SIGKILL")),
        ({0: 30, 1: 30}, True, (PreemptedError, "message of 0")),
        ({0: -15, 1: 30}, True, (PreemptedError, "message of 1")),  # torch killed rank 0, which was stopping, too
        ({0: -15, 1: 30}, False, (PreemptedError, "message of 1")),  # another node was stopped
        ({0: 21, 1: 30}, True, (PreemptedError, "message of 1")),
        ({0: 21, 1: 30}, False, (PeerLostError, "message of 0")),  # torch stopped rank 1, which had nothing to save
        ({0: -15, 1: -15}, True, (PreemptedError, "was killed before it had saved")),
        ({0: 1, 1: 21}, False, (LlamaRefineError, "message of 0")),
    ],
)
def test_the_root_cause_is_reported_and_not_its_consequences(
    codes: dict[int, int], is_stopping: bool, expected: tuple[type[LlamaRefineError], str], tmp_path: Path
) -> None:
    from llamarefine_jobs.process.agent import Agent

    agent = Agent("sft", tiny.recipe("sft.gpus=2", "sft.micro_batch_rows=4").sft, tmp_path)
    for rank in codes:
        (tmp_path / f"termination-message-{rank}").write_text(json.dumps({"message": f"message of {rank}"}))
    error = agent._root_cause(codes, is_stopping=is_stopping)
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
    """Return the ids of the workers that a process started, oldest first."""
    found = subprocess.run(["pgrep", "-P", str(pid), "-f", "llamarefine_jobs.worker"], capture_output=True, text=True)
    return [int(word) for word in found.stdout.split()]


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
