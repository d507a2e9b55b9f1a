"""The answers that a model generates to prompts, and how fast it does.

Tensor axes: B rows of a batch, T tokens of its longest row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llamarefine_jobs.models.scoring import OnBatch


@dataclass(frozen=True)
class Answer:
    """A generated answer. `stopped` is False if it was cut at the limit of new tokens, without EOS."""

    text: str
    tokens: int
    stopped: bool


@dataclass(frozen=True)
class Speed:
    """How fast answers were generated. Tokens are counted as in Answer, without EOS."""

    answers: int
    tokens: int
    seconds: float
    tokens_per_s: float

    def __str__(self) -> str:
        answers = "1 answer" if self.answers == 1 else f"{self.answers} answers"
        return f"{answers}, {self.tokens} tokens in {self.seconds:.1f} s, {self.tokens_per_s:.0f} tokens/s"


def speed(answers: Sequence[Answer], seconds: float) -> Speed:
    """Return how fast `answers` were generated, if they took `seconds`."""
    tokens = sum(answer.tokens for answer in answers)
    return Speed(len(answers), tokens, round(seconds, 3), round(tokens / max(seconds, 1e-9), 1))


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

    A batch takes the longest unfinished rows, so it needs little padding. While other prompts wait, it ends as soon as
    half of its answers have ended, because a step takes nearly the same time for one row as for all. The other half
    continues in the next batch, beside new prompts; its tokens so far are computed once more. This makes at most twice
    as many batches, each of fewer steps.

    An answer ends at the model's last position at the latest: beyond it transformers generates noise, Unsloth raises.
    """
    import torch

    device, positions = next(model.parameters()).device, model.config.max_position_embeddings
    eos_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
    rows = [_Row(prompt, max(1, min(max_new_tokens, positions - len(prompt)))) for prompt in prompts]
    model.eval()
    while unfinished := sorted((row for row in rows if not row.ended), key=len, reverse=True):
        batch = unfinished[:batch_rows]
        longest = len(batch[0])
        with torch.inference_mode():
            ids_BT = torch.tensor([[pad_id] * (longest - len(row)) + row.prompt + row.new for row in batch])
            mask_BT = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in batch])
            output_BT = model.generate(
                input_ids=ids_BT.to(device),
                attention_mask=mask_BT.to(device),
                max_new_tokens=max(1, min(max(row.left for row in batch), positions - longest)),
                pad_token_id=pad_id,
                eos_token_id=eos_id,
                stopping_criteria=[_half_ended(batch, eos_id, device)] if len(unfinished) > len(batch) else None,
                **sampling,
            )
        for row, new in zip(batch, output_BT[:, longest:].tolist(), strict=True):
            row.extend(new, eos_id)
        if on_batch:
            on_batch(sum(row.ended for row in rows), len(rows))
    return [Answer(tokenizer.decode(row.new, skip_special_tokens=True), len(row.new), row.stopped) for row in rows]


@dataclass
class _Row:
    """A prompt and its answer so far."""

    prompt: list[int]
    limit: int  # of the answer's tokens
    new: list[int] = field(default_factory=list)
    stopped: bool = False

    def __len__(self) -> int:
        return len(self.prompt) + len(self.new)

    @property
    def left(self) -> int:
        """Return how many tokens the answer may still get."""
        return self.limit - len(self.new)

    @property
    def ended(self) -> bool:
        return self.stopped or self.left == 0

    def extend(self, new: list[int], eos_id: int) -> None:
        """Add generated tokens up to EOS, which is left out, or up to the limit."""
        new = new[: self.left]
        self.stopped = eos_id in new
        self.new += new[: new.index(eos_id)] if self.stopped else new


def _half_ended(batch: Sequence[_Row], eos_id: int, device: Any) -> Callable[..., Any]:
    """Return a stopping criterion for transformers: it ends `batch` once half of its answers have ended."""
    import torch

    longest, left_B = max(len(row) for row in batch), torch.tensor([row.left for row in batch], device=device)

    def stop(ids_BT: Any, scores: Any, **_: Any) -> Any:
        new_BT = ids_BT[:, longest:]
        ended_B = (new_BT == eos_id).any(-1) | (left_B <= new_BT.shape[1])
        return (2 * ended_B.sum() >= len(batch)).expand(len(batch))

    return stop
