"""The group of processes that train together: ranks, and collectives for the few numbers that they exchange.

A training in one process is a world of size 1, whose collectives return at once. Collectives run over gloo on the CPU,
whatever backend the gradients use, because they exchange only a few numbers.
"""

import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from llamarefine_jobs.contract.environment import SHARED_FOLDER
from llamarefine_jobs.contract.errors import PeerLostError, PreemptedError, first_line
from llamarefine_jobs.contract.retry import give_up_after_s

MEET_TIMEOUT_S = 1800  # other nodes may still pull their image; the launcher's start watchdog ends the wait earlier
_CHECKPOINT_UPLOAD_S = 300
_CONNECT_TIMEOUT_S = 3
_POLL_S = 0.3
_KILLED = 137
# Messages of gloo, NCCL and their store when the other side is gone; most of them come as a plain RuntimeError.
_LOST_PEER = re.compile(
    r"gloo|NCCL (error|communicator|operation|watchdog)|ProcessGroup|Connection (closed|reset|refused|was likely)"
    r"|Broken pipe|recvValue failed|failed to recv|TCPStore|[Tt]imed out after|client socket has timed out"
)

Item = TypeVar("Item")


@dataclass(frozen=True)
class World:
    """The processes that train together, and the rank of this one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    shared: Path | None = None  # folder shared by the processes of this node

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which reports progress, publishes checkpoints and leaves the output for the agent."""
        return self.rank == 0

    @property
    def is_first_on_node(self) -> bool:
        """Whether this process downloads and prepares files for all processes of its node."""
        return self.local_rank == 0

    def shard(self, items: Sequence[Item]) -> Sequence[Item]:
        """Return this process's shard of `items`. Every item is in exactly one process's shard."""
        return items[self.rank :: self.size]

    def any(self, *flags: bool) -> list[bool]:
        """Return for each flag whether it is true in any process; the same result in all processes."""
        return [value > 0 for value in self._all_reduce([float(flag) for flag in flags], "MAX")]

    def sum_over_processes(self, compute: Callable[[], Sequence[float]]) -> list[float]:
        """Call `compute` and return its values summed over all processes, the same in each.

        Raises PreemptedError in all processes if `compute` raises it in any.
        """
        values: Sequence[float] = ()
        preempted = None
        try:
            values = compute()
        except PreemptedError as error:
            preempted = error
        if self.any(preempted is not None)[0]:
            raise preempted or PreemptedError("another process was stopped by SIGTERM")
        return self._all_reduce(values, "SUM")

    def barrier(self) -> None:
        """Block until all processes have called this."""
        self.any(False)

    def copy_from_first(self, weights: Any) -> None:
        """Replace a tensor on the device of this process by the first process's."""
        if self.size > 1:
            import torch.distributed as dist

            dist.broadcast(weights, src=0)

    def sum_gradient(self, gradient: Any) -> None:
        """Replace a gradient on the device of this process by its sum over all processes."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(gradient)

    def agree_on_checkpoint(self, step: int | None) -> int | None:
        """Return the checkpoint step that the first process of each node fetched; `step` of other processes is ignored.

        Raises PeerLostError in all processes if the nodes fetched different checkpoints.
        """
        if self.size == 1:
            return step
        import torch.distributed as dist

        gathered: list[Any] = [None] * self.size
        dist.all_gather_object(gathered, (self.is_first_on_node, step))
        steps: list[int | None] = [step for is_first, step in gathered if is_first]
        if any(other != steps[0] for other in steps):
            raise PeerLostError(f"the nodes fetched different checkpoints, of steps {steps}; they start again")
        return steps[0]

    def shutdown(self) -> None:
        """Leave the process group in order, so that no other process reports this one as lost."""
        if self.size > 1:
            import torch.distributed as dist

            dist.destroy_process_group()

    def _all_reduce(self, values: Sequence[float], operation: str) -> list[float]:
        if self.size == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, op=getattr(dist.ReduceOp, operation))
        reduced: list[float] = tensor.tolist()
        return reduced


def join() -> World:
    """Join the process group that the environment describes, and exit when the agent that started this process ends.

    Raises PeerLostError if not all processes join in time.
    """
    import torch
    import torch.distributed as dist

    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    world = World(
        rank=int(os.environ["RANK"]),
        size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
        shared=Path(os.environ[SHARED_FOLDER]),
    )
    timeout_s = _silence_timeout_s(os.environ)
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(world.local_rank)
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=dist.PrefixStore("group", _connect(world, timeout_s)),
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=timeout_s),
    )
    return world


def _silence_timeout_s(environment: Mapping[str, str]) -> float:
    """Return how many seconds a process waits for a silent peer before that peer counts as lost.

    This is longer than an outage is retried, because rank 0 may be publishing a checkpoint to an unreachable bucket.
    """
    return give_up_after_s(environment) + _CHECKPOINT_UPLOAD_S


def _connect(world: World, timeout_s: float) -> Any:
    """Return the TCPStore of the first node's agent once every process has connected to it.

    Each wait is short, because Python handles no signal during it.
    """
    import torch.distributed as dist

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    until_s = time.monotonic() + MEET_TIMEOUT_S
    while True:
        try:
            store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_CONNECT_TIMEOUT_S))
            store.set(f"here/{world.rank}", "1")
            store.wait([f"here/{rank}" for rank in range(world.size)])
        except (RuntimeError, OSError) as error:
            if time.monotonic() > until_s:
                raise PeerLostError(
                    f"the {world.size} processes did not all meet at {address}:{port} within {MEET_TIMEOUT_S} s: "
                    f"{first_line(error)}"
                ) from None
            time.sleep(_POLL_S)
        else:
            store.set_timeout(timedelta(seconds=timeout_s))
            return store


def means_lost_peer(error: BaseException) -> bool:
    """Return whether `error` is one of torch's errors for a peer that is gone."""
    return isinstance(error, RuntimeError) and _LOST_PEER.search(str(error)) is not None


def _exit_with_parent(parent: int) -> None:
    """Exit as soon as the agent, the parent process, is gone, so that a killed agent leaves no process behind."""
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    os._exit(_KILLED)
