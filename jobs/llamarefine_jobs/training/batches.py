"""The order of the training rows, the same for any number of processes and any micro-batch size."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler


class WholeBatches(Sampler[int]):  # torch is untyped here
    """Yields every row once an epoch, in a new order each epoch; the epoch's first rows fill up the last batch.

    Each optimizer step then has exactly `batch_rows` rows, the same rows for any number of processes: accelerate gives
    the micro-batches to the processes in turn. Without this sampler, accelerate would fill up the last batch
    differently for each number of processes, and a step over fewer rows would average unequal micro-batches.

    With `lengths` (tokens of each row), each step orders its rows from the longest to the shortest: a micro-batch is
    then padded only to the length of its own rows, and the step computes the same gradient.
    """

    def __init__(
        self, rows: int, batch_rows: int, seed: int, epoch: Callable[[], int], lengths: Sequence[int] | None = None
    ) -> None:
        self._rows = rows
        self._batch_rows = batch_rows
        self._length = -(-rows // batch_rows) * batch_rows
        self._lengths = lengths
        self._seed = seed
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed + self._epoch())
        order = torch.randperm(self._rows, generator=generator).tolist()
        filled = [order[place % self._rows] for place in range(self._length)]
        for start in range(0, self._length, self._batch_rows):
            step = filled[start : start + self._batch_rows]
            yield from sorted(step, key=self._lengths.__getitem__, reverse=True) if self._lengths else step
