"""Direct preference optimisation: train a second LoRA adapter, with the SFT policy as the reference.

    python -m llamarefine_jobs.dpo --recipe recipe.yaml --store s3://bucket/prefix

Reads base/ and preferences/ of prepare and adapter/ of sft, writes adapter/ (PEFT's format). The SFT adapter is
merged into the base in fp32 and a fresh adapter is added; with that adapter disabled the model *is* the
reference. training/step_zero.py proves this before the first step; if the proof fails, nothing is trained.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from llamarefine_jobs import entry
from llamarefine_jobs.context import Context
from llamarefine_jobs.models import adapters, backends
from llamarefine_jobs.models.encoding import Encoded, encode_pairs, load_tokenizer, read_rows
from llamarefine_jobs.models.lora import ADAPTER_WEIGHTS
from llamarefine_jobs.models.scoring import OnBatch, score
from llamarefine_jobs.report.intervals import Bootstrap, Floats, Interval
from llamarefine_jobs.report.preference import likelihood_margins, preference

# Not `evaluate.confidence` and `evaluate.bootstrap_resamples`: they may change without a new training.
_CONFIDENCE, _RESAMPLES = 0.95, 2000


def work(context: Context) -> None:
    """Train the DPO adapter."""
    # Backend: chosen before anything imports transformers or peft.
    backend = backends.choose_backend(context.recipe.dpo.backend, context.world.size, "dpo.backend")
    context.backend, context.accelerator = backend.name, backend.accelerator
    context.note(backends.describe_backend(backend))
    from llamarefine_jobs.training import checkpoint_files, loop, step_zero
    from llamarefine_jobs.training.checked_forward import checked_forward
    from llamarefine_jobs.training.objectives import DpoObjective
    from llamarefine_jobs.training.reference_logprobs import examples_with_reference

    recipe, section = context.recipe, context.recipe.dpo
    base, preferences = context.inputs["prepare"] / "base", context.inputs["prepare"] / "preferences"
    adapter = context.inputs["sft"] / "adapter"
    adapters.check_lineage(context, "sft", "prepare")

    # Data.
    tokenizer = load_tokenizer(base)
    pairs = encode_pairs(tokenizer, read_rows(preferences, "train"))
    validation_rows = read_rows(preferences, "validation")
    tokens = sum(len(chosen) + len(rejected) for chosen, rejected in pairs)
    context.note(f"{len(pairs)} pairs to train on, {tokens} tokens; {len(validation_rows)} to validate")

    # The expected scores of the reference, computed separately from the model that is trained.
    expected = step_zero.score_reference_separately(backend, base, adapter, pairs, tokenizer.pad_token_id)

    # Model: base with the SFT adapter merged into it, frozen; a fresh adapter on top.
    policy = (context.world.shared or context.work) / "sft_policy"
    if context.world.is_first_on_node:
        adapters.merge_in_memory(base, adapter, policy, bf16=backend.bf16)
    context.world.barrier()
    model = backend.load(policy, quantization=section.quantization, max_length_tokens=recipe.max_length_tokens)
    loop.set_token_ids(model, tokenizer)
    model = backend.add_adapter(
        model, section.lora, seed=recipe.seed, gradient_checkpointing=section.gradient_checkpointing
    )

    # Reference: the log-probabilities of all answers, computed once.
    checkpoint = context.fetch_checkpoint()
    rows = [answer for pair in pairs for answer in pair]
    forward = checked_forward(backend, model, tokenizer.pad_token_id, rows, context.note)
    with checkpoint_files.reporting_damage(context):
        examples = examples_with_reference(forward, pairs, checkpoint, context)

    # Training.
    validation_pairs = encode_pairs(tokenizer, validation_rows)
    validation = PairValidation(validation_pairs, context)
    trainer = loop.Trainer(context, section, forward, examples, DpoObjective(section.beta), validation.validate)
    trainer.prepare()
    context.metrics["step_zero"] = step_zero.prove(trainer, expected)
    trainer.train(checkpoint)

    # Validation of the published adapter.
    if context.world.is_first:
        context.metrics["validation"] = measure_published(trainer.forward, validation_pairs, validation_rows, context)


class PairValidation:
    """Validates a policy on the validation pairs. Each process scores its share; the reference is scored only once."""

    def __init__(self, pairs: list[tuple[Encoded, Encoded]], context: Context) -> None:
        self._pairs = context.world.shard(pairs)
        self._context = context
        self._reference_margins: Floats | None = None

    def validate(self, forward: Any) -> dict[str, float]:
        """Return the DPO loss, the reward accuracy and the reward margin: means over the pairs of all processes.

        Raises PreemptedError on SIGTERM.
        """

        def sums_of_own_pairs() -> list[float]:
            if self._reference_margins is None:
                with forward.model.disable_adapter():
                    self._reference_margins = self._margins(forward)
            found = preference(self._margins(forward), self._reference_margins, self._context.recipe.dpo.beta)
            loss = np.logaddexp(0, -found.reward_margin)
            return [loss.sum(), found.credit.sum(), found.reward_margin.sum(), len(self._pairs)]

        loss, credit, margin, pairs = self._context.world.sum_over_processes(sums_of_own_pairs)
        return {
            "eval_loss": loss / pairs,
            "eval_reward_accuracy": credit / pairs,
            "eval_reward_margin": margin / pairs,
        }

    def _margins(self, forward: Any) -> Floats:
        return pair_margins(forward, self._pairs, lambda done, of: self._context.check_stop())


def pair_margins(forward: Any, pairs: Sequence[tuple[Encoded, Encoded]], on_batch: OnBatch | None = None) -> Floats:
    """Return the likelihood margin that the model gives to each pair of (chosen, rejected) answers, in nats."""
    scores = score(forward, [answer for pair in pairs for answer in pair], on_batch)
    return likelihood_margins(scores[0::2], scores[1::2])


def measure_published(
    forward: Any, pairs: Sequence[tuple[Encoded, Encoded]], rows: list[dict[str, Any]], context: Context
) -> dict[str, Any]:
    """Return the reward accuracy and margin of the published adapter on the validation pairs, with intervals.

    The report computes both figures in the same way (report/preference.py), on the test pairs. Its confidence level and
    its number of resamples are settings that are not in the key of a DPO artifact, so this stage has constants.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    section = context.recipe.dpo
    set_peft_model_state_dict(forward.model, load_file(context.output / "adapter" / ADAPTER_WEIGHTS))
    policy_margins = pair_margins(forward, pairs)
    with forward.model.disable_adapter():
        reference_margins = pair_margins(forward, pairs)
    found = preference(policy_margins, reference_margins, section.beta)
    bootstrap = Bootstrap([row["group"] for row in rows], resamples=_RESAMPLES, seed=context.recipe.seed)
    each_pair = np.ones(len(rows))
    accuracy = bootstrap.ratio(found.credit, each_pair, (0, 1)).interval(_CONFIDENCE)
    margin = bootstrap.ratio(found.reward_margin, each_pair).interval(_CONFIDENCE)
    context.note(f"on {len(rows)} validation pairs: accuracy {_with_bounds(accuracy)}, margin {_with_bounds(margin)}")
    return {"pairs": len(rows), "accuracy": asdict(accuracy), "margin": asdict(margin), "confidence": _CONFIDENCE}


def _with_bounds(interval: Interval) -> str:
    bounds = "too few for an interval" if interval.low is None else f"{interval.low:.3f} to {interval.high:.3f}"
    return f"{interval.value:.3f} ({bounds})"


if __name__ == "__main__":
    entry.main("dpo", work)
