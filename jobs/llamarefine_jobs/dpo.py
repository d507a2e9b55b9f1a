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
from llamarefine_jobs.contract.errors import ProofError
from llamarefine_jobs.contract.prompt import answer
from llamarefine_jobs.contract.recipe import Dpo
from llamarefine_jobs.models import adapters, backends
from llamarefine_jobs.models.encoding import Encoded, encode_pairs, load_tokenizer, read_rows
from llamarefine_jobs.models.lora import ADAPTER_WEIGHTS
from llamarefine_jobs.models.scoring import OnBatch, score
from llamarefine_jobs.report.intervals import Bootstrap, Floats, Interval
from llamarefine_jobs.report.preference import likelihood_margins, preference

# Not `evaluate.confidence` and `evaluate.bootstrap_resamples`: they may change without a new training.
_CONFIDENCE, _RESAMPLES = 0.95, 2000
# At least so many of the trainer's rows, or all if there are fewer, are compared with ours token by token.
_COMPARED_ROWS = 128


def work(context: Context) -> None:
    """Train the DPO adapter."""
    # Backend: chosen before anything imports trl, transformers or peft.
    backend = backends.choose_backend(context.world.size)
    context.backend, context.accelerator = backend.name, backend.accelerator
    context.note(backends.describe_backend(backend))
    from llamarefine_jobs.training import loop, step_zero

    recipe, section = context.recipe, context.recipe.dpo
    base, preferences = context.inputs["prepare"] / "base", context.inputs["prepare"] / "preferences"
    adapter = context.inputs["sft"] / "adapter"
    adapters.check_lineage(context, "sft", "prepare")

    # Data.
    tokenizer = load_tokenizer(base)
    train_rows = read_rows(preferences, "train")
    validation_rows = read_rows(preferences, "validation")
    pairs = encode_pairs(tokenizer, train_rows)
    tokens = sum(len(chosen) + len(rejected) for chosen, rejected in pairs)
    context.note(f"{len(train_rows)} pairs to train on, {tokens} tokens; {len(validation_rows)} to validate")

    # The expected scores of the reference, computed separately from the model that is trained.
    reference = step_zero.score_reference_separately(
        backend, base, adapter, pairs, tokenizer.pad_token_id, section.micro_batch_rows
    )

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

    # Training.
    validation = PairValidation(encode_pairs(tokenizer, validation_rows), tokenizer.pad_token_id, context)
    callback = loop.TrainingCallback(section, context, tokens / len(train_rows), validation.validate)
    trainer = build_trainer(context, section, backend, model, tokenizer, train_rows, callback)
    check_rows(trainer, pairs)
    loop.use_whole_batches(trainer, section, [max(len(chosen), len(rejected)) for chosen, rejected in pairs])
    context.metrics["step_zero"] = step_zero.prove(trainer, reference, context)
    loop.train(trainer, callback, context)

    # Validation of the published adapter.
    if context.world.is_first:
        context.metrics["validation"] = measure_published(trainer.model, tokenizer, validation_rows, context)


def build_trainer(
    context: Context,
    section: Dpo,
    backend: backends.Backend,
    model: Any,
    tokenizer: Any,
    train_rows: list[dict[str, Any]],
    callback: Any,
) -> Any:
    """Return TRL's DPOTrainer, whose reference is `model` with its adapter disabled."""
    from trl import DPOConfig, DPOTrainer

    from llamarefine_jobs.training import loop

    settings = DPOConfig(
        **loop.arguments(section, context, backend),
        beta=section.beta,
        max_length=None,  # prepare enforced the length; TRL would cut a row without a message
        # From the second epoch on this saves the reference's forward pass. TRL keeps the scores in a file that only
        # the first of several processes finds.
        precompute_ref_log_probs=section.epochs > 1 and context.world.size == 1,
    )
    trainer = DPOTrainer(
        model=model,
        ref_model=None,
        args=settings,
        train_dataset=_as_messages(train_rows),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    # TRL adds a copy of the adapter as the reference. The copy would be saved in every checkpoint, and a training
    # that continues from one would use it as the policy.
    if "ref" in trainer.model.peft_config:
        trainer.model.delete_adapter("ref")
    adapters.cast_trainable_to_fp32(trainer.model)
    return trainer


def check_rows(trainer: Any, pairs: list[tuple[Encoded, Encoded]]) -> None:
    """Raise ProofError unless the trainer has our tokens and its loss covers exactly the answers, EOS included."""
    if len(trainer.train_dataset) != len(pairs):
        raise ProofError(f"the trainer holds {len(trainer.train_dataset)} pairs, expected {len(pairs)}")
    step = max(1, len(pairs) // _COMPARED_ROWS)
    for index in range(0, len(pairs), step):
        batch = trainer.data_collator([trainer.train_dataset[index]])  # (2, T): chosen, then rejected
        for place, expected in enumerate(pairs[index]):
            ids = batch["input_ids"][place][batch["attention_mask"][place].bool()].tolist()
            counted = batch["input_ids"][place][batch["completion_mask"][place].bool()].tolist()
            if ids != expected.prompt_ids + expected.answer_ids or counted != expected.answer_ids:
                raise ProofError(
                    f"pair {index}: the trainer's tokens are not those of the chat template; the installed trl "
                    "renders or cuts the rows itself"
                )


class PairValidation:
    """Validates a policy on the validation pairs. Each process scores its share; the reference is scored only once."""

    def __init__(self, pairs: list[tuple[Encoded, Encoded]], pad_id: int, context: Context) -> None:
        self._pairs = context.world.shard(pairs)
        self._pad_id = pad_id
        self._context = context
        self._reference_margins: Floats | None = None

    def validate(self, model: Any) -> dict[str, float]:
        """Return the DPO loss, the reward accuracy and the reward margin: means over the pairs of all processes.

        Raises PreemptedError on SIGTERM.
        """

        def sums_of_own_pairs() -> list[float]:
            if self._reference_margins is None:
                with model.disable_adapter():
                    self._reference_margins = self._margins(model)
            found = preference(self._margins(model), self._reference_margins, self._context.recipe.dpo.beta)
            loss = np.logaddexp(0, -found.reward_margin)
            return [loss.sum(), found.credit.sum(), found.reward_margin.sum(), len(self._pairs)]

        loss, credit, margin, pairs = self._context.world.sum_over_processes(sums_of_own_pairs)
        return {
            "eval_loss": loss / pairs,
            "eval_reward_accuracy": credit / pairs,
            "eval_reward_margin": margin / pairs,
        }

    def _margins(self, model: Any) -> Floats:
        batch_rows = self._context.recipe.dpo.micro_batch_rows
        return pair_margins(model, self._pad_id, self._pairs, batch_rows, lambda done, of: self._context.check_stop())


def pair_margins(
    model: Any,
    pad_id: int,
    pairs: Sequence[tuple[Encoded, Encoded]],
    batch_rows: int,
    on_batch: OnBatch | None = None,
) -> Floats:
    """Return the likelihood margin that `model` gives to each pair of (chosen, rejected) answers, in nats."""
    answers = [answer for pair in pairs for answer in pair]
    scores = score(model, pad_id, answers, batch_rows, on_batch)
    return likelihood_margins(scores[0::2], scores[1::2])


def measure_published(model: Any, tokenizer: Any, rows: list[dict[str, Any]], context: Context) -> dict[str, Any]:
    """Return the reward accuracy and margin of the published adapter on the validation pairs, with intervals.

    The report computes both figures in the same way (report/preference.py), on the test pairs. Its confidence level and
    its number of resamples are settings that are not in the key of a DPO artifact, so this stage has constants.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    section = context.recipe.dpo
    set_peft_model_state_dict(model, load_file(context.output / "adapter" / ADAPTER_WEIGHTS))
    pad_id, pairs = tokenizer.pad_token_id, encode_pairs(tokenizer, rows)
    policy_margins = pair_margins(model, pad_id, pairs, section.micro_batch_rows)
    with model.disable_adapter():
        reference_margins = pair_margins(model, pad_id, pairs, section.micro_batch_rows)
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


def _as_messages(rows: list[dict[str, Any]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(
        [
            {"prompt": row["prompt"], "chosen": answer(row["chosen"]), "rejected": answer(row["rejected"])}
            for row in rows
        ]
    )


if __name__ == "__main__":
    entry.main("dpo", work)
