"""Log-probabilities that a model gives to given answers, and the answers that a model generates.

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


@dataclass(frozen=True)
class Answer:
    """A generated answer. `stopped` is False if it was cut at the limit of new tokens, without EOS."""

    text: str
    tokens: int
    stopped: bool


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


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_rows: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    on_batch: OnBatch | None = None,
) -> list[Answer]:
    """Return the model's answers to tokenised prompts. Temperature 0 means greedy decoding.

    An answer ends at the model's last position at the latest: beyond it transformers generates noise, Unsloth raises.
    """
    import torch

    device = next(model.parameters()).device
    positions = model.config.max_position_embeddings
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    answers: dict[int, Answer] = {}
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    model.eval()
    for start in range(0, len(order), batch_rows):
        batch = order[start : start + batch_rows]
        longest = max(len(prompts[index]) for index in batch)
        ids_BT = torch.full((len(batch), longest), tokenizer.pad_token_id)
        mask_BT = torch.zeros((len(batch), longest), dtype=torch.long)
        for place, index in enumerate(batch):  # padded on the left, because generation appends on the right
            ids_BT[place, longest - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask_BT[place, longest - len(prompts[index]) :] = 1
        with torch.no_grad():
            output_BT = model.generate(
                input_ids=ids_BT.to(device),
                attention_mask=mask_BT.to(device),
                max_new_tokens=max(1, min(max_new_tokens, positions - longest)),
                pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                **sampling,
            )
        for place, index in enumerate(batch):
            new = output_BT[place, longest:].tolist()
            stopped = tokenizer.eos_token_id in new
            kept = new[: new.index(tokenizer.eos_token_id)] if stopped else new
            answers[index] = Answer(tokenizer.decode(kept, skip_special_tokens=True), len(kept), stopped)
        if on_batch:
            on_batch(min(start + batch_rows, len(order)), len(order))
    return [answers[index] for index in range(len(prompts))]
