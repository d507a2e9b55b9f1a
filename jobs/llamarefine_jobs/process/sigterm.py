"""SIGTERM: heard from a stage's first line on, and answered at once while nothing would be lost by it.

The kernel drops a signal that a container's first process has no handler for, so `llamarefine_jobs/__init__.py` calls
`install_handler` before it imports anything else. There are two answers:

- while there is nothing to save the process leaves on the spot. It does not wait for downloads, for a bucket that is
  away, for a long computation, or for a library that catches every exception;
- from `defer_exit` on it is noted, and whoever has something to save ends the work.
"""

import contextlib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from llamarefine_jobs.contract.errors import LlamaRefineError, PreemptedError

SHARED_FOLDER = "LLAMAREFINE_GROUP"  # an agent says by it to the processes that train together what folder they share


def is_worker(environment: Mapping[str, str]) -> bool:
    """Whether an agent started this process as one of several."""
    return SHARED_FOLDER in environment


def _started_stage() -> str:
    """The stage that `python -m llamarefine_jobs.<stage>` names; of several processes the member's first argument."""
    words = [*sys.orig_argv, "", ""]
    place = words.index("-m") if "-m" in words else len(words) - 2
    return words[place + 2] if words[place + 1] == "llamarefine_jobs.worker" else words[place + 1].rpartition(".")[2]


class Stop:
    """Whether this process was told to stop."""

    def __init__(self) -> None:
        # No threading.Event: its lock, taken by a handler that a second signal interrupts, would never be free again.
        self._is_set = self._held = False
        self.stage = _started_stage()
        self.cleanup_folder: Path | None = None  # a folder that is removed on the way out

    def is_set(self) -> bool:
        """Whether SIGTERM has come, and something was to be saved first."""
        return self._is_set

    def set(self) -> None:
        """Tell the process to stop."""
        self._is_set = True
        if not self._held:
            self._leave()

    def defer_exit(self) -> None:
        """From now on there is something to save."""
        self._held = True

    def allow_exit(self) -> None:
        """Nothing is to be saved any more: leaves here where SIGTERM has come meanwhile."""
        self._held = False
        if self._is_set:
            self._leave()

    def _leave(self) -> NoReturn:
        """End the process in the middle of whatever it does: only what a signal's handler may do."""
        error = PreemptedError(f"{self.stage} was told to stop; run the same command again to go on")
        if not is_worker(os.environ):  # the agent says it, once for all
            os.write(2, f"{self.stage}: error: {error}\n".encode())  # print may be what was interrupted
        write_termination_message(self.stage, error)
        if self.cleanup_folder:
            shutil.rmtree(self.cleanup_folder, ignore_errors=True)
        os._exit(error.exit_code)


STOP = Stop()  # this process's: a process has one SIGTERM


def install_handler() -> Stop:
    """Hear SIGTERM from now on, also one that `keep_pending_across_exec` let wait."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: STOP.set())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    return STOP


def keep_pending_across_exec() -> None:
    """Let a SIGTERM that comes from now on wait for the program that replaces this one: handlers do not outlive exec,
    a blocked signal does."""
    STOP.allow_exit()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


@contextlib.contextmanager
def ignoring_sigterm_at_exit() -> Iterator[None]:
    """Let no SIGTERM change the exit code any more while Python shuts down, which takes a second with torch."""
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def stop_when_launcher_dies() -> None:
    """Where the local executor asked for it, take its death for a SIGTERM: it holds the other end of our input."""

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 1024):
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    if os.environ.get("LLAMAREFINE_STOP_AT_EOF") == "1":
        threading.Thread(target=watch, daemon=True).start()


def write_termination_message(stage: str, error: LlamaRefineError) -> None:
    """Say how a stage ended where Kubernetes, or whoever started it, looks."""
    message = {"stage": stage, "reason": error.reason, "exit_code": error.exit_code, "message": str(error)[:800]}
    target = Path(os.environ.get("LLAMAREFINE_TERMINATION_MESSAGE", "/dev/termination-log"))
    with contextlib.suppress(OSError):
        if target.exists():  # Kubernetes makes the file and reads 4,096 bytes of it; elsewhere nobody asked for it
            target.write_text(json.dumps(message, ensure_ascii=False), encoding="utf-8")
