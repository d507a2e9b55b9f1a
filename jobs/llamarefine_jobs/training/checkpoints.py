"""Upload checkpoints to the store while the training continues.

Guarantees (tests/jobs/training/test_checkpoints.py):

- One upload runs at a time. A newer checkpoint replaces one that waits, so at most two are on the disk.
- The folder of a checkpoint is not touched before its upload has ended; then it is removed.
- A failed upload is logged and the training continues: the next checkpoint is a new attempt, and the store
  removes older checkpoints only when a newer one is complete.
"""

import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llamarefine_jobs.contract.artifact import Manifest
from llamarefine_jobs.contract.errors import LlamaRefineError
from llamarefine_jobs.store import Store


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training after `step` optimizer steps, in a folder, and the draft of its manifest."""

    step: int
    folder: Path
    draft: Manifest


class CheckpointUploader:
    """Uploads the checkpoints of one training in a background thread. Call all methods from the same thread."""

    def __init__(self, store: Store, note: Callable[[str], None]) -> None:
        self._store, self._note = store, note
        self._lock = threading.Lock()
        self._waiting: Checkpoint | None = None
        self._thread: threading.Thread | None = None
        self._unexpected_error: Exception | None = None
        self.newest_step: int | None = None  # of the complete checkpoints in the store

    def upload_in_background(self, checkpoint: Checkpoint) -> None:
        """Upload `checkpoint` after the upload that is running, if any; return at once."""
        with self._lock:
            replaced, self._waiting = self._waiting, checkpoint
            if self._thread is None:
                self._thread = threading.Thread(target=self._upload_all, name="checkpoints", daemon=True)
                self._thread.start()
        _remove(replaced)
        self._raise_unexpected_error()

    def upload_now(self, checkpoint: Checkpoint) -> None:
        """Upload `checkpoint`, the newest, and return when it is in the store; raise the error of a failed upload."""
        self.discard_waiting()
        self._upload(checkpoint)

    def wait(self) -> None:
        """Return when every checkpoint is in the store, or its failed upload is logged."""
        if thread := self._thread:
            thread.join()
        self._raise_unexpected_error()

    def discard_waiting(self) -> None:
        """Discard the checkpoint that waits, and wait for the running upload: stopping it would leave partial files."""
        with self._lock:
            discarded, self._waiting = self._waiting, None
        _remove(discarded)
        self.wait()

    def _upload_all(self) -> None:
        while checkpoint := self._next():
            try:
                self._upload(checkpoint)
            except LlamaRefineError as error:
                self._note(f"the checkpoint at step {checkpoint.step} is not in the store, training continues: {error}")
            except Exception as error:  # a bug: raised again in the thread that trains
                self._unexpected_error = error

    def _next(self) -> Checkpoint | None:
        with self._lock:
            checkpoint, self._waiting = self._waiting, None
            if checkpoint is None:
                self._thread = None
            return checkpoint

    def _upload(self, checkpoint: Checkpoint) -> None:
        try:
            self._store.publish_checkpoint(checkpoint.step, checkpoint.folder, checkpoint.draft)
            self.newest_step = checkpoint.step
        finally:
            _remove(checkpoint)

    def _raise_unexpected_error(self) -> None:
        error, self._unexpected_error = self._unexpected_error, None
        if error:
            raise error


def _remove(checkpoint: Checkpoint | None) -> None:
    if checkpoint:
        shutil.rmtree(checkpoint.folder, ignore_errors=True)
