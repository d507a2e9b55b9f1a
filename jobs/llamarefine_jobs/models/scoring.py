"""Log-probabilities that a model gives to given answers, and the answers that a model generates.

Tensor axes: B rows of a batch, T tokens of its longest row, V tokens of the vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llamarefine_jobs.models.encoding import Encoded

if TYPE_CHECKING:  # it imports torch and transformers, which must not be imported before Unsloth
    from llamarefine_jobs.models.forward import Forward

_BATCH_TOKENS = 8192

OnBatch = Callable[[int, int], None]  # called after each batch with (rows done, rows in all)


@dataclass(frozen=True)
class Score:
    """The score of one answer: the sum of its tokens' log-probabilities in nats, and their number, both with EOS."""

    logprob: float
    tokens: int


def score(forward: "Forward", rows: Sequence[Encoded], on_batch: OnBatch | None = None) -> list[Score]:
    """Return the log-probability that the forward's model gives to each row's answer after its prompt.

    Batches hold at most 8,192 tokens, and the first one holds the longest row, so if memory is too small it fails.
    """
    import torch

    scores: dict[int, Score] = {}
    was_training = forward.model.training
    forward.model.eval()
    try:
        batches = forward.passes([[len(row)] for row in rows], _BATCH_TOKENS)
        for indices in batches:
            batch = forward.batch([rows[index] for index in indices])
            with torch.no_grad(), torch.compiler.set_stance("force_eager"):  # a training's layers may be compiled
                nats_T = forward.nats(batch).double()
            sums = nats_T.new_zeros(batch.rows).index_add_(0, batch.row_of, nats_T).tolist()
            for index, nats in zip(indices, sums, strict=True):
                scores[index] = Score(-nats, len(rows[index].answer_ids))
            if on_batch:
                on_batch(len(scores), len(rows))
    finally:
        forward.model.train(was_training)
    return [scores[index] for index in range(len(rows))]
