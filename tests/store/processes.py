"""Writers as processes of their own: what the tests of concurrency and of SIGKILL start and end."""

import multiprocessing
import os
import resource
from multiprocessing.connection import Connection
from pathlib import Path

from llamarefine_jobs.contract.errors import LlamaRefineError
from llamarefine_jobs.store import Store

from . import samples

# One server process imports boto3 once; each writer is a fork of it, single-threaded when it is made.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["boto3", "llamarefine_jobs.store.bucket", "llamarefine_jobs.store", __name__])


def publish(uri: str, folder: Path, environment: dict[str, str], answer: Connection, start: Connection) -> None:
    """Publish `folder` when told to; answer with the attempt of the manifest that stands."""
    os.environ.update(environment)
    store = Store(uri)
    store.manifest(samples.STAGE, samples.key_of("opens the connection"))
    answer.send("ready")
    start.recv()
    answer.send(store.publish(folder, samples.draft()).attempt)


def publish_within(uri: str, folder: Path, uid: int | None, file_limit_bytes: int | None, answer: Connection) -> None:
    """Publish as another user, or with a limit on the size of files; answer with the error, or with nothing."""
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
    """The kind and the text of the error that publishing under these conditions ends with."""
    answer, child = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=publish_within, args=(uri, folder, uid, file_limit_bytes, child))
    process.start()
    assert answer.poll(60), "the process did not answer"
    found: tuple[str, str] | None = answer.recv()
    process.join(60)
    assert process.exitcode == 0
    return found


class Writer:
    """A process that waits to publish a folder."""

    def __init__(self, store: Store, folder: Path, environment: dict[str, str]) -> None:
        self.answer, answer = PROCESSES.Pipe(duplex=False)
        start, self.start = PROCESSES.Pipe(duplex=False)
        self.process = PROCESSES.Process(target=publish, args=(store.uri, folder, environment, answer, start))
        self.process.start()
        assert self.answer.recv() == "ready"

    def go(self) -> None:
        """Let it publish."""
        self.start.send("go")

    def attempt(self) -> str:
        """The attempt of the manifest that it was given, once it has one."""
        assert self.answer.poll(60), "the writer did not end"
        found: str = self.answer.recv()
        self.process.join(60)
        assert self.process.exitcode == 0
        return found

    def kill(self) -> None:
        """End it as a power cut would."""
        self.process.kill()
        self.process.join(60)
