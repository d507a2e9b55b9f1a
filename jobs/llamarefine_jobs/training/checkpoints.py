"""Checkpoints on their way to the store while the training goes on.

What it promises (tests/jobs/training/test_checkpoints.py):

- one upload at a time; a newer checkpoint takes the place of one that waits, so at most two lie on the disk;
- a folder that was handed over is not touched until its upload is over, then it is removed;
- an upload that fails is noted and the training goes on: the next checkpoint is a new try, and the store
  drops older ones only when a newer one is complete.
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
    """A training's state after `step` optimizer steps, and the manifest it gets."""

    step: int
    folder: Path
    draft: Manifest


class Checkpoints:
    """Uploads a training's checkpoints beside it. To be used by one thread."""

    def __init__(self, store: Store, note: Callable[[str], None]) -> None:
        self._store, self._note = store, note
        self._lock = threading.Lock()
        self._waiting: Checkpoint | None = None
        self._thread: threading.Thread | None = None
        self._mistake: Exception | None = None
        self.newest_step: int | None = None  # of the complete ones in the store

    def offer(self, checkpoint: Checkpoint) -> None:
        """Upload `checkpoint` as soon as the upload under way is over; returns at once."""
        with self._lock:
            replaced, self._waiting = self._waiting, checkpoint
            if self._thread is None:
                self._thread = threading.Thread(target=self._upload_all, name="checkpoints", daemon=True)
                self._thread.start()
        _remove(replaced)
        self._raise_mistake()

    def publish(self, checkpoint: Checkpoint) -> None:
        """Have `checkpoint`, the newest, in the store when this returns; the error that kept it from there."""
        self.abandon()
        self._upload(checkpoint)

    def settle(self) -> None:
        """Wait until every checkpoint that was offered is in the store, or was noted as lost."""
        if thread := self._thread:
            thread.join()
        self._raise_mistake()

    def abandon(self) -> None:
        """Drop the checkpoint that waits, and wait for the upload under way: cut off, it would leave litter."""
        with self._lock:
            dropped, self._waiting = self._waiting, None
        _remove(dropped)
        self.settle()

    def _upload_all(self) -> None:
        while checkpoint := self._next():
            try:
                self._upload(checkpoint)
            except LlamaRefineError as error:
                self._note(f"the checkpoint at step {checkpoint.step} is not in the store, training goes on: {error}")
            except Exception as error:  # our own mistake: the thread that trains shall say so
                self._mistake = error

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

    def _raise_mistake(self) -> None:
        mistake, self._mistake = self._mistake, None
        if mistake:
            raise mistake


def _remove(checkpoint: Checkpoint | None) -> None:
    if checkpoint:
        shutil.rmtree(checkpoint.folder, ignore_errors=True)
