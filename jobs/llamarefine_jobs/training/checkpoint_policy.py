"""When a training saves a checkpoint, what the checkpoint contains, and when it is uploaded."""

import shutil
import time
from pathlib import Path

from llamarefine_jobs.context import Context
from llamarefine_jobs.contract.artifact import checkpoint_path
from llamarefine_jobs.contract.errors import DivergedError, LlamaRefineError, PreemptedError
from llamarefine_jobs.contract.recipe import Dpo, Sft
from llamarefine_jobs.process import sigterm
from llamarefine_jobs.training.best_adapter import BestAdapter
from llamarefine_jobs.training.checkpoints import Checkpoint, CheckpointUploader


class CheckpointPolicy:
    """The checkpoints of one training: their schedule, their content, their upload.

    A scheduled checkpoint is uploaded in the background, after a later step logged a good loss. Finite weights can
    still be useless, and the next step's loss is the first one that is computed with them. A checkpoint that is saved
    on SIGTERM is uploaded at once, because the process is killed when the grace period is over.
    """

    def __init__(self, section: Sft | Dpo, context: Context) -> None:
        self._section = section
        self._context = context
        self._uploader = CheckpointUploader(context.store, context.note)
        self._saved_s = time.monotonic()
        self._saved_step: int | None = None
        self._unconfirmed: Checkpoint | None = None  # the loss of its weights was not logged yet
        self._has_good_loss = False  # this process logged at least one good loss
        self.preempted_error: PreemptedError | None = None  # set in the first process once SIGTERM's checkpoint is done

    def begin(self, step: int) -> None:
        """Start the schedule at `step`: the step of the checkpoint that the training continues from, or 0."""
        self._uploader.newest_step = step or None
        self._saved_s = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Return whether the schedule requires a checkpoint after `step`."""
        every_steps, every_s = self._section.checkpoint_every_steps, self._section.checkpoint_every_s
        return bool(
            (every_steps and step % every_steps == 0) or (every_s and time.monotonic() - self._saved_s >= every_s)
        )

    def needs_loss_of(self, step: int) -> bool:
        """Return whether the loss of `step` is the first one computed with the weights of the newest checkpoint."""
        return step - 1 == self._saved_step

    def complete(self, step: int, folder: Path, best: BestAdapter, *, preempted: bool) -> None:
        """Add the best adapter to the checkpoint in `folder`, and upload the checkpoint once its loss is known good.

        Every process must call this. Only the first process has written the folder.
        """
        if self._context.world.is_first:
            best.copy_to_checkpoint(folder)
            checkpoint = Checkpoint(step, folder, self._context.draft())
            if preempted:
                self._upload_on_sigterm(checkpoint)
            else:
                self._replace_unconfirmed(checkpoint)
        self._saved_s, self._saved_step = time.monotonic(), step

    def confirm(self, step: int) -> None:
        """Record that the loss of `step` is good: upload a checkpoint of an earlier step in the background."""
        self._has_good_loss = True
        if self._unconfirmed and step > self._unconfirmed.step:
            self._upload_unconfirmed()

    def upload_last_checkpoint(self) -> None:
        """Upload the newest checkpoint if possible, even if no later loss has confirmed it.

        A failed upload is only logged, so that it does not hide the error that ended the training.
        """
        try:
            self._upload_unconfirmed()
            self._uploader.wait()
        except Exception as error:  # when memory is short, not even a thread starts
            self._context.note(f"the newest checkpoint is not in the store: {error}")

    def discard_waiting(self) -> None:
        """Discard a checkpoint that waits for its upload, and wait for the running upload."""
        self._uploader.discard_waiting()

    def diverged_error(self, what: str) -> DivergedError:
        """Return the error for a diverged training; it names the last good checkpoint in the store."""
        self._uploader.wait()
        self._context.world.barrier()  # if one process ended, torch would kill rank 0, which may still be uploading
        step, stage = self._uploader.newest_step, self._context.stage.name
        good = "no checkpoint was written before"
        if step is not None:
            where = f"{self._context.store.uri}/{checkpoint_path(stage, self._context.key, step)}"
            good = f"the last good checkpoint is at step {step}, {where}"
            good += "" if self._has_good_loss else " (its weights are finite, but no loss with them was seen yet)"
        return DivergedError(f"{what}; lower {stage}.learning_rate (now {self._section.learning_rate:g}); {good}")

    def _replace_unconfirmed(self, checkpoint: Checkpoint) -> None:
        if self._unconfirmed:
            shutil.rmtree(self._unconfirmed.folder)
        self._unconfirmed = checkpoint

    def _upload_unconfirmed(self) -> None:
        if self._unconfirmed:
            self._uploader.upload_in_background(self._unconfirmed)
        self._unconfirmed = None

    def _upload_on_sigterm(self, checkpoint: Checkpoint) -> None:
        """Upload the checkpoint now and set `preempted_error`, which says whether the upload succeeded."""
        saved = f"its checkpoint at step {checkpoint.step}"
        self._context.note(f"SIGTERM received: uploading {saved}")
        # This message stays if the grace period ends before the upload: the store is slow or unreachable.
        sigterm.write_termination_message(
            self._context.stage.name, self._preemption(f"{saved} did not reach the store in time")
        )
        try:
            self._uploader.upload_now(checkpoint)
        except LlamaRefineError as error:
            self.preempted_error = self._preemption(f"{saved} is not in the store ({error})")
        else:
            self.preempted_error = self._preemption(f"{saved} is in the store")

    def _preemption(self, what: str) -> PreemptedError:
        """Return the error that says from which step the next attempt continues."""
        step = self._uploader.newest_step
        rest = f"resumes from step {step}" if step else "starts from the beginning"
        return PreemptedError(f"{self._context.stage.name} was stopped by SIGTERM; {what}, and the same command {rest}")
