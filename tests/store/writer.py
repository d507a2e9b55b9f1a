"""Writers as processes of their own: what the tests of concurrency and of SIGKILL start and end."""

import multiprocessing
import os
from multiprocessing.connection import Connection
from pathlib import Path

from llamarefine_jobs.store import Store

from . import samples

# One server process imports boto3 once; each writer is a fork of it, single-threaded when it is made.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["boto3", "llamarefine_jobs.bucket", "llamarefine_jobs.store", __name__])


def publish(uri: str, folder: Path, environment: dict[str, str], answer: Connection, start: Connection) -> None:
    """Publish `folder` when told to; answer with the attempt of the manifest that stands."""
    os.environ.update(environment)
    store = Store(uri)
    store.manifest(samples.STAGE, samples.key_of("opens the connection"))
    answer.send("ready")
    start.recv()
    answer.send(store.publish(folder, samples.draft()).attempt)


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
