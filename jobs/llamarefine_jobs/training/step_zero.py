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

from llamarefine_jobs.contract.errors import ProofError
from llamarefine_jobs.models import adapters, backends
from llamarefine_jobs.models.encoding import Encoded
from llamarefine_jobs.models.forward import PaddedForward, measuring, row_sums
from llamarefine_jobs.models.scoring import score

LN_2 = math.log(2)
_COMPARED_PAIRS = 16
_LOSS_TOLERANCE = 1e-6
_NOTHING_LEARNED = 1e-5  # nats per token
# Nats per token by which two ways of computing the same policy may differ: the merged weights are rounded.
_TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2, "nf4": 3e-1}
# The first step packs and computes its rows otherwise than the reference was computed, so its loss differs by rounding.
_STEP_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2, "nf4": 2e-2}


@dataclass(frozen=True)
class ExpectedScores:
    """The mean log-probability per token of each answer of the first pairs, from models that are not the policy."""

    base: list[float]
    sft: list[float]
    sft_twice: list[float]


def score_reference_separately(
    backend: backends.Backend, base: Path, adapter: Path, pairs: Sequence[tuple[Encoded, Encoded]], pad_id: int
) -> ExpectedScores:
    """Score the first pairs with the bare base, with base + SFT, and with the SFT adapter applied twice.

    The models use their own attention over padded rows, so this checks the training's packed rows, too.
    """
    answers = [answer for pair in pairs[:_COMPARED_PAIRS] for answer in pair]
    model = backend.load(base)
    bare = _per_token(model, pad_id, answers)
    model = adapters.attach_adapter(model, adapter)
    once = _per_token(model, pad_id, answers)
    _scale_adapter(model, 2.0)
    twice = _per_token(model, pad_id, answers)
    del model
    backends.free_memory()  # the policy is loaded next
    return ExpectedScores(bare, once, twice)


def prove(trainer: Any, expected: ExpectedScores) -> dict[str, float]:
    """Check policy and reference before the first step; return the figures. Raises ProofError with a likely cause.

    The reference is what the training uses: the log-probabilities in the trainer's examples.
    """
    loss, margin = _worst_pair(trainer)
    reference = [
        nats / len(row.answer_ids)
        for example in trainer.examples[:_COMPARED_PAIRS]
        for row, nats in zip(example.rows, example.reference, strict=True)
    ]
    dtype = _dtype_name(trainer.model)
    figures = check_figures(loss, margin, reference, expected, _TOLERANCE[dtype])
    figures["step_loss"] = _loss_of_first_step(trainer)
    if not abs(figures["step_loss"] - LN_2) <= _STEP_TOLERANCE[dtype]:
        raise ProofError(
            f"the first training step does not start from the reference: expected a loss of ln 2 = {LN_2:.8f} within "
            f"{_STEP_TOLERANCE[dtype]:g}, found {figures['step_loss']:.8f}"
        )
    trainer.context.note(
        f"step 0: loss {loss:.8f} (ln 2 is {LN_2:.8f}), margin {margin:g}; the reference is the SFT policy within "
        f"{figures['reference_error']:.1e} nats a token and {figures['distance_from_base']:.3g} away from the base"
    )
    return figures


def check_figures(
    loss: float, margin: float, reference: list[float], expected: ExpectedScores, tolerance: float
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


def _likely_cause(reference: list[float], expected: ExpectedScores) -> str:
    """Return the known mistake that would explain the reference's scores, as a clause of a message."""
    near = _distance(expected.sft, expected.base) / 10
    if _distance(reference, expected.base) <= near:
        return "it is the bare base: the SFT adapter is missing in it"
    if _distance(reference, expected.sft_twice) <= near:
        return "the SFT adapter counts twice in it"
    return "neither the bare base nor the SFT adapter counted twice explains it: was SFT trained on another base?"


def _worst_pair(trainer: Any) -> tuple[float, float]:
    """Return the loss farthest from ln 2 and the reward margin farthest from 0 among the first pairs.

    Policy and reference are computed in the same way now, so they agree to the last bit if they are the same model.
    """
    forward, objective = trainer.forward, trainer.objective
    losses, margins = [], []
    with measuring(trainer.model):
        for example in trainer.examples[:_COMPARED_PAIRS]:
            batch = forward.batch(example.rows)
            with trainer.model.disable_adapter():
                reference_R = -row_sums(forward.nats(batch), batch)
            nats_T = forward.nats(batch)
            losses.append(float(objective.loss(nats_T, batch, reference_R, 1)))
            margins.append(float(objective.margins(nats_T, batch, reference_R)))
    return max(losses, key=lambda loss: abs(loss - LN_2)), max(margins, key=abs)


def _loss_of_first_step(trainer: Any) -> float:
    """Return the loss of the first step, computed as the training computes it, without training on it."""
    (loss,) = trainer.context.world.sum_over_processes(lambda: [float(trainer.step_loss(1))])
    trainer.weights.clear_gradient()
    return float(loss)


def _per_token(model: Any, pad_id: int, answers: Sequence[Encoded]) -> list[float]:
    return [found.logprob / found.tokens for found in score(PaddedForward(model, pad_id), answers)]


def _distance(one: list[float], other: list[float]) -> float:
    """Return the mean absolute difference, in nats per token."""
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


def _scale_adapter(model: Any, factor: float) -> None:
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(factor)


def _dtype_name(model: Any) -> str:
    if getattr(model, "is_loaded_in_4bit", False):
        return "nf4"
    weight = next(parameter for parameter in model.parameters() if not parameter.requires_grad)
    return "bf16" if "float16" in str(weight.dtype) else "fp32"
