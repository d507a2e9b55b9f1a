"""Training in several processes: the agent, which is the stage's own process on each node.

The agent finds the parents, downloads the inputs and publishes, as a stage in one process does. Only the work itself
runs in the worker processes that it starts, each with its rank in the environment variables that torchrun would set
(torch.distributed.elastic starts and watches them). Each of several nodes has its own agent: MASTER_ADDR is the address
of the first node, NODE_RANK or a Job's JOB_COMPLETION_INDEX the rank of this one. The first node's agent publishes.
"""

import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from llamarefine_jobs.contract.artifact import Manifest
from llamarefine_jobs.contract.environment import RENDEZVOUS_PORT, SHARED_FOLDER, STOP_AT_EOF, TERMINATION_MESSAGE
from llamarefine_jobs.contract.errors import (
    LlamaRefineError,
    PeerLostError,
    PreemptedError,
    RecipeError,
    StoreError,
    by_exit_code,
)
from llamarefine_jobs.contract.recipe import Recipe, Training
from llamarefine_jobs.process.world import MEET_TIMEOUT_S
from llamarefine_jobs.recipe_file import to_yaml
from llamarefine_jobs.store import Store

OUTCOME = "outcome.json"
_WORKER_MODULE = "llamarefine_jobs.worker"
_POLL_S = 0.2
_SAME_CAUSE_S = 5.0  # failures of workers within this time have one cause


@dataclass(frozen=True)
class Node:
    """This machine's rank in a training, and where the processes meet."""

    rank: int
    nodes: int
    gpus: int
    address: str  # of the first node
    port: int  # on the first node; 0: any free port

    @property
    def is_first(self) -> bool:
        """Whether this is the first node, whose agent publishes."""
        return self.rank == 0


def find_node(stage: str, section: Training) -> Node:
    """Return this machine's rank and addresses. Raises RecipeError if environment or GPUs do not fit the recipe."""
    import torch

    available = torch.cuda.device_count()
    if torch.cuda.is_available() and section.gpus > available:
        raise RecipeError(f"{stage}.gpus: expected at most the {available} of this machine, found {section.gpus}")
    if section.nodes == 1:
        return Node(rank=0, nodes=1, gpus=section.gpus, address="127.0.0.1", port=0)
    rank = os.environ.get("NODE_RANK") or os.environ.get("JOB_COMPLETION_INDEX") or ""
    address = os.environ.get("MASTER_ADDR")
    if not address or not rank.isdecimal() or int(rank) >= section.nodes:
        raise RecipeError(
            f"{stage}.nodes is {section.nodes}: expected MASTER_ADDR and a NODE_RANK from 0 to {section.nodes - 1} in "
            f"the environment of each node, found {address or 'none'} and {rank or 'none'}; on one machine set "
            f"{stage}.nodes to 1"
        )
    return Node(int(rank), section.nodes, section.gpus, address, int(os.environ.get("MASTER_PORT", RENDEZVOUS_PORT)))


def find_agent(stage: str, recipe: Recipe, shared: Path) -> "Agent | None":
    """Return the agent that runs a stage's work in several processes; None if the recipe wants one process."""
    section = recipe.section(stage)
    if not isinstance(section, Training) or section.processes == 1:
        return None
    agent = Agent(stage, section, shared)
    where = f", this is node {agent.node.rank}" if section.nodes > 1 else ""
    print(f"{stage}: trains in {section.processes} processes, {section.gpus} on each node{where}", flush=True)
    return agent


class Agent:
    """Starts the worker processes of one node, forwards SIGTERM to them, and reports how they ended."""

    def __init__(self, stage: str, section: Training, shared: Path) -> None:
        self.node = find_node(stage, section)
        self._stage = stage
        self._shared = shared

    def work(self, recipe: Recipe, store_uri: str, stop: Any) -> dict[str, Any]:
        """Run the stage's work in worker processes and return rank 0's outcome: backend, accelerator, metrics.

        On other nodes than the first the outcome is empty. Raises the error that made the workers fail.
        """
        file = self._shared / "recipe.yaml"
        file.write_text(to_yaml(recipe), encoding="utf-8")
        with self._meeting_point() as port:
            arguments = ("-m", _WORKER_MODULE, self._stage, "--recipe", str(file), "--store", store_uri)
            with self._processes(arguments, port, recipe.cpu_threads) as processes:
                self._follow(processes, stop)
        outcome = self._shared / OUTCOME
        found: dict[str, Any] = json.loads(outcome.read_text(encoding="utf-8")) if self.node.is_first else {}
        return found

    def await_publication(self, store: Store, key: str, stop: Any) -> Manifest:
        """Return the manifest once the first node has published it; called on the other nodes.

        The other nodes wait because the first node needs them to train again if it fails to publish.
        """
        until_s = time.monotonic() + MEET_TIMEOUT_S
        while time.monotonic() < until_s:
            with contextlib.suppress(StoreError):
                manifest = store.manifest(self._stage, key)
                if manifest is not None:
                    return manifest
            if stop.is_set():
                raise PreemptedError(f"{self._stage} was stopped by SIGTERM while the first node was publishing")
            if not self._is_first_node_reachable():
                break
            time.sleep(_POLL_S * 5)
        manifest = store.manifest(self._stage, key)
        if manifest is None:
            raise PeerLostError(f"{self._stage}: the first node ended without publishing; both start again")
        return manifest

    @contextlib.contextmanager
    def _meeting_point(self) -> Iterator[int]:
        """Yield the port where all workers meet. On the first node, open it; it stays open until this agent ends."""
        if not self.node.is_first:
            yield self.node.port
            return
        import torch.distributed as dist

        listen = self.node.address if self.node.nodes == 1 else "0.0.0.0"  # noqa: S104 the other nodes connect to it
        try:
            self._store = dist.TCPStore(
                listen, self.node.port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60)
            )
        except (RuntimeError, OSError) as error:
            raise PeerLostError(f"cannot open port {self.node.port}, where the processes would meet: {error}") from None
        yield self._store.port

    def _is_first_node_reachable(self) -> bool:
        import torch.distributed as dist

        try:
            dist.TCPStore(self.node.address, self.node.port, is_master=False, timeout=timedelta(seconds=5))
        except (RuntimeError, OSError):
            return False
        return True

    @contextlib.contextmanager
    def _processes(self, arguments: tuple[str, ...], port: int, cpu_threads: int | None) -> Iterator[Any]:
        from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # this agent reports failures itself
        # Otherwise elastic raises an exception on SIGTERM; the stage's own handler lets the workers save a checkpoint.
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
        self._termination_message(local_rank).touch()
        threads = cpu_threads or max(1, (os.cpu_count() or 1) // self.node.gpus)
        return {
            "RANK": str(self.node.rank * self.node.gpus + local_rank),
            "WORLD_SIZE": str(self.node.nodes * self.node.gpus),
            "LOCAL_RANK": str(local_rank),
            "LOCAL_WORLD_SIZE": str(self.node.gpus),
            "MASTER_ADDR": self.node.address,
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
            # Each attempt to connect to a node that is not up yet would print a warning.
            "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
            SHARED_FOLDER: str(self._shared),
            TERMINATION_MESSAGE: str(self._termination_message(local_rank)),
            STOP_AT_EOF: "0",  # only the agent watches its input
        }

    def _follow(self, processes: Any, stop: Any) -> None:
        """Wait for the workers to end, forward SIGTERM once, and raise the root cause if any failed."""
        is_stopping = False
        while (result := processes.wait(timeout=0)) is None:
            if stop.is_set() and not is_stopping:
                is_stopping = True
                for pid in processes.pids().values():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGTERM)
            time.sleep(_POLL_S)
        if result.is_failed():
            first_s = min(failure.timestamp for failure in result.failures.values())
            codes = {
                rank: failure.exitcode
                for rank, failure in sorted(result.failures.items())
                if failure.timestamp - first_s <= _SAME_CAUSE_S
            }
            raise self._root_cause(codes, is_stopping=is_stopping)

    def _root_cause(self, codes: dict[int, int], *, is_stopping: bool) -> LlamaRefineError:
        """Return the root-cause error; the other workers merely lost their peer."""
        rank = min(codes, key=lambda rank: _cause_priority(codes[rank], is_stopping=is_stopping))
        code = codes[rank]
        if code < 0 and is_stopping:
            return PreemptedError(f"{self._stage} was killed before it had saved a checkpoint")
        if code < 0:
            number = self.node.rank * self.node.gpus + rank
            return PeerLostError(
                f"process {number} of {self.node.nodes * self.node.gpus} was killed by {signal.Signals(-code).name}; "
                f"if it was for lack of memory, lower {self._stage}.micro_batch_rows; the same command resumes from "
                "the last checkpoint"
            )
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return by_exit_code(code)(str(json.loads(self._termination_message(rank).read_bytes())["message"]))
        return by_exit_code(code)(f"process {rank} of {self._stage} ended with exit code {code}; see its log")

    def _termination_message(self, local_rank: int) -> Path:
        return self._shared / f"termination-message-{local_rank}"


def _cause_priority(code: int, *, is_stopping: bool) -> int:
    """Return a lower number for a cause than for its consequences.

    The order is: known error, kill, unexpected error, preemption or lost peer, SIGTERM from torch. torch sends SIGTERM
    to the other workers when the first one ends. So a preemption comes before a lost peer only if this node is
    stopping; otherwise torch's SIGTERM is what preempted the worker.
    """
    if code == -signal.SIGTERM:
        return 6
    if code < 0:
        return 1
    kind = by_exit_code(code)
    if kind is PreemptedError:
        return 4
    if kind is PeerLostError:
        return 5 if is_stopping else 3
    return 2 if kind is LlamaRefineError else 0
