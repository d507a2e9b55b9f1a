"""Trainers as the stages build them, without a stage around them, for the GPU tests and the benchmark."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamarefine_jobs.context import Context
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.store import Store
from tests.jobs import tiny


def make_context(stage: str, recipe: Recipe, prepared: Path, folder: Path, trained: Path | None = None) -> Context:
    """Return a context whose inputs are published; `trained` holds the SFT adapter for DPO."""
    store = Store(str(folder / "store"))
    parents = {"prepare": tiny.publish_prepared(store, prepared, recipe)}
    inputs = {"prepare": prepared}
    if trained:
        parents["sft"] = tiny.publish(store, trained, "sft", recipe, dict(parents))
        inputs["sft"] = trained
    return tiny.make_context(stage, recipe, folder, parents, inputs)


def load(backend: Any, context: Context, base: Path) -> tuple[Any, Any]:
    """Return the base with a new adapter, and its tokenizer."""
    from llamarefine_jobs.models.encoding import load_tokenizer
    from llamarefine_jobs.training import loop

    section: Any = context.recipe.section(context.stage.name)
    tokenizer = load_tokenizer(base)
    model = backend.load(base, quantization=section.quantization, max_length_tokens=context.recipe.max_length_tokens)
    loop.set_token_ids(model, tokenizer)
    recompute = section.gradient_checkpointing
    return backend.add_adapter(
        model, section.lora, seed=context.recipe.seed, gradient_checkpointing=recompute
    ), tokenizer


def encoded(context: Context, tokenizer: Any, split: str = "train", count: int | None = None) -> list[tuple[Any, ...]]:
    """Return the first `count` rows of a split: one encoded answer to each question for SFT, two for DPO."""
    from llamarefine_jobs.models.encoding import encode_pairs, encode_questions, read_rows

    if context.stage.name == "dpo":
        return list(encode_pairs(tokenizer, read_rows(context.inputs["prepare"] / "preferences", split)[:count]))
    questions = read_rows(context.inputs["prepare"] / "questions", split)[:count]
    return [(row,) for row in encode_questions(tokenizer, questions)]


def plain_forward(backend: Any, model: Any, tokenizer: Any) -> Any:
    """Return the forward of this backend, unchecked."""
    from llamarefine_jobs.models.forward import PackedForward, PaddedForward

    return PackedForward(model) if backend.name == "packed" else PaddedForward(model, tokenizer.pad_token_id)


def make_forward(context: Context, backend: Any, model: Any, tokenizer: Any) -> Any:
    """Return the checked forward of the stage: packed or padded."""
    from llamarefine_jobs.training.checked_forward import checked_forward

    rows = [row for rows in encoded(context, tokenizer, count=8) for row in rows]
    return checked_forward(backend, model, tokenizer.pad_token_id, rows, context.note)


def make_examples(context: Context, forward: Any, tokenizer: Any, count: int | None = None) -> list[Any]:
    """Return the training examples, for DPO with the log-probabilities that the model without its adapter gives."""
    from llamarefine_jobs.training.objectives import Example
    from llamarefine_jobs.training.reference_logprobs import examples_with_reference

    rows: Any = encoded(context, tokenizer, count=count)
    if context.stage.name == "sft":
        return [Example(row) for row in rows]
    return examples_with_reference(forward, rows, None, context)


def make_trainer(context: Context, forward: Any, tokenizer: Any, examples: Sequence[Any], kind: Any = None) -> Any:
    """Return our Trainer, or `kind` instead of it, which validates on the validation split."""
    from llamarefine_jobs import dpo, sft
    from llamarefine_jobs.training import loop
    from llamarefine_jobs.training.objectives import DpoObjective, SftObjective

    section: Any = context.recipe.section(context.stage.name)
    held_out: Any = encoded(context, tokenizer, "validation")
    if context.stage.name == "sft":
        rows = [row for (row,) in held_out]
        objective: Any = SftObjective()
        validate: Any = lambda forward: sft.validate(forward, rows, context)  # noqa: E731
    else:
        objective, validate = DpoObjective(section.beta), dpo.PairValidation(held_out, context).validate
    return (kind or loop.Trainer)(context, section, forward, examples, objective, validate)
