"""What a model makes of given answers (log-probabilities), and the answers it gives itself.

Shapes: B rows of a batch, T tokens of the longest of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llamarefine_jobs.models.encoding import Encoded

Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class Score:
    """Of one answer: the sum of its tokens' log-probabilities in nats, EOS included, and how many they are."""

    logprob: float
    tokens: int


@dataclass(frozen=True)
class Answer:
    """What a model said. `stopped` is false where it was cut at the limit of new tokens."""

    text: str
    tokens: int
    stopped: bool


def score(model: Any, pad_id: int, rows: Sequence[Encoded], batch_rows: int, tick: Tick | None = None) -> list[Score]:
    """The log-probability that `model` gives each row's answer after its prompt.

    Rows are taken longest first, so a batch wastes little on padding and memory runs out at once
    or never. Logits are kept for the answers' positions only, and turned to fp32 before the
    softmax.
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
                hidden = model(input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device), use_cache=False)
                logits_BTV = hidden.logits
            for place, index in enumerate(batch):
                row = rows[index]
                begin, end = len(row.prompt_ids), len(row)
                answer_logits = logits_BTV[place, begin - 1 : end - 1].float()
                target = torch.tensor(row.answer_ids, device=device)
                picked = answer_logits.log_softmax(-1).gather(-1, target[:, None])
                scores[index] = Score(float(picked.double().sum()), len(row.answer_ids))
            if tick:
                tick(min(start + batch_rows, len(order)), len(order))
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
    tick: Tick | None = None,
) -> list[Answer]:
    """The model's answers to tokenised prompts; the likeliest token each time at temperature 0.

    An answer ends where the model's positions do: past them transformers makes noise and Unsloth raises.
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
        for place, index in enumerate(batch):  # padded on the left: generation goes on at the right
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
        if tick:
            tick(min(start + batch_rows, len(order)), len(order))
    return [answers[index] for index in range(len(prompts))]
