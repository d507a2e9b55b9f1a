"""Log-probabilities that a model gives to given answers.

Tensor axes: B rows of a batch, T tokens of its longest row, V tokens of the vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llamarefine_jobs.models.encoding import Encoded

OnBatch = Callable[[int, int], None]  # called after each batch with (rows done, rows in all)


@dataclass(frozen=True)
class Score:
    """The score of one answer: the sum of its tokens' log-probabilities in nats, and their number, both with EOS."""

    logprob: float
    tokens: int


def score(
    model: Any, pad_id: int, rows: Sequence[Encoded], batch_rows: int, on_batch: OnBatch | None = None
) -> list[Score]:
    """Return the log-probability that `model` gives to each row's answer after its prompt.

    Rows are scored longest first, so batches need little padding, and if memory is too small the first batch fails.
    Only the logits of the answers' positions are cast to fp32, before the softmax.
    """
    import torch

    scores: dict[int, Score] = {}
    order = sorted(range(len(rows)), key=lambda index: (-len(rows[index]), index))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(order), batch_rows):
            batch = order[start : start + batch_rows]
            longest = max(len(rows[index]) for index in batch)
            ids_BT = torch.full((len(batch), longest), pad_id)
            mask_BT = torch.zeros((len(batch), longest), dtype=torch.long)
            for place, index in enumerate(batch):
                row = rows[index]
                ids_BT[place, : len(row)] = torch.tensor(row.prompt_ids + row.answer_ids)
                mask_BT[place, : len(row)] = 1
            with torch.no_grad():
                output = model(input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), use_cache=False)
                logits_BTV = output.logits
            for place, index in enumerate(batch):
                row = rows[index]
                begin, end = len(row.prompt_ids), len(row)
                answer_logits = logits_BTV[place, begin - 1 : end - 1].float()
                target = torch.tensor(row.answer_ids, device=device)
                logprobs = answer_logits.log_softmax(-1).gather(-1, target[:, None])
                scores[index] = Score(float(logprobs.double().sum()), len(row.answer_ids))
            if on_batch:
                on_batch(min(start + batch_rows, len(order)), len(order))
    finally:
        model.train(was_training)
    return [scores[index] for index in range(len(rows))]
