"""Which rows each optimizer step has, and its learning rate: the same for any number of processes and passes."""

import math
from functools import lru_cache

from llamarefine_jobs.contract.recipe import Dpo, Sft


class Schedule:
    """The rows and learning rates of a training's steps, numbered from 1.

    Each epoch takes every row once, in a new order; the epoch's first rows fill up its last step, so that every step
    has exactly `batch_rows` rows.
    """

    def __init__(self, section: Sft | Dpo, rows: int, seed: int) -> None:
        self._section = section
        self._rows = rows
        self._seed = seed
        self._steps_per_epoch = -(-rows // section.batch_rows)
        self.steps = section.max_steps or math.ceil(section.epochs * self._steps_per_epoch)
        self._order = lru_cache(maxsize=2)(self._order_of)

    def rows_of(self, step: int) -> list[int]:
        """Return the indices of the step's rows."""
        epoch, place = divmod(step - 1, self._steps_per_epoch)
        order, size = self._order(epoch), self._section.batch_rows
        return [order[index % self._rows] for index in range(place * size, (place + 1) * size)]

    def learning_rate(self, step: int) -> float:
        """Return the rate of a step, as transformers' schedules compute it: the first step of a warm-up has rate 0."""
        done = step - 1
        warmup = math.ceil(self.steps * self._section.warmup_fraction)
        if self._section.lr_schedule == "constant":
            factor = 1.0
        elif done < warmup:
            factor = done / max(1, warmup)
        else:
            progress = (done - warmup) / max(1, self.steps - warmup)
            factor = 1 - progress if self._section.lr_schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return self._section.learning_rate * max(0.0, factor)

    def _order_of(self, epoch: int) -> list[int]:
        import torch

        generator = torch.Generator().manual_seed(self._seed + epoch)
        order: list[int] = torch.randperm(self._rows, generator=generator).tolist()
        return order
