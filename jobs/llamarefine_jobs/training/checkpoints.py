"""Upload checkpoints to the store while the training continues.

Guarantees (tests/jobs/training/test_checkpoints.py):

- One upload runs at a time. A newer checkpoint replaces one that waits, so at most two are on the disk.
- The folder of a checkpoint is not touched before its upload has ended; then it is removed.
- A failed upload is logged and the training continues. The checkpoint is kept and uploaded again every
  RETRY_EVERY_S until a newer one replaces it. The store removes older checkpoints only when a newer one is complete.
"""

import math
import shutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llamarefine_jobs.contract.artifact import Manifest
from llamarefine_jobs.contract.errors import LlamaRefineError
from llamarefine_jobs.store import Store

RETRY_EVERY_S = 10.0  # the store itself has retried a request for its give-up time before an upload fails


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
        self._waiting: Checkpoint | None = None  # newer than the one that is uploaded, or the one whose upload failed
        self._failed_step: int | None = None  # of the checkpoint whose failed upload was logged last
        self._repeats_left = math.inf  # how many more times a failed upload is repeated
        self._pause_is_over = threading.Event()
        self._thread: threading.Thread | None = None
        self._unexpected_error: Exception | None = None
        self.newest_step: int | None = None  # of the complete checkpoints in the store

    def upload_in_background(self, checkpoint: Checkpoint) -> None:
        """Upload `checkpoint` after the upload that is running, if any; return at once."""
        with self._lock:
            replaced, self._waiting = self._waiting, checkpoint
            self._repeats_left = math.inf
            self._pause_is_over.set()
            if self._thread is None:
                self._thread = threading.Thread(target=self._upload_all, name="checkpoints", daemon=True)
                self._thread.start()
        _remove(replaced)
        self._raise_unexpected_error()

    def upload_now(self, checkpoint: Checkpoint) -> None:
        """Upload `checkpoint`, the newest, and return when it is in the store; raise the error of a failed upload."""
        self.discard_waiting()
        self._store.retry_policy.restart_outage()
        try:
            self._upload(checkpoint)
        finally:
            _remove(checkpoint)

    def wait(self) -> None:
        """Return when the newest checkpoint is in the store, or a last upload failed after the whole give-up time."""
        self._store.retry_policy.restart_outage()
        self._join(repeats=1)  # the running upload may have used up most of its time

    def discard_waiting(self) -> None:
        """Discard the checkpoint that waits, and wait for the running upload: stopping it would leave partial files."""
        with self._lock:
            discarded, self._waiting = self._waiting, None
        _remove(discarded)
        self._join(repeats=0)

    def _join(self, repeats: int) -> None:
        """Wait for the thread, which repeats a failed upload at most this number of times from now on."""
        with self._lock:
            self._repeats_left = repeats
            self._pause_is_over.set()
            thread = self._thread
        if thread:
            thread.join()
        self._raise_unexpected_error()

    def _upload_all(self) -> None:
        while checkpoint := self._next():
            try:
                self._upload(checkpoint)
            except LlamaRefineError as error:
                self._log_failure(checkpoint, error)
                if self._keep(checkpoint):
                    self._pause_is_over.wait(RETRY_EVERY_S)
            except Exception as error:  # a bug: raised again in the thread that trains
                _remove(checkpoint)
                self._unexpected_error = error

    def _log_failure(self, checkpoint: Checkpoint, error: LlamaRefineError) -> None:
        """Log the first failed upload of a checkpoint."""
        if self._failed_step != checkpoint.step:
            self._note(f"the checkpoint at step {checkpoint.step} is not in the store, training continues: {error}")
        self._failed_step = checkpoint.step

    def _keep(self, checkpoint: Checkpoint) -> bool:
        """Let the checkpoint wait for its next upload, or remove it if a newer one waits or no repeat is left."""
        with self._lock:
            is_kept = self._repeats_left > 0 and self._waiting is None
            if is_kept:
                self._repeats_left -= 1
                self._waiting = checkpoint
                self._pause_is_over.clear()
        if not is_kept:
            _remove(checkpoint)
        return is_kept

    def _next(self) -> Checkpoint | None:
        with self._lock:
            checkpoint, self._waiting = self._waiting, None
            if checkpoint is None:
                self._thread = None
            return checkpoint

    def _upload(self, checkpoint: Checkpoint) -> None:
        """Upload the checkpoint, then remove its folder; a failed upload leaves the folder to the caller."""
        self._store.publish_checkpoint(checkpoint.step, checkpoint.folder, checkpoint.draft)
        self.newest_step = checkpoint.step
        _remove(checkpoint)
        if self._failed_step is not None:
            self._note(f"the checkpoint at step {checkpoint.step} is in the store; uploads work again")
            self._failed_step = None

    def _raise_unexpected_error(self) -> None:
        error, self._unexpected_error = self._unexpected_error, None
        if error:
            raise error


def _remove(checkpoint: Checkpoint | None) -> None:
    if checkpoint:
        shutil.rmtree(checkpoint.folder, ignore_errors=True)
