"""One process among those that train together: who it is, what they agree on, what they add up.

A training in one process is a world of one: every question here is then answered on the spot. Collectives go over
gloo on the CPU, whatever the gradients take: what is agreed on is a few numbers.
"""

import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from llamarefine_jobs.contract.errors import PeerLostError, PreemptedError, first_line
from llamarefine_jobs.contract.retry import GIVE_UP_AFTER_S
from llamarefine_jobs.process.sigterm import SHARED_FOLDER

MEET_TIMEOUT_S = 1800  # the other nodes may still pull their image; the launcher's start watchdog ends it earlier
# A process that waits longer than this for another takes it for lost. Rank 0 may be publishing a checkpoint meanwhile,
# into a bucket whose outage it waits out.
_SILENCE_TIMEOUT_S = GIVE_UP_AFTER_S + 300
_TRY_S = 3
_GLANCE_S = 0.3
_KILLED = 137
# What gloo, NCCL and their store say when the other side is gone; most of it comes as a plain RuntimeError.
_LOST = re.compile(
    r"gloo|NCCL (error|communicator|operation|watchdog)|ProcessGroup|Connection (closed|reset|refused|was likely)"
    r"|Broken pipe|recvValue failed|failed to recv|TCPStore|[Tt]imed out after|client socket has timed out"
)

Item = TypeVar("Item")


@dataclass(frozen=True)
class World:
    """The processes of a training, and this one's place among them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    shared: Path | None = None  # a folder that all processes of this node see

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all: progress, checkpoints, the artifact."""
        return self.rank == 0

    @property
    def is_first_on_node(self) -> bool:
        """Whether this process fetches for its node."""
        return self.local_rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of `items`: each is in exactly one part."""
        return items[self.rank :: self.size]

    def total(self, values: Sequence[float]) -> list[float]:
        """The sums over all processes, the same numbers in each."""
        return self._reduced(values, "SUM")

    def any(self, *flags: bool) -> list[bool]:
        """For each flag whether some process raises it: all get the same answer at the same time."""
        return [value > 0 for value in self._reduced([float(flag) for flag in flags], "MAX")]

    def total_of(self, work: Callable[[], Sequence[float]]) -> list[float]:
        """The sums over all processes of what `work` makes in each; PreemptedError in all where it ends so in one."""
        values: Sequence[float] = ()
        preempted = None
        try:
            values = work()
        except PreemptedError as error:
            preempted = error
        if self.any(preempted is not None)[0]:
            raise preempted or PreemptedError("another process was told to stop")
        return self.total(values)

    def wait(self) -> None:
        """Go on when all processes are here."""
        self.any(False)

    def gather(self, value: Any) -> list[Any]:
        """The value of each process by rank, in the first one; elsewhere an empty list."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] | None = [None] * self.size if self.is_first else None
        dist.gather_object(value, found, dst=0)
        return found or []

    def agreed(self, value: Item) -> Item:
        """`value` of the first process on each node, which must be the same everywhere; in all processes."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        told: list[Any] = [None] * self.size
        dist.all_gather_object(told, (self.is_first_on_node, value))
        firsts = [value for is_first, value in told if is_first]
        if any(other != firsts[0] for other in firsts):
            raise PeerLostError(f"the nodes begin from different checkpoints, of the steps {firsts}; they begin again")
        first: Item = firsts[0]
        return first

    def leave(self) -> None:
        """Say goodbye, so that no other process takes this one for lost."""
        if self.size > 1:
            import torch.distributed as dist

            dist.destroy_process_group()

    def _reduced(self, values: Sequence[float], how: str) -> list[float]:
        if self.size == 1:
            return list(values)
        import torch
        import torch.distributed as dist

        together = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(together, op=getattr(dist.ReduceOp, how))
        reduced: list[float] = together.tolist()
        return reduced


def join() -> World:
    """Meet the other processes, as the environment says, and end with the agent that started this one.

    PeerLostError where they do not all come.
    """
    import torch
    import torch.distributed as dist

    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    world = World(
        rank=int(os.environ["RANK"]),
        size=int(os.environ["WORLD_SIZE"]),
        local_rank=int(os.environ["LOCAL_RANK"]),
        shared=Path(os.environ[SHARED_FOLDER]),
    )
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(world.local_rank)
    dist.init_process_group(
        backend="cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=dist.PrefixStore("group", _meet(world)),
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=_SILENCE_TIMEOUT_S),
    )
    return world


def _meet(world: World) -> Any:
    """The store of the first node's agent, once every process has been there. A wait hears no signal: it is short."""
    import torch.distributed as dist

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    until_s = time.monotonic() + MEET_TIMEOUT_S
    while True:
        try:
            store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=_TRY_S))
            store.set(f"here/{world.rank}", "1")
            store.wait([f"here/{rank}" for rank in range(world.size)])
        except (RuntimeError, OSError) as error:
            if time.monotonic() > until_s:
                raise PeerLostError(
                    f"the {world.size} processes did not all meet at {address}:{port} within {MEET_TIMEOUT_S} s: "
                    f"{first_line(error)}"
                ) from None
            time.sleep(_GLANCE_S)
        else:
            store.set_timeout(timedelta(seconds=_SILENCE_TIMEOUT_S))
            return store


def means_lost_peer(error: BaseException) -> bool:
    """Whether an error is what remains when another process has gone."""
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


def _end_with(parent: int) -> None:
    """Leave nothing behind when the agent is killed: as soon as it is gone, so is this process."""
    while os.getppid() == parent:
        time.sleep(_GLANCE_S)
    os._exit(_KILLED)
