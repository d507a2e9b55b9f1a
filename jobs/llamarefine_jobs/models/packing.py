"""Rows packed into one sequence of a fixed number of tokens, and the choice of these numbers.

Tensor axes: T positions of the sequence, S segments: the rows and the pieces of padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llamarefine_jobs.models.encoding import Encoded
from llamarefine_jobs.models.token_loss import NO_TARGET

_ROUNDED_TO_TOKENS = 128  # sizes are multiples of it, which matrix products of GPUs like


@dataclass(frozen=True)
class Size:
    """The fixed size of a packed sequence: `tokens` positions for at most `rows` rows of at most `longest` tokens."""

    tokens: int
    rows: int
    longest: int

    @property
    def segments(self) -> int:
        """The number of rows and of pieces of padding. A piece is at most as long as the longest row."""
        return self.rows + -(-self.tokens // self.longest)


class Packed:
    """The tensors of one packed sequence. All are views of one int64 tensor, so one copy moves them to the device.

    ids, positions: (T,) token ids, and their places within their rows.
    targets: (T,) the next token of the row where it counts in the loss, else NO_TARGET.
    row_of: (T,) the row that a position belongs to; padding counts to the last row.
    ends: (S + 1,) cumulative lengths of the segments.
    """

    def __init__(self, size: Size, device: Any) -> None:
        import torch

        self.size = size
        self._numbers = torch.zeros(4 * size.tokens + size.segments + 1, dtype=torch.int64, device=device)
        four = self._numbers[: 4 * size.tokens].view(4, size.tokens)
        self.ids, self.positions, self.targets, self.row_of = four
        self.ends = self._numbers[4 * size.tokens :]

    @property
    def rows(self) -> int:
        """The number of rows that the row sums have, with those that are empty."""
        return self.size.rows

    def fill(self, rows: Sequence[Encoded]) -> "Packed":
        """Copy `rows` into the tensors and return self. Does not wait for the device."""
        import torch

        numbers = torch.from_numpy(pack(rows, self.size))
        if self._numbers.is_cuda:
            numbers = numbers.pin_memory()  # only from pinned memory does the copy run while Python goes on
        self._numbers.copy_(numbers, non_blocking=True)
        return self


def pack(rows: Sequence[Encoded], size: Size) -> Any:
    """Return the numbers of `Packed` for `rows`: ids, positions, targets, row_of (T each), ends (S + 1).

    Padding is cut into pieces, because the attention kernel leaves a longer piece as it finds the memory: a NaN there
    would reach the adapters' gradients, even with a gradient of 0 at the padding.
    """
    lengths = [len(row) for row in rows]
    used = sum(lengths)
    if used > size.tokens or len(rows) > size.rows or max(lengths, default=0) > size.longest:
        raise AssertionError(f"{len(rows)} rows of {used} tokens do not fit {size}")
    numbers = np.zeros(4 * size.tokens + size.segments + 1, dtype=np.int64)
    ids, positions, targets, row_of = numbers[: 4 * size.tokens].reshape(4, size.tokens)
    ends = numbers[4 * size.tokens :]
    targets[:] = NO_TARGET
    row_of[used:] = size.rows - 1
    positions[used:] = np.arange(size.tokens - used) % size.longest
    start = 0
    for place, row in enumerate(rows):
        prompt, end = len(row.prompt_ids), start + len(row)
        ids[start : start + prompt] = row.prompt_ids
        ids[start + prompt : end] = row.answer_ids
        positions[start:end] = np.arange(end - start)
        targets[start + prompt - 1 : end - 1] = row.answer_ids
        row_of[start:end] = place
        ends[place + 1] = start = end
    ends[len(rows) + 1 : size.rows + 1] = used  # rows that are not there are empty
    padding_ends = used + size.longest * np.arange(1, size.segments - size.rows + 1)
    ends[size.rows + 1 :] = np.minimum(padding_ends, size.tokens)
    return numbers


def exact_size(rows: Sequence[Encoded]) -> Size:
    """Return the size without padding, for devices on which a new size costs nothing."""
    lengths = [len(row) for row in rows]
    return Size(sum(lengths), len(rows), max(lengths))


def split(lengths: Sequence[int], most_tokens: int | None, most_items: int | None = None) -> list[list[int]]:
    """Split items of `lengths` tokens into passes of at most `most_tokens` tokens and `most_items` items.

    Returns the items' indices, pass by pass. As few passes as possible are opened at first, and each item, the longest
    first, goes to the pass with the fewest tokens, so the passes are about equally large. An item longer than
    `most_tokens` gets a pass of its own.
    """
    total = sum(lengths)
    count = max(
        -(-total // most_tokens) if most_tokens else 1,
        -(-len(lengths) // most_items) if most_items else 1,
    )
    passes: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        open_passes = [
            place
            for place in range(len(passes))
            if not passes[place]
            or (
                (most_items is None or len(passes[place]) < most_items)
                and (most_tokens is None or filled[place] + lengths[index] <= most_tokens)
            )
        ]
        if open_passes:
            place = min(open_passes, key=filled.__getitem__)
        else:
            place = len(passes)
            passes.append([])
            filled.append(0)
        passes[place].append(index)
        filled[place] += lengths[index]
    return [indices for indices in passes if indices]


def choose_sizes(pass_tokens: Sequence[int], most_sizes: int) -> list[int]:
    """Return at most `most_sizes` numbers of tokens that hold passes of `pass_tokens` tokens with the least padding.

    Each is a multiple of 128. Every pass fits the largest. Found by dynamic programming over the distinct sizes.
    """
    rounded = [round_up(tokens) for tokens in pass_tokens]
    sizes, counts = np.unique(rounded, return_counts=True)
    cumulative = np.concatenate([[0], np.cumsum(counts)])
    # least[k][j]: the fewest computed tokens for the passes up to sizes[j - 1], with k sizes, the largest sizes[j - 1].
    least = np.full((most_sizes + 1, len(sizes) + 1), np.inf)
    least[:, 0] = 0
    before = np.zeros((most_sizes + 1, len(sizes) + 1), dtype=int)
    for used in range(1, most_sizes + 1):
        for j in range(1, len(sizes) + 1):
            costs = [least[used - 1, i] + (cumulative[j] - cumulative[i]) * sizes[j - 1] for i in range(j)]
            before[used, j] = int(np.argmin(costs))
            least[used, j] = costs[before[used, j]]
    chosen: list[int] = []
    j = len(sizes)
    for used in range(most_sizes, 0, -1):
        if j == 0:
            break
        chosen.append(int(sizes[j - 1]))
        j = before[used, j]
    return sorted(chosen)


def round_up(tokens: int) -> int:
    """Return the next multiple of 128 tokens."""
    return -(-tokens // _ROUNDED_TO_TOKENS) * _ROUNDED_TO_TOKENS
