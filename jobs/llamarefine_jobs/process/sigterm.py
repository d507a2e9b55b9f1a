"""SIGTERM handling: exit at once while there is nothing to save, otherwise let the stage save a checkpoint first.

The kernel ignores a signal that the first process of a container has no handler for, so
`llamarefine_jobs/__init__.py` calls `install_handler` before any slow import. What SIGTERM does depends on the moment:

- while there is nothing to save, the handler ends the process at once. It does not wait for downloads, for an
  unreachable bucket, for a long computation, or for a library that catches every exception;
- after `defer_exit` the handler only sets a flag, and the code that has something to save checks it and ends the work.
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

from llamarefine_jobs.contract.environment import SHARED_FOLDER, STOP_AT_EOF, TERMINATION_MESSAGE
from llamarefine_jobs.contract.errors import LlamaRefineError, PreemptedError


def is_worker(environment: Mapping[str, str]) -> bool:
    """Return whether the process with this environment is a worker that an agent started."""
    return SHARED_FOLDER in environment


def _started_stage() -> str:
    """Return the stage in `python -m llamarefine_jobs.<stage>`, or in a worker's first argument."""
    words = [*sys.orig_argv, "", ""]
    index = words.index("-m") if "-m" in words else len(words) - 2
    return words[index + 2] if words[index + 1] == "llamarefine_jobs.worker" else words[index + 1].rpartition(".")[2]


class Stop:
    """The request to stop this process, and whether it exits at once or saves something first."""

    def __init__(self) -> None:
        # Not a threading.Event: a handler that a second signal interrupts while it holds the lock would deadlock.
        self._is_set = self._is_deferred = False
        self.stage = _started_stage()
        self.cleanup_folder: Path | None = None  # removed when the handler ends the process

    def is_set(self) -> bool:
        """Return whether SIGTERM has arrived while there was something to save."""
        return self._is_set

    def set(self) -> None:
        """Stop the process: at once, or after `defer_exit` by setting the flag."""
        self._is_set = True
        if not self._is_deferred:
            self._exit()

    def defer_exit(self) -> None:
        """Let SIGTERM only set the flag from now on, because there is something to save."""
        self._is_deferred = True

    def allow_exit(self) -> None:
        """Let SIGTERM end the process at once again. Exits here if SIGTERM has arrived meanwhile."""
        self._is_deferred = False
        if self._is_set:
            self._exit()

    def _exit(self) -> NoReturn:
        """End the process, using only functions that are safe in a signal handler."""
        error = PreemptedError(f"{self.stage} was stopped by SIGTERM; run the same command again to resume")
        if not is_worker(os.environ):  # its agent prints the error, once for all workers
            with contextlib.suppress(OSError):  # nobody may be reading
                os.write(2, f"{self.stage}: error: {error}\n".encode())  # print may be the call that was interrupted
        write_termination_message(self.stage, error)
        if self.cleanup_folder:
            shutil.rmtree(self.cleanup_folder, ignore_errors=True)
        os._exit(error.exit_code)


STOP = Stop()  # the only stop request that this process's handler sets


def install_handler() -> Stop:
    """Handle SIGTERM from now on, including one that `keep_pending_across_exec` kept pending."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: STOP.set())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    return STOP


def keep_pending_across_exec() -> None:
    """Keep a SIGTERM that arrives from now on pending for the program that replaces this one by exec.

    exec removes handlers but keeps a blocked signal pending.
    """
    STOP.allow_exit()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


@contextlib.contextmanager
def ignoring_sigterm_at_exit() -> Iterator[None]:
    """Ignore SIGTERM after the block, so that it cannot change the exit code while Python shuts down."""
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def stop_when_launcher_dies() -> None:
    """Send SIGTERM to this process when the local executor dies, if it set LLAMAREFINE_STOP_AT_EOF.

    The executor holds the other end of this process's standard input, which reaches its end when the executor dies.
    """

    def wait_for_end_of_input() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 1024):
                pass
        os.kill(os.getpid(), signal.SIGTERM)

    if os.environ.get(STOP_AT_EOF) == "1":
        threading.Thread(target=wait_for_end_of_input, daemon=True).start()


def write_termination_message(stage: str, error: LlamaRefineError) -> None:
    """Write how a stage ended to its termination message file, which Kubernetes or the local executor reads."""
    message = {"stage": stage, "reason": error.reason, "exit_code": error.exit_code, "message": str(error)[:800]}
    target = Path(os.environ.get(TERMINATION_MESSAGE, "/dev/termination-log"))
    with contextlib.suppress(OSError):
        if target.exists():  # the reader creates it; Kubernetes reads 4,096 bytes
            target.write_text(json.dumps(message, ensure_ascii=False), encoding="utf-8")
