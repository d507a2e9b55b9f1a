"""Rows, adapters and a context for tests of the training step, without a stage around it."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from llamarefine_jobs.context import Context
from llamarefine_jobs.models.encoding import Encoded
from llamarefine_jobs.models.packing import Size
from llamarefine_jobs.training.objectives import Example
from tests.jobs import tiny

TOKENS = 300  # of the vocabulary
LENGTHS = (3, 300, 4, 7, 150, 12, 20, 90, 35, 5, 60, 41)
PAD = 2
PACKED = SimpleNamespace(name="packed")  # what a training reads of its backend
PADDED = SimpleNamespace(name="transformers")


def row(tokens: int, seed: int = 0, answer: int | None = None) -> Encoded:
    """Return a random row, whose answer is two thirds of it, or `answer` tokens."""
    generator = torch.Generator().manual_seed(1000 * seed + tokens)
    ids = torch.randint(3, TOKENS, (tokens,), generator=generator).tolist()
    cut = tokens - (answer or max(1, 2 * tokens // 3))
    return Encoded(ids[:cut], ids[cut:])


def rows(lengths: Sequence[int] = LENGTHS) -> list[Encoded]:
    """Return rows of these lengths, all different."""
    return [row(tokens, seed) for seed, tokens in enumerate(lengths)]


def pairs(lengths: Sequence[int] = LENGTHS) -> list[tuple[Encoded, Encoded]]:
    """Return a chosen and a rejected answer of different length to each prompt."""
    found = []
    for seed, tokens in enumerate(lengths):
        chosen = row(tokens, seed)
        rejected = row(max(3, 320 - tokens) // 2, seed + 100)
        found.append((chosen, Encoded(chosen.prompt_ids, rejected.answer_ids)))
    return found


def with_adapter(model: Any, *, rank: int = 4, dropout: float = 0.0, b_scale: float = 0.05) -> Any:
    """Return `model` with a random adapter whose B matrices are not 0, so that both matrices get a gradient."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    model = get_peft_model(
        model.requires_grad_(False),
        LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear"),
    )
    torch.manual_seed(2)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, b_scale)
    return model.train()


def make_policy(dropout: float = 0.0, b_scale: float = 0.05, **config: Any) -> Any:
    """Return a random Llama with a random adapter, the same one for the same arguments."""
    return with_adapter(
        tiny.make_model(TOKENS, **({"initializer_range": 0.1} | config)), dropout=dropout, b_scale=b_scale
    )


def sized_forward(model: Any, size: Size) -> Any:
    """Return a forward that packs every pass into a sequence of one size, with random tokens as its padding."""
    from llamarefine_jobs.models.forward import PackedForward

    class SizedForward(PackedForward):
        def batch(self, rows: Sequence[Encoded], _size: Size | None = None) -> Any:
            packed = super().batch(rows, size)
            used = sum(map(len, rows))
            packed.ids[used:] = torch.randint(0, TOKENS, (size.tokens - used,))
            return packed

    return SizedForward(model)


def sft_examples(of: Sequence[Encoded]) -> list[Example]:
    return [Example((one,)) for one in of]


def gradients(model: Any) -> dict[str, Any]:
    """Return a copy of every gradient of the adapter, by its weight's name."""
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.requires_grad}
    assert found
    return found


def worst_difference(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Return the largest difference of two tensors of the same name, relative to the largest number of the tensor."""
    assert set(found) == set(expected)
    return max(
        float((found[name] - expected[name]).abs().max() / expected[name].abs().max().clamp_min(1e-12))
        for name in expected
    )


def make_context(folder: Path, stage: str, *overrides: str) -> Context:
    """Return the context of a training of the tiny recipe in `folder`, without artifacts that it reads."""
    return tiny.make_context(stage, tiny.recipe(*overrides), folder, {}, {})
