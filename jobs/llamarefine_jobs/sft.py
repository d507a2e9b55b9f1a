"""Supervised fine-tuning: train a LoRA adapter on the base to give the answers of the questions.

    python -m llamarefine_jobs.sft --recipe recipe.yaml --store s3://bucket/prefix

Reads base/ and questions/ of prepare, writes adapter/ (PEFT's format, safetensors). The loss covers the
tokens of the answer and its EOS, never the prompt's tokens. The artifact is the adapter of the lowest
validation loss.
"""

from typing import Any

from llamarefine_jobs import entry
from llamarefine_jobs.context import Context
from llamarefine_jobs.contract.errors import ProofError
from llamarefine_jobs.contract.recipe import Sft
from llamarefine_jobs.models import adapters, backends
from llamarefine_jobs.models.encoding import Encoded, encode_questions, load_tokenizer, read_rows
from llamarefine_jobs.models.scoring import score

NO_LOSS = -100  # the label that cross entropy ignores


def work(context: Context) -> None:
    """Train the SFT adapter."""
    # Backend: chosen before anything imports trl, transformers or peft.
    backend = backends.choose_backend(context.world.size)
    context.backend, context.accelerator = backend.name, backend.accelerator
    context.note(backends.describe_backend(backend))
    from llamarefine_jobs.training import loop

    recipe, section = context.recipe, context.recipe.sft
    base, questions = context.inputs["prepare"] / "base", context.inputs["prepare"] / "questions"

    # Data: tokenised here, so that one place decides for both backends which tokens carry a loss.
    tokenizer = load_tokenizer(base)
    train_rows = encode_questions(tokenizer, read_rows(questions, "train"))
    validation_rows = encode_questions(tokenizer, read_rows(questions, "validation"))
    tokens = sum(len(row) for row in train_rows)
    context.note(f"{len(train_rows)} rows to train on, {tokens} tokens; {len(validation_rows)} to validate")

    # Model: the base frozen, a fresh adapter on top.
    model = backend.load(base, quantization=section.quantization, max_length_tokens=recipe.max_length_tokens)
    loop.set_token_ids(model, tokenizer)
    model = backend.add_adapter(
        model, section.lora, seed=recipe.seed, gradient_checkpointing=section.gradient_checkpointing
    )

    # Training.
    callback = loop.TrainingCallback(
        section,
        context,
        tokens / len(train_rows),
        lambda model: validate(model, tokenizer.pad_token_id, validation_rows, context),
    )
    trainer = build_trainer(context, section, backend, model, tokenizer, train_rows, callback)
    check_labels(trainer, train_rows)
    loop.use_whole_batches(trainer, section, [len(row) for row in train_rows])
    loop.train(trainer, callback, context)


def labelled(rows: list[Encoded]) -> dict[str, list[list[int]]]:
    """Return the trainer's columns, one list of T tokens for each row: the labels of the prompt are NO_LOSS."""
    return {
        "input_ids": [row.prompt_ids + row.answer_ids for row in rows],
        "labels": [[NO_LOSS] * len(row.prompt_ids) + row.answer_ids for row in rows],
    }


def build_trainer(
    context: Context,
    section: Sft,
    backend: backends.Backend,
    model: Any,
    tokenizer: Any,
    train_rows: list[Encoded],
    callback: Any,
) -> Any:
    """Return TRL's SFTTrainer for rows that are tokenised and labelled already."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from llamarefine_jobs.training import loop

    settings = SFTConfig(
        **loop.arguments(section, context, backend),
        max_length=None,  # prepare enforced the length; TRL would cut a row without a message
        packing=False,
        padding_free=section.packing == "auto" and backend.flattens,
        loss_type="nll",
    )
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=Dataset.from_dict(labelled(train_rows)),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    adapters.cast_trainable_to_fp32(trainer.model)
    return trainer


def validate(model: Any, pad_id: int, rows: list[Encoded], context: Context) -> dict[str, float]:
    """Return the validation loss: the mean over the tokens of all answers, in nats. Each process scores its share.

    Raises PreemptedError on SIGTERM.
    """

    def sums_of_own_rows() -> list[float]:
        own, batch_rows = context.world.shard(rows), context.recipe.sft.micro_batch_rows
        scores = score(model, pad_id, own, batch_rows, lambda done, of: context.check_stop())
        return [-sum(one.logprob for one in scores), sum(one.tokens for one in scores)]

    nats, tokens = context.world.sum_over_processes(sums_of_own_rows)
    return {"eval_loss": nats / tokens}


def check_labels(trainer: Any, rows: list[Encoded]) -> None:
    """Raise ProofError unless the trainer's labels are every answer token, EOS included, and no prompt token."""
    expected = sum(len(row.answer_ids) for row in rows)
    found = sum(label != NO_LOSS for labels in trainer.train_dataset["labels"] for label in labels)
    if found != expected or len(trainer.train_dataset) != len(rows):
        raise ProofError(
            f"the trainer would learn {found} tokens of {len(trainer.train_dataset)} rows, "
            f"the answers hold {expected} of {len(rows)}; the installed trl rewrites the rows"
        )


if __name__ == "__main__":
    entry.main("sft", work)
