"""Supervised fine-tuning: train a LoRA adapter on the base to give the answers of the questions.

    python -m llamarefine_jobs.sft --recipe recipe.yaml --store s3://bucket/prefix

Reads base/ and questions/ of prepare, writes adapter/ (PEFT's format, safetensors). The loss covers the
tokens of the answer and its EOS, never the prompt's tokens. The artifact is the adapter of the lowest
validation loss.
"""

from typing import Any

from llamarefine_jobs import entry
from llamarefine_jobs.context import Context
from llamarefine_jobs.models import backends
from llamarefine_jobs.models.encoding import Encoded, encode_questions, load_tokenizer, read_rows
from llamarefine_jobs.models.scoring import score


def work(context: Context) -> None:
    """Train the SFT adapter."""
    # Backend: chosen before anything imports transformers or peft.
    backend = backends.choose_backend(context.recipe.sft.backend, context.world.size, "sft.backend")
    context.backend, context.accelerator = backend.name, backend.accelerator
    context.note(backends.describe_backend(backend))
    from llamarefine_jobs.training import loop
    from llamarefine_jobs.training.checked_forward import checked_forward
    from llamarefine_jobs.training.objectives import Example, SftObjective

    recipe, section = context.recipe, context.recipe.sft
    base, questions = context.inputs["prepare"] / "base", context.inputs["prepare"] / "questions"

    # Data.
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
    forward = checked_forward(backend, model, tokenizer.pad_token_id, train_rows, context.note)
    trainer = loop.Trainer(
        context,
        section,
        forward,
        [Example((row,)) for row in train_rows],
        SftObjective(),
        lambda forward: validate(forward, validation_rows, context),
    )
    trainer.prepare()
    trainer.train(context.fetch_checkpoint())


def validate(forward: Any, rows: list[Encoded], context: Context) -> dict[str, float]:
    """Return the validation loss: the mean over the tokens of all answers, in nats. Each process scores its share.

    Raises PreemptedError on SIGTERM.
    """

    def sums_of_own_rows() -> list[float]:
        scores = score(forward, context.world.shard(rows), lambda done, of: context.check_stop())
        return [-sum(one.logprob for one in scores), sum(one.tokens for one in scores)]

    nats, tokens = context.world.sum_over_processes(sums_of_own_rows)
    return {"eval_loss": nats / tokens}


if __name__ == "__main__":
    entry.main("sft", work)
