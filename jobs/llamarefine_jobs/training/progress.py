"""Progress lines of a training, and the check whether its loss diverged."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from llamarefine_jobs.context import Context
from llamarefine_jobs.contract.recipe import Dpo, Sft

# Nats above the first loss: the answers became 55 times less likely, token by token. Batches differ by tenths of a nat.
_DIVERGED = 4.0


class TrainingProgress:
    """Progress of one training: first and last loss, speed, remaining time."""

    def __init__(self, section: Sft | Dpo, context: Context, tokens_per_row: float) -> None:
        self._context = context
        self._tokens_per_step = section.batch_rows * tokens_per_row
        self._first_loss: float | None = None
        self._began_s = time.monotonic()
        self.last_loss: float | None = None
        self.first_step = 0  # the step of the checkpoint that this process continues from

    def begin(self, step: int, steps: int, history: Sequence[Mapping[str, float]]) -> None:
        """Print the first progress line, and read the losses that earlier attempts logged."""
        self.first_step = step
        losses = [entry["loss"] for entry in history if "loss" in entry]
        if losses:
            self._first_loss, self.last_loss = float(losses[0]), float(losses[-1])
        self._began_s = time.monotonic()
        self._context.progress(step, steps)

    def is_diverged(self, loss: float) -> bool:
        """Return whether `loss` is NaN or far above the first loss, so the training diverged.

        The first call stores the first loss.
        """
        self._first_loss = loss if self._first_loss is None else self._first_loss
        return not loss < self._first_loss + _DIVERGED  # also true for NaN

    def report(self, loss: float, step: int, steps: int) -> None:
        """Print a progress line with the mean loss of the steps since the last one."""
        self.last_loss = loss
        seconds = time.monotonic() - self._began_s
        done = max(1, step - self.first_step)
        figures: dict[str, Any] = {
            "loss": loss,
            "tokens_per_s": self.tokens_per_s(done, seconds),
            "eta_s": round((steps - step) * seconds / done, 1),
        }
        self._context.progress(step, steps, **figures)

    def tokens_per_s(self, steps: int, seconds: float) -> float:
        """Return the tokens per second of a training that makes `steps` steps in `seconds`."""
        return round(steps * self._tokens_per_step / seconds, 1)
