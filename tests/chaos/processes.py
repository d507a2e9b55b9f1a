"""Run stages as real processes that start at once: they are forks of a server that has imported everything."""

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

LIMIT_S = 900  # a run that takes longer counts as hung and is killed
Observer = Callable[[int, list[str]], bool]  # pid and lines so far -> whether it has applied its fault
# Starting a process also polls all others; when two threads collect the same exit code, one of them gets 255.
_PROCESS_LOCK = threading.Lock()
_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(
    [
        "peft",
        "transformers.models.llama.modeling_llama",
        "scipy.stats",
        *(f"llamarefine_jobs.{stage}" for stage in ("training.loop", "prepare", "sft", "dpo", "merge", "evaluate")),
        __name__,
    ]
)


@dataclass
class RunResult:
    """How a run ended: its exit code (negative: the signal), its lines, when the fault happened, how long it took."""

    exit_code: int | None
    seconds: float
    fault_s: float | None = None
    lines: list[str] = field(default_factory=list)

    @property
    def last_line(self) -> str:
        return self.lines[-1] if self.lines else "no output"


def run(subject: str, workspace: Path, observer: Observer | None = None) -> RunResult:
    """Run a stage, or a writer of the store, in `workspace`, which holds recipe.yaml and store/.

    `observer` is called every few milliseconds until it returns True, which says that it has applied its fault. If it
    never does, it is called once more, with pid 0, after the run has ended.
    """
    reader, writer = _FORKSERVER.Pipe(duplex=False)
    process = _FORKSERVER.Process(target=_run_in_child, args=(subject, str(workspace), writer))
    with _PROCESS_LOCK:
        process.start()
    writer.close()
    assert process.pid
    began_s = time.monotonic()
    ended = RunResult(None, 0.0)
    unfinished, open_ = b"", True
    while open_:
        if observer and observer(process.pid, ended.lines):
            observer, ended.fault_s = None, time.monotonic() - began_s
        if time.monotonic() - began_s > LIMIT_S:
            process.kill()
        if select.select([reader], [], [], 0.002)[0]:
            chunk = os.read(reader.fileno(), 1 << 16)
            *lines, unfinished = (unfinished + chunk).split(b"\n")
            ended.lines += [line.decode() for line in lines]
            open_ = bool(chunk)
    with _PROCESS_LOCK:
        process.join()
        ended.exit_code = process.exitcode
    reader.close()
    ended.seconds = time.monotonic() - began_s
    if observer and observer(0, ended.lines):
        ended.fault_s = ended.seconds
    return ended


def _run_in_child(subject: str, workspace: str, output: Connection) -> None:
    """Run `subject` in the forked process. Its output goes to a pipe, which a limit on file sizes does not affect."""
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", buffering=1, closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ["LLAMAREFINE_WORK"] = workspace
    os.chdir(workspace)
    if subject == "store":
        with entry.exit_code("sft"):
            write_store(Path(workspace))
        return
    sys.argv = [subject, "--recipe", f"{workspace}/recipe.yaml", "--store", f"{workspace}/store"]
    entry.main(subject, importlib.import_module(f"llamarefine_jobs.{subject}").work)


def write_store(workspace: Path) -> None:
    """Use the store as a training does, without training: resume, publish three checkpoints, then the artifact."""
    from tests.store import samples

    store = Store(str(workspace / "store"))
    if store.manifest(samples.STAGE, samples.KEY):
        return
    done = store.fetch_checkpoint(samples.STAGE, samples.KEY, workspace / f"resume-{os.getpid()}") or 0
    print(f"sft: resumes from the checkpoint at step {done}" if done else "sft: makes it from nothing")
    folder = samples.make_folder(workspace / f"made-{os.getpid()}", size_bytes=2_000_000)
    for step in range(done + 1, 4):
        print(f"progress stage=sft step={step} steps=3")
        store.publish_checkpoint(step, folder, samples.draft())
    store.publish(folder, samples.draft())
    store.remove_checkpoints(samples.STAGE, samples.KEY)
