"""Writers in separate processes, for tests of concurrency and SIGKILL."""

import multiprocessing
import os
import resource
from multiprocessing.connection import Connection
from pathlib import Path

from llamarefine_jobs.contract.errors import LlamaRefineError
from llamarefine_jobs.store import Store

from . import samples

# One server process imports boto3 once; each writer is forked from it while it has a single thread.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["boto3", "llamarefine_jobs.store.bucket", "llamarefine_jobs.store", __name__])


def publish(uri: str, folder: Path, environment: dict[str, str], answer: Connection, start: Connection) -> None:
    """Publish `folder` once `start` sends a message; send the attempt of the resulting manifest to `answer`."""
    os.environ.update(environment)
    store = Store(uri)
    store.manifest(samples.STAGE, samples.key_of("opens the connection"))
    answer.send("ready")
    start.recv()
    answer.send(store.publish(folder, samples.draft()).attempt)


def publish_within(uri: str, folder: Path, uid: int | None, file_limit_bytes: int | None, answer: Connection) -> None:
    """Publish as user `uid`, or with a limit on file sizes; send the error's class and text, or None, to `answer`."""
    if file_limit_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit_bytes, file_limit_bytes))
    if uid is not None:
        os.setuid(uid)
    try:
        Store(uri).publish(folder, samples.draft())
    except LlamaRefineError as error:
        answer.send((type(error).__name__, str(error)))
    else:
        answer.send(None)


def error_of_publishing(
    uri: str, folder: Path, *, uid: int | None = None, file_limit_bytes: int | None = None
) -> tuple[str, str] | None:
    """Publish in a process with these limits; return the error's class and text, or None."""
    answer, child = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=publish_within, args=(uri, folder, uid, file_limit_bytes, child))
    process.start()
    assert answer.poll(60), "the process did not answer"
    found: tuple[str, str] | None = answer.recv()
    process.join(60)
    assert process.exitcode == 0
    return found


class Writer:
    """A process that publishes a folder when `go` is called."""

    def __init__(self, store: Store, folder: Path, environment: dict[str, str]) -> None:
        self.answer, answer = PROCESSES.Pipe(duplex=False)
        start, self.start = PROCESSES.Pipe(duplex=False)
        self.process = PROCESSES.Process(target=publish, args=(store.uri, folder, environment, answer, start))
        self.process.start()
        assert self.answer.recv() == "ready"

    def go(self) -> None:
        """Start publishing."""
        self.start.send("go")

    def attempt(self) -> str:
        """Wait for the process; return the attempt of the manifest that its `publish` returned."""
        assert self.answer.poll(60), "the writer did not end"
        found: str = self.answer.recv()
        self.process.join(60)
        assert self.process.exitcode == 0
        return found

    def kill(self) -> None:
        """End the process with SIGKILL."""
        self.process.kill()
        self.process.join(60)
