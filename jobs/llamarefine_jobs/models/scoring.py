"""Log-probabilities that a model gives to given answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llamarefine_jobs.models.encoding import Encoded

if TYPE_CHECKING:  # it imports torch and transformers, which must not be imported before Unsloth
    from llamarefine_jobs.models.forward import Forward

_BATCH_TOKENS = 8192  # at most, unless one row is longer

OnBatch = Callable[[int, int], None]  # called after each batch with (rows done, rows in all)


@dataclass(frozen=True)
class Score:
    """The score of one answer: the sum of its tokens' log-probabilities in nats, and their number, both with EOS."""

    logprob: float
    tokens: int


def score(forward: "Forward", rows: Sequence[Encoded], on_batch: OnBatch | None = None) -> list[Score]:
    """Return the log-probability that the forward's model gives to each row's answer after its prompt.

    The first batch holds the longest row, so if memory is too small, scoring fails at its start.
    """
    from llamarefine_jobs.models.forward import measuring, row_sums

    scores: dict[int, Score] = {}
    with measuring(forward.model):
        for indices in forward.passes([[len(row)] for row in rows], _BATCH_TOKENS):
            batch = forward.batch([rows[index] for index in indices])
            for index, nats in zip(indices, row_sums(forward.nats(batch), batch).tolist(), strict=True):
                scores[index] = Score(-nats, len(rows[index].answer_ids))
            if on_batch:
                on_batch(len(scores), len(rows))
    return [scores[index] for index in range(len(rows))]
