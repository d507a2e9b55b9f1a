"""The order in which rows are trained on, the same for any number of processes and any micro batch."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import Sampler


class WholeBatches(Sampler[int]):  # torch is untyped here
    """Every row once an epoch, in a new order each time; the last batch is filled with the epoch's first rows.

    So each optimizer step has exactly `batch_rows` rows, and they are the same rows however many processes
    share them: accelerate deals micro batches out in turn. Left to itself it fills up differently for each number of
    processes, and a step over fewer rows is a mean of unequal micro batches.

    With `lengths`, tokens by row, each step takes its rows from the longest to the shortest: its micro batches are then
    padded to what their own rows need, and what a step learns is the same.
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
        whole = [order[place % self._rows] for place in range(self._length)]
        for start in range(0, self._length, self._batch_rows):
            step = whole[start : start + self._batch_rows]
            yield from sorted(step, key=self._lengths.__getitem__, reverse=True) if self._lengths else step
