"""What every training backend guarantees, at a tiny shape and at TinyLlama's, in 16 bits and in 4."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llamarefine_jobs import dpo, sft
from llamarefine_jobs.context import Context
from llamarefine_jobs.contract.errors import ProofError
from llamarefine_jobs.models import adapters, backends
from llamarefine_jobs.models.encoding import encode_pairs, encode_questions, load_tokenizer, read_rows
from llamarefine_jobs.models.lora import ADAPTER_WEIGHTS
from llamarefine_jobs.models.scoring import generate, score
from llamarefine_jobs.training import step_zero
from tests.gpu.shapes import INTERPRETED
from tests.jobs import processes, tiny
from tests.jobs.stages.test_dpo import make_dpo, prove_with
from tests.jobs.stages.test_sft import make_context

Settings = tuple[str, ...]


@pytest.fixture(autouse=True)
def _free_memory(cuda: bool) -> Any:
    yield
    backends.free_memory()


@pytest.fixture
def sft_context(prepared: Path, settings: Settings, tmp_path: Path) -> Context:
    return make_context("sft", prepared, tmp_path, *settings)


@pytest.fixture
def dpo_context(prepared: Path, trained: Path, settings: Settings, tmp_path: Path) -> Context:
    return make_dpo(prepared, trained, tmp_path, *settings)


@pytest.fixture
def backend() -> backends.Backend:
    return backends.choose_backend()


def test_on_cuda_the_requested_backend_is_chosen(cuda: bool, backend: backends.Backend) -> None:
    requested = os.environ.get("LLAMAREFINE_BACKEND")
    assert (backend.accelerator != "cpu") is cuda
    assert not requested or backend.name.startswith(requested)
    assert backend.bf16 is (cuda and torch.cuda.is_bf16_supported())


def test_labels_are_every_answer_with_eos_and_no_prompt(
    sft_context: Context, prepared: Path, backend: backends.Backend
) -> None:
    """Flattened or padded by the library, the batches have labels for the same tokens."""
    trainer, rows, tokenizer = build_sft(sft_context, prepared, backend)
    sft.check_labels(trainer, rows)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    labelled: list[int] = []
    for batch in trainer.get_train_dataloader():
        labels = batch["labels"].flatten()
        labelled += labels[labels != sft.NO_LOSS].tolist()
        assert backend.flattens is (batch["input_ids"].shape[0] == 1 and "attention_mask" not in batch)
    assert sorted(labelled) == sorted(token for row in rows for token in row.answer_ids)
    assert labelled.count(tokenizer.eos_token_id) == len(rows)
    assert trainer.padding_free is backend.flattens


def test_the_loss_of_a_batch_is_the_mean_loss_of_its_rows_scored_alone(
    sft_context: Context, prepared: Path, backend: backends.Backend
) -> None:
    """Flattened or padded, no row attends to another, and evaluation returns a loss without keeping logits."""
    trainer, rows, tokenizer = build_sft(sft_context, prepared, backend)
    some = rows[:4]
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[place] for place in range(4)]))
    loss, logits, _ = trainer.prediction_step(trainer.model.eval(), batch, prediction_loss_only=True, ignore_keys=None)
    alone = score(trainer.model, tokenizer.pad_token_id, some, 1)
    expected = -sum(found.logprob for found in alone) / sum(found.tokens for found in alone)
    assert logits is None
    assert float(loss) == pytest.approx(expected, rel=2e-2 if backend.bf16 else 1e-4)


def test_training_lowers_the_loss_and_changes_no_weight_of_the_base(
    sft_context: Context, prepared: Path, backend: backends.Backend, quantization: str
) -> None:
    trainer, _, tokenizer = build_sft(sft_context, prepared, backend)
    held_out = rows_of(sft_context, tokenizer, "validation")
    before = sft.validate(trainer.model, tokenizer.pad_token_id, held_out, sft_context)["eval_loss"]
    frozen = {name: part.detach().clone() for name, part in trainer.model.named_parameters() if "lora_" not in name}
    assert frozen
    assert {part.dtype for name, part in trainer.model.named_parameters() if "lora_" in name} == {torch.float32}
    trainer.train()
    assert sft.validate(trainer.model, tokenizer.pad_token_id, held_out, sft_context)["eval_loss"] < before
    changed = [
        name
        for name, part in trainer.model.named_parameters()
        if name in frozen and not torch.equal(part, frozen[name])
    ]
    assert changed == []


def test_dpo_starts_with_a_proven_reference_and_trains_a_finite_adapter(
    dpo_context: Context, backend: backends.Backend
) -> None:
    dpo.work(dpo_context)
    proof = dpo_context.metrics["step_zero"]
    assert proof["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert proof["margin"] == pytest.approx(0, abs=1e-6)
    tolerance = step_zero._TOLERANCE["bf16" if backend.bf16 else "fp32"]
    if dpo_context.recipe.dpo.quantization == "none":
        assert proof["reference_error"] < tolerance
    assert proof["distance_from_base"] > 3 * proof["reference_error"]
    margins = [row["eval_reward_margin"] for row in dpo_context.metrics["history"] if "eval_reward_margin" in row]
    assert margins[-1] > 0
    # With the interpreter there are only two pairs, too few for an accuracy.
    assert INTERPRETED or dpo_context.metrics["validation"]["accuracy"]["value"] > 0.5, "chance level"
    adapter = load_file(dpo_context.output / "adapter" / ADAPTER_WEIGHTS)
    sft_adapter = load_file(dpo_context.inputs["sft"] / "adapter" / ADAPTER_WEIGHTS)
    assert adapter.keys() == sft_adapter.keys()
    assert all(tensor.isfinite().all() and tensor.abs().max() > 0 for tensor in adapter.values())


def test_dpo_refuses_the_base_as_its_reference(
    dpo_context: Context, backend: backends.Backend, quantization: str
) -> None:
    base = dpo_context.inputs["prepare"] / "base"
    with pytest.raises(ProofError, match="the reference is not the SFT policy"):
        prove_with(dpo_context, backend.load(base, quantization=quantization))


def test_the_merged_model_is_the_base_with_both_adapters(
    dpo_context: Context, backend: backends.Backend, settings: Settings
) -> None:
    """The merge proves this itself, in fp32 on the CPU; this test compares the models on the backend.

    The merge runs in a process of its own, as the stage does: Unsloth patches Llama for the whole process of the test,
    and a model on the CPU, such as the merge's proof needs, then fails. This version has not run on a card.
    """
    context = dpo_context
    dpo.work(context)
    backends.free_memory()
    tiny.publish(context.store, context.output, "dpo", context.recipe, dict(context.parents))
    recipe = context.work / "recipe.yaml"
    recipe.write_text(tiny.RECIPE)
    overrides = [word for setting in settings for word in ("--set", setting)]
    exit_code, lines = processes.run("merge", recipe, str(context.work / "store"), *overrides)
    assert exit_code == 0, "\n".join(lines)
    (model,) = (context.work / "store" / "artifacts" / "merge").rglob("model")
    base = context.inputs["prepare"] / "base"
    tokenizer = load_tokenizer(base)
    answers = [answer for pair in pairs_of(context, tokenizer)[:4] for answer in pair]
    found = per_token(backend.load(model, dtype=context.recipe.merge.dtype), tokenizer, answers)
    policy = adapters.merge_in_memory(
        base, context.inputs["sft"] / "adapter", context.work / "policy", bf16=backend.bf16
    )
    with_adapter = adapters.attach_adapter(backend.load(policy), context.output / "adapter")
    expected = per_token(with_adapter, tokenizer, answers)
    tolerance = step_zero._TOLERANCE["bf16" if backend.bf16 else "fp32"]
    assert max(abs(one - other) for one, other in zip(found, expected, strict=True)) < 3 * tolerance


def test_answers_generated_in_a_batch_equal_those_of_each_prompt_alone(
    prepared: Path, trained: Path, backend: backends.Backend, settings: Settings, tmp_path: Path
) -> None:
    """Left padding must not shift positions. In bf16 a near tie may change any token, so only 4 tokens are compared."""
    tokenizer = load_tokenizer(prepared / "base")
    model = adapters.attach_adapter(backend.load(prepared / "base"), trained / "adapter")
    context = make_context("sft", prepared, tmp_path, *settings)
    prompts = [row.prompt_ids for row in rows_of(context, tokenizer, "test")[:6]]
    options: dict[str, Any] = {"max_new_tokens": 4, "batch_rows": 6}
    together = generate(model, tokenizer, prompts, **options)
    alone = [generate(model, tokenizer, [prompt], **options)[0] for prompt in prompts]
    assert sum(one.text == other.text for one, other in zip(together, alone, strict=True)) >= len(prompts) - 1


def test_gradient_checkpointing_gives_the_same_losses(
    prepared: Path, settings: Settings, tmp_path: Path, backend: backends.Backend
) -> None:
    losses = []
    for recompute in ("false", "true"):
        (tmp_path / recompute).mkdir()
        short = (*settings, "sft.max_steps=3", f"sft.gradient_checkpointing={recompute}")
        context = make_context("sft", prepared, tmp_path / recompute, *short)
        sft.work(context)
        losses.append([row["loss"] for row in context.metrics["history"] if "loss" in row])
        backends.free_memory()
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=2e-2 if backend.bf16 else 1e-4)


def build_sft(context: Context, prepared: Path, backend: backends.Backend) -> tuple[Any, list[Any], Any]:
    """Return the trainer as sft.work builds it, its training rows, and the tokenizer."""
    from llamarefine_jobs.training import loop

    section = context.recipe.sft
    tokenizer = load_tokenizer(prepared / "base")
    rows = rows_of(context, tokenizer, "train")
    model = backend.load(
        prepared / "base", quantization=section.quantization, max_length_tokens=context.recipe.max_length_tokens
    )
    model = backend.add_adapter(
        loop.set_token_ids(model, tokenizer), section.lora, seed=1, gradient_checkpointing=False
    )
    held_out = rows_of(context, tokenizer, "validation")
    callback = loop.TrainingCallback(
        section, context, 10, lambda model: sft.validate(model, tokenizer.pad_token_id, held_out, context)
    )
    return sft.build_trainer(context, section, backend, model, tokenizer, rows, callback), rows, tokenizer


def rows_of(context: Context, tokenizer: Any, split: str) -> list[Any]:
    """Return the encoded rows of a split; all are short enough, as after prepare."""
    rows = encode_questions(tokenizer, read_rows(context.inputs["prepare"] / "questions", split))
    assert all(len(row) <= context.recipe.max_length_tokens for row in rows)
    return rows


def pairs_of(context: Context, tokenizer: Any) -> list[Any]:
    return encode_pairs(tokenizer, read_rows(context.inputs["prepare"] / "preferences", "test"))


def per_token(model: Any, tokenizer: Any, answers: list[Any]) -> list[float]:
    """Return the log-probability of each answer, in nats per token."""
    return [found.logprob / found.tokens for found in score(model, tokenizer.pad_token_id, answers, 4)]
