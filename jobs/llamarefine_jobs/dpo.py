"""Direct preference optimisation: a second LoRA adapter, with the SFT policy as the reference.

    python -m llamarefine_jobs.dpo --recipe recipe.yaml --store s3://bucket/prefix

Reads prepare's base/ and preferences/ and sft's adapter/, writes adapter/ (PEFT's format). The SFT
adapter is merged into the base in fp32, a fresh adapter goes on top; with that adapter switched off
the model *is* the reference. Before the first step step_zero.py proves it, or nothing is trained.
"""

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
from llamarefine_jobs.models.scoring import Score, score
from llamarefine_jobs.report.intervals import Bootstrap, Interval

_COMPARED_ROWS = 128  # of the trainer's rows, compared token by token with ours


def work(context: Context) -> None:
    """Train the DPO adapter."""
    # Backend: before anything imports trl, transformers or peft.
    backend = backends.choose_backend(context.world.size)
    context.backend, context.accelerator = backend.name, backend.accelerator
    context.note(backends.describe(backend))
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

    # What the reference must say, computed apart from the model that is trained.
    witness = step_zero.score_reference_separately(
        backend, base, adapter, pairs, tokenizer.pad_token_id, section.micro_batch_rows
    )

    # Model: base + SFT adapter in one, frozen; a fresh adapter on top.
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
    held_out = HeldOut(encode_pairs(tokenizer, validation_rows), tokenizer.pad_token_id, context)
    watch = loop.Watch(section, context, tokens / len(train_rows), held_out.measure)
    trainer = build_trainer(context, section, backend, model, tokenizer, train_rows, watch)
    check_rows(trainer, pairs)
    loop.use_whole_batches(trainer, section, [max(len(chosen), len(rejected)) for chosen, rejected in pairs])
    context.metrics["step_zero"] = step_zero.prove(trainer, witness, context)
    loop.train(trainer, watch, context)

    # What it learned, on pairs it was not trained on.
    if context.world.is_first:
        context.metrics["validation"] = measure(trainer.model, tokenizer, validation_rows, context)


def build_trainer(
    context: Context,
    section: Dpo,
    backend: backends.Backend,
    model: Any,
    tokenizer: Any,
    train_rows: list[dict[str, Any]],
    watch: Any,
) -> Any:
    """TRL's DPOTrainer whose reference is `model` with its adapter switched off."""
    from trl import DPOConfig, DPOTrainer

    from llamarefine_jobs.training import loop

    settings = DPOConfig(
        **loop.arguments(section, context, backend),
        beta=section.beta,
        max_length=None,  # prepare saw to it; a row cut here would be cut silently
        # Saves the reference's forward pass from the second epoch on. Of several processes only the first would find
        # the file that TRL keeps them in.
        precompute_ref_log_probs=section.epochs > 1 and context.world.size == 1,
    )
    trainer = DPOTrainer(
        model=model,
        ref_model=None,
        args=settings,
        train_dataset=_as_messages(train_rows),
        processing_class=tokenizer,
        callbacks=[watch],
    )
    # TRL copies the adapter of a PeftModel as the reference. The copy would end up in every
    # checkpoint, and a training that goes on from there would take it for the policy.
    if "ref" in trainer.model.peft_config:
        trainer.model.delete_adapter("ref")
    adapters.hold_in_fp32(trainer.model)
    return trainer


def check_rows(trainer: Any, pairs: list[tuple[Encoded, Encoded]]) -> None:
    """Refuse to train unless the trainer is fed our tokens and counts exactly the answers', EOS included."""
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
                    "renders or cuts rows in its own way"
                )


class HeldOut:
    """The pairs that pick the adapter. Each process scores its part of them; the reference is scored once."""

    def __init__(self, pairs: list[tuple[Encoded, Encoded]], pad_id: int, context: Context) -> None:
        self._answers = [answer for pair in context.world.shard(pairs) for answer in pair]
        self._pad_id = pad_id
        self._context = context
        self._reference: list[Score] = []

    def measure(self, model: Any) -> dict[str, float]:
        """The DPO loss, reward accuracy (a tie counts one half) and margin: means over all pairs.

        PreemptedError as soon as SIGTERM comes.
        """

        def own_part() -> list[float]:
            if not self._reference:
                with model.disable_adapter():
                    self._reference = self._scores(model)
            margins = reward_margins(self._scores(model), self._reference, self._context.recipe.dpo.beta)
            return [np.logaddexp(0, -margins).sum(), _wins(margins).sum(), margins.sum(), len(margins)]

        loss, wins, margin, pairs = self._context.world.sum_over_processes(own_part)
        return {
            "eval_loss": loss / pairs,
            "eval_reward_accuracy": wins / pairs,
            "eval_reward_margin": margin / pairs,
        }

    def _scores(self, model: Any) -> list[Score]:
        batch_rows = self._context.recipe.dpo.micro_batch_rows
        return score(model, self._pad_id, self._answers, batch_rows, lambda done, of: self._context.check_stop())


def reward_margins(policy: list[Score], reference: list[Score], beta: float) -> Any:
    """How much more each pair's chosen answer is rewarded than the rejected one; the two take turns in the lists."""
    rewards = beta * (np.array([one.logprob for one in policy]) - np.array([one.logprob for one in reference]))
    return rewards[0::2] - rewards[1::2]


def _wins(margins: Any) -> Any:
    return (np.sign(margins) + 1) / 2


def measure(model: Any, tokenizer: Any, rows: list[dict[str, Any]], context: Context) -> dict[str, Any]:
    """The kept adapter's reward accuracy (a tie counts one half) and margin on held-out pairs, with intervals."""
    section, confidence = context.recipe.dpo, context.recipe.evaluate.confidence
    answers = [encoded for pair in encode_pairs(tokenizer, rows) for encoded in pair]
    policy = score(model, tokenizer.pad_token_id, answers, section.micro_batch_rows)
    with model.disable_adapter():
        reference = score(model, tokenizer.pad_token_id, answers, section.micro_batch_rows)
    margins = reward_margins(policy, reference, section.beta)
    bootstrap = Bootstrap(
        [row["group"] for row in rows], resamples=context.recipe.evaluate.bootstrap_resamples, seed=context.recipe.seed
    )
    each = np.ones(len(rows))
    accuracy = bootstrap.ratio(_wins(margins), each, (0, 1)).interval(confidence)
    margin = bootstrap.ratio(margins, each).interval(confidence)
    context.note(f"on {len(rows)} held-out pairs: accuracy {_shown(accuracy)}, margin {_shown(margin)}")
    return {"pairs": len(rows), "accuracy": asdict(accuracy), "margin": asdict(margin), "confidence": confidence}


def _shown(interval: Interval) -> str:
    bounds = (
        f" ({interval.low:.3f} to {interval.high:.3f})" if interval.low is not None else " (too few for an interval)"
    )
    return f"{interval.value:.3f}{bounds}"


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
