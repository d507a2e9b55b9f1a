"""Prove before the first DPO step that the reference is the SFT policy.

A loss of ln 2 shows only that policy and reference agree; a fresh adapter on the *bare base* has that loss too.
Therefore the reference's log-probabilities must match the log-probabilities of base + SFT adapter within a tolerance,
and must differ from the bare base's. Both are computed separately, with the adapter beside the weights, not merged.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamarefine_jobs.context import Context
from llamarefine_jobs.contract.errors import ProofError
from llamarefine_jobs.models import adapters, backends
from llamarefine_jobs.models.encoding import Encoded
from llamarefine_jobs.models.scoring import score

LN_2 = math.log(2)
_COMPARED_PAIRS = 16
_LOSS_TOLERANCE = 1e-6
_NOTHING_LEARNED = 1e-5  # nats per token
# Nats per token by which two ways of computing the same policy may differ: the merged weights are rounded.
_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "nf4": 3e-1}


@dataclass(frozen=True)
class ReferenceScores:
    """The mean log-probability per token of each answer of the first pairs, from a model that is not the policy."""

    pairs: Sequence[tuple[Encoded, Encoded]]
    pad_id: int
    batch_rows: int
    base: list[float]
    sft: list[float]
    sft_twice: list[float]

    @property
    def answers(self) -> list[Encoded]:
        return [answer for pair in self.pairs for answer in pair]


def score_reference_separately(
    backend: backends.Backend,
    base: Path,
    adapter: Path,
    pairs: Sequence[tuple[Encoded, Encoded]],
    pad_id: int,
    batch_rows: int,
) -> ReferenceScores:
    """Score the first pairs with the bare base, with base + SFT, and with the SFT adapter applied twice."""
    compared = pairs[:_COMPARED_PAIRS]
    answers = [answer for pair in compared for answer in pair]
    model = backend.load(base)
    bare = _per_token(model, answers, pad_id, batch_rows)
    model = adapters.attach_adapter(model, adapter)
    once = _per_token(model, answers, pad_id, batch_rows)
    _scale_adapter(model, 2.0)
    twice = _per_token(model, answers, pad_id, batch_rows)
    del model
    backends.free_memory()  # the policy is loaded next
    return ReferenceScores(compared, pad_id, batch_rows, bare, once, twice)


def prove(trainer: Any, expected: ReferenceScores, context: Context) -> dict[str, float]:
    """Check policy and reference before the first step; return the figures. Raises ProofError with a likely cause."""
    loss, margin = _trainer_loss(trainer, len(expected.pairs))
    with trainer.model.disable_adapter():
        reference = _per_token(trainer.model, expected.answers, expected.pad_id, expected.batch_rows)
    figures = check_figures(loss, margin, reference, expected, _tolerance(trainer.model))
    context.note(
        f"step 0: loss {loss:.8f} (ln 2 is {LN_2:.8f}), margin {margin:g}; the reference is the SFT policy within "
        f"{figures['reference_error']:.1e} nats a token and {figures['distance_from_base']:.3g} away from the base"
    )
    return figures


def check_figures(
    loss: float, margin: float, reference: list[float], expected: ReferenceScores, tolerance: float
) -> dict[str, float]:
    """Raise ProofError unless `reference` is near `expected.sft`, far from `expected.base`, and the loss is ln 2."""
    error = _distance(reference, expected.sft)
    learned = _distance(expected.sft, expected.base)
    if learned <= _NOTHING_LEARNED:
        raise ProofError(
            f"the SFT adapter moves the base's log-probabilities by {learned:.1e} nats a token: it learned nothing, so "
            "a reference with it is the same as one without it; train SFT longer or at a higher learning rate"
        )
    if error > tolerance or error > learned / 3:
        raise ProofError(
            f"the reference is not the SFT policy: expected base + SFT within {min(tolerance, learned / 3):.1e} nats "
            f"a token, found {error:.1e} away; {_likely_cause(reference, expected)}"
        )
    if abs(loss - LN_2) > _LOSS_TOLERANCE or abs(margin) > _LOSS_TOLERANCE:
        raise ProofError(
            f"policy and reference differ before the first step: expected loss ln 2 = {LN_2:.8f} and margin 0, found "
            f"{loss:.8f} and {margin:.2e}; the policy does not start from the SFT policy"
        )
    return {
        "loss": loss,
        "margin": margin,
        "reference_error": error,
        "distance_from_base": _distance(reference, expected.base),
    }


def _likely_cause(reference: list[float], expected: ReferenceScores) -> str:
    """Return the known mistake that would explain the reference's scores, as a clause of a message."""
    near = _distance(expected.sft, expected.base) / 10
    if _distance(reference, expected.base) <= near:
        return "it is the bare base: the SFT adapter is missing in it"
    if _distance(reference, expected.sft_twice) <= near:
        return "the SFT adapter counts twice in it"
    return "neither the bare base nor the SFT adapter counted twice explains it: was SFT trained on another base?"


def _trainer_loss(trainer: Any, pairs: int) -> tuple[float, float]:
    """Return the trainer's own loss and reward margin, each the worst of the first pairs, with dropout off."""
    import torch

    model = trainer.model
    was_training, precomputed = model.training, trainer.precompute_ref_logps
    model.eval()
    trainer.precompute_ref_logps = False  # compute both sides now, also if the training precomputes the reference
    losses = []
    try:
        for index in range(pairs):
            batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[index]]))
            with torch.no_grad():
                losses.append(float(trainer.compute_loss(model, batch)))
        margins = [float(value) for value in trainer._metrics["eval"].pop("rewards/margins")]
        trainer._metrics["eval"].clear()
    finally:
        trainer.precompute_ref_logps = precomputed
        model.train(was_training)
    return max(losses, key=lambda loss: abs(loss - LN_2)), max(margins, key=abs)


def _per_token(model: Any, answers: list[Encoded], pad_id: int, batch_rows: int) -> list[float]:
    return [found.logprob / found.tokens for found in score(model, pad_id, answers, batch_rows)]


def _distance(one: list[float], other: list[float]) -> float:
    """Return the mean absolute difference, in nats per token."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


def _scale_adapter(model: Any, factor: float) -> None:
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(factor)


def _tolerance(model: Any) -> float:
    if getattr(model, "is_loaded_in_4bit", False):
        return _TOLERANCE["nf4"]
    weight = next(parameter for parameter in model.parameters() if not parameter.requires_grad)
    return _TOLERANCE["bf16" if "float16" in str(weight.dtype) else "fp32"]
