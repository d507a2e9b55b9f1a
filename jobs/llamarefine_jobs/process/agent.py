"""A training in several processes: what the stage's own process does on each node.

The agent does all that surrounds the work as in one process: it finds the parents, fetches, publishes. Only the work
itself is done by the processes it starts, each with its rank in the environment as torchrun would say it
(torch.distributed.elastic starts and watches them). On several nodes each has its agent; MASTER_ADDR names the first
node's, NODE_RANK or a Job's JOB_COMPLETION_INDEX says which this one is. The first node's agent publishes.
"""

import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from llamarefine_jobs.contract.artifact import Manifest
from llamarefine_jobs.contract.errors import (
    LlamaRefineError,
    PeerLostError,
    PreemptedError,
    RecipeError,
    StoreError,
    by_exit_code,
)
from llamarefine_jobs.contract.recipe import Recipe, Training
from llamarefine_jobs.process.sigterm import SHARED_FOLDER
from llamarefine_jobs.process.world import MEET_TIMEOUT_S
from llamarefine_jobs.recipe_file import to_yaml
from llamarefine_jobs.store import Store

OUTCOME = "outcome.json"
MEMBER = "llamarefine_jobs.worker"
_PORT = 29500  # torch's own habit
_GLANCE_S = 0.2
_TOGETHER_S = 5.0  # failures so close have one cause


@dataclass(frozen=True)
class Node:
    """This machine's place in a training."""

    rank: int
    nodes: int
    gpus: int
    address: str  # of the first node
    port: int  # there; 0 takes a free one

    @property
    def is_first(self) -> bool:
        """Whether this node's agent publishes."""
        return self.rank == 0


def find_node(stage: str, section: Training) -> Node:
    """Where this machine stands, by the recipe and the environment; RecipeError where they do not fit."""
    import torch

    there = torch.cuda.device_count()
    if torch.cuda.is_available() and section.gpus > there:
        raise RecipeError(f"{stage}.gpus: expected at most the {there} of this machine, found {section.gpus}")
    if section.nodes == 1:
        return Node(rank=0, nodes=1, gpus=section.gpus, address="127.0.0.1", port=0)
    said = os.environ.get("NODE_RANK") or os.environ.get("JOB_COMPLETION_INDEX") or ""
    address = os.environ.get("MASTER_ADDR")
    if not address or not said.isdecimal() or int(said) >= section.nodes:
        raise RecipeError(
            f"{stage}.nodes is {section.nodes}: expected MASTER_ADDR and a NODE_RANK from 0 to {section.nodes - 1} in "
            f"the environment of each, found {address or 'none'} and {said or 'none'}; on one machine set "
            f"{stage}.nodes to 1"
        )
    return Node(int(said), section.nodes, section.gpus, address, int(os.environ.get("MASTER_PORT", _PORT)))


def find_agent(stage: str, recipe: Recipe, shared: Path) -> "Agent | None":
    """Who has a stage's work done in several processes; None where the recipe asks for one."""
    section = recipe.section(stage)
    if not isinstance(section, Training):
        return None
    if section.processes == 1:
        _hold_to_one_gpu(os.environ)
        return None
    agent = Agent(stage, section, shared)
    where = f", this is node {agent.node.rank}" if section.nodes > 1 else ""
    print(f"{stage}: trains in {section.processes} processes, {section.gpus} on each node{where}", flush=True)
    return agent


class Agent:
    """Starts the processes of one node, passes SIGTERM on to them, and tells how they ended."""

    def __init__(self, stage: str, section: Training, shared: Path) -> None:
        self.node = find_node(stage, section)
        self._stage = stage
        self._shared = shared

    def work(self, recipe: Recipe, store_uri: str, stop: Any) -> dict[str, Any]:
        """Do the stage's work in processes; what the first one of all leaves of metrics, on the first node."""
        file = self._shared / "recipe.yaml"
        file.write_text(to_yaml(recipe), encoding="utf-8")
        with self._meeting_point() as port:
            arguments = ("-m", MEMBER, self._stage, "--recipe", str(file), "--store", store_uri)
            with self._processes(arguments, port, recipe.cpu_threads) as processes:
                self._follow(processes, stop)
        outcome = self._shared / OUTCOME
        found: dict[str, Any] = json.loads(outcome.read_text(encoding="utf-8")) if self.node.is_first else {}
        return found

    def await_publication(self, store: Store, key: str, stop: Any) -> Manifest:
        """On another node than the first: the manifest, once the first one has published it.

        Were this node to end earlier, a first node that fails to publish could not train again without it.
        """
        until_s = time.monotonic() + MEET_TIMEOUT_S
        while time.monotonic() < until_s:
            with contextlib.suppress(StoreError):
                manifest = store.manifest(self._stage, key)
                if manifest is not None:
                    return manifest
            if stop.is_set():
                raise PreemptedError(f"{self._stage} was told to stop while the first node published")
            if not self._first_is_there():
                break
            time.sleep(_GLANCE_S * 5)
        manifest = store.manifest(self._stage, key)
        if manifest is None:
            raise PeerLostError(f"{self._stage}: the first node went without publishing; the training goes on with it")
        return manifest

    @contextlib.contextmanager
    def _meeting_point(self) -> Iterator[int]:
        """The port where all processes meet; on the first node it is held open here, until all is published."""
        if not self.node.is_first:
            yield self.node.port
            return
        import torch.distributed as dist

        listen = self.node.address if self.node.nodes == 1 else "0.0.0.0"  # noqa: S104 the other nodes come to it
        try:
            self._store = dist.TCPStore(
                listen, self.node.port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
            )
        except (RuntimeError, OSError) as error:
            raise PeerLostError(f"port {self.node.port} cannot be opened for the processes to meet: {error}") from None
        yield self._store.port

    def _first_is_there(self) -> bool:
        import torch.distributed as dist

        try:
            dist.TCPStore(self.node.address, self.node.port, is_master=False, timeout=timedelta(seconds=5))
        except (RuntimeError, OSError):
            return False
        return True

    @contextlib.contextmanager
    def _processes(self, arguments: tuple[str, ...], port: int, cpu_threads: int | None) -> Iterator[Any]:
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what happened is ours to tell
        # It would answer SIGTERM with an exception; the stage's own handler has a checkpoint saved first.
        os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"
        logs = self._shared / "processes"
        logs.mkdir()
        local = range(self.node.gpus)
        processes = start_processes(
            name=self._stage,
            entrypoint=sys.executable,
            args=dict.fromkeys(local, arguments),
            envs={rank: self._environment(rank, port, cpu_threads) for rank in local},
            logs_specs=DefaultLogsSpecs(log_dir=str(logs)),
        )
        try:
            yield processes
        finally:
            processes.close(signal.SIGKILL, timeout=5)

    def _environment(self, local_rank: int, port: int, cpu_threads: int | None) -> dict[str, str]:
        self._last_words(local_rank).touch()
        threads = cpu_threads or max(1, (os.cpu_count() or 1) // self.node.gpus)
        return {
            "RANK": str(self.node.rank * self.node.gpus + local_rank),
            "WORLD_SIZE": str(self.node.nodes * self.node.gpus),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(self.node.gpus),
            "MASTER_ADDR": self.node.address,
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
            # Each try to meet nodes that are still on their way would print a warning.
            "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
            SHARED_FOLDER: str(self._shared),
            "LLAMAREFINE_TERMINATION_MESSAGE": str(self._last_words(local_rank)),
            "LLAMAREFINE_STOP_AT_EOF": "0",  # the agent watches for it
        }

    def _follow(self, processes: Any, stop: Any) -> None:
        told = False
        while (result := processes.wait(timeout=0)) is None:
            if stop.is_set() and not told:
                told = True
                for pid in processes.pids().values():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGTERM)
            time.sleep(_GLANCE_S)
        if result.is_failed():
            first_s = min(failure.timestamp for failure in result.failures.values())
            codes = {
                rank: failure.exitcode
                for rank, failure in sorted(result.failures.items())
                if failure.timestamp - first_s <= _TOGETHER_S
            }
            raise self._how_it_ended(codes, told=told)

    def _how_it_ended(self, codes: dict[int, int], *, told: bool) -> LlamaRefineError:
        """The error that is the cause; the others only lost it."""
        rank = min(codes, key=lambda rank: _order(codes[rank], told=told))
        code = codes[rank]
        if code < 0 and told:
            return PreemptedError(f"{self._stage} was ended before it had saved")
        if code < 0:
            number = self.node.rank * self.node.gpus + rank
            return PeerLostError(
                f"process {number} of {self.node.nodes * self.node.gpus} was killed by {signal.Signals(-code).name}; "
                f"if it was for want of memory, lower {self._stage}.micro_batch_rows; the same command goes on from "
                "the last checkpoint"
            )
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return by_exit_code(code)(str(json.loads(self._last_words(rank).read_bytes())["message"]))
        return by_exit_code(code)(f"process {rank} of {self._stage} ended with exit code {code}; its log may say more")

    def _last_words(self, local_rank: int) -> Path:
        return self._shared / f"last-words-{local_rank}"


def _hold_to_one_gpu(environment: MutableMapping[str, str]) -> None:
    """In one process transformers' trainer takes every GPU it sees, and a batch of batch_rows on each."""
    first = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    environment["CUDA_VISIBLE_DEVICES"] = first


def _order(code: int, *, told: bool) -> int:
    """What ends a training, before what follows from it: a reason, a death, a bug, a stop, a lost peer."""
    if code == -signal.SIGTERM:
        return 6  # by torch, as soon as the first one leaves: this one was leaving, too
    if code < 0:
        return 1
    kind = by_exit_code(code)
    if kind is PreemptedError:
        return 4
    if kind is PeerLostError:  # where nobody told this node to stop, torch told the rest when the first one had left
        return 5 if told else 3
    return 2 if kind is LlamaRefineError else 0
