"""Stages as processes that begin at once and die for real: forks of a server that has imported everything."""

import importlib
import multiprocessing
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from llamarefine_jobs import entry
from llamarefine_jobs.store import Store

LIMIT_S = 900  # a run that takes longer hangs
Watch = Callable[[int, list[str]], bool]
# Each start looks after every other process, and two threads that ask for one exit code get 255 for it.
_ONE_AT_A_TIME = threading.Lock()
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "trl.trainer.sft_trainer",
        "trl.trainer.dpo_trainer",
        "peft",
        "scipy.stats",
        *(f"llamarefine_jobs.{stage}" for stage in ("training.loop", "prepare", "sft", "dpo", "merge", "evaluate")),
        __name__,
    ]
)


@dataclass
class Ended:
    """How a run ended: its exit code (negative: the signal), what it said, when the fault came and how long it took."""

    exit_code: int | None
    seconds: float
    fault_s: float | None = None
    lines: list[str] = field(default_factory=list)

    @property
    def last_line(self) -> str:
        return self.lines[-1] if self.lines else "it said nothing"


def run(subject: str, world: Path, watch: Watch | None = None) -> Ended:
    """Run a stage, or a writer of the store, in `world`, which holds recipe.yaml and store/.

    `watch(pid, lines so far)` is called all the while, until it says that it let a fault happen; where it never
    does, once more with pid 0 when the run is over.
    """
    reader, writer = _FORKS.Pipe(duplex=False)
    process = _FORKS.Process(target=_work, args=(subject, str(world), writer))
    with _ONE_AT_A_TIME:
        process.start()
    writer.close()
    assert process.pid
    began_s = time.monotonic()
    ended = Ended(None, 0.0)
    said, open_ = b"", True
    while open_:
        if watch and watch(process.pid, ended.lines):
            watch, ended.fault_s = None, time.monotonic() - began_s
        if time.monotonic() - began_s > LIMIT_S:
            process.kill()
        if select.select([reader], [], [], 0.002)[0]:
            chunk = os.read(reader.fileno(), 1 << 16)
            *lines, said = (said + chunk).split(b"\n")
            ended.lines += [line.decode() for line in lines]
            open_ = bool(chunk)
    with _ONE_AT_A_TIME:
        process.join()
        ended.exit_code = process.exitcode
    reader.close()
    ended.seconds = time.monotonic() - began_s
    if watch and watch(0, ended.lines):
        ended.fault_s = ended.seconds
    return ended


def _work(subject: str, world: str, output: Connection) -> None:
    """What the fork does: its output goes to the pipe, which no limit on files reaches."""
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ["LLAMAREFINE_WORK"] = world
    os.chdir(world)
    if subject == "store":
        with entry.exit_code("sft"):
            write(Path(world))
        return
    sys.argv = [subject, "--recipe", f"{world}/recipe.yaml", "--store", f"{world}/store"]
    entry.main(subject, importlib.import_module(f"llamarefine_jobs.{subject}").work)


def write(world: Path) -> None:
    """What a training asks of the store, without the training: three checkpoints, each fetched, then the artifact."""
    from tests.store import samples

    store = Store(str(world / "store"))
    if store.manifest(samples.STAGE, samples.KEY):
        return
    done = store.fetch_checkpoint(samples.STAGE, samples.KEY, world / f"resume-{os.getpid()}") or 0
    print(f"sft: goes on from the checkpoint at step {done}" if done else "sft: makes it from nothing")
    folder = samples.make_folder(world / f"made-{os.getpid()}", size_bytes=2_000_000)
    for step in range(done + 1, 4):
        print(f"progress stage=sft step={step} steps=3")
        store.publish_checkpoint(step, folder, samples.draft())
    store.publish(folder, samples.draft())
    store.remove_checkpoints(samples.STAGE, samples.KEY)
