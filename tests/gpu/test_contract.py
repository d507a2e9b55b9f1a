"""What every training backend guarantees, at a tiny shape and at TinyLlama's, in 16 bits and in 4."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llamarefine_jobs import dpo, merge, sft
from llamarefine_jobs.context import Context
from llamarefine_jobs.contract.errors import ProofError
from llamarefine_jobs.models import adapters, backends
from llamarefine_jobs.models.encoding import encode_pairs, load_tokenizer, read_rows
from llamarefine_jobs.models.forward import PackedForward
from llamarefine_jobs.models.lora import ADAPTER_WEIGHTS
from llamarefine_jobs.models.scoring import score
from llamarefine_jobs.models.token_loss import NO_TARGET
from llamarefine_jobs.training import step_zero
from tests.gpu import trainers
from tests.gpu.shapes import BACKEND, INTERPRETED
from tests.jobs import processes, tiny

Settings = tuple[str, ...]


@pytest.fixture(autouse=True)
def _free_memory(cuda: bool) -> Any:
    yield
    backends.free_memory()


@pytest.fixture
def sft_context(prepared: Path, settings: Settings, tmp_path: Path) -> Context:
    return trainers.make_context("sft", tiny.recipe(*settings), prepared, tmp_path)


@pytest.fixture
def dpo_context(prepared: Path, trained: Path, settings: Settings, tmp_path: Path) -> Context:
    return trainers.make_context("dpo", tiny.recipe(*settings), prepared, tmp_path, trained)


def test_on_cuda_the_requested_backend_is_chosen(cuda: bool, backend: backends.Backend) -> None:
    assert backend.name == BACKEND
    assert (backend.accelerator != "cpu") is cuda
    assert backend.bf16 is (cuda and torch.cuda.is_bf16_supported())
    assert not (cuda and torch.backends.cuda.cudnn_sdp_enabled()), "it plans anew for every length of a batch"


def test_targets_are_every_answer_with_eos_and_no_prompt(sft_context: Context, backend: backends.Backend) -> None:
    trainer, tokenizer = build(sft_context, backend)
    assert isinstance(trainer.forward, PackedForward) is (backend.name == "packed")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    rows = [example.rows[0] for example in trainer.examples]
    targets: list[int] = []
    for step in range(1, 1 + -(-len(rows) // sft_context.recipe.sft.batch_rows)):
        batch = trainer.forward.batch([example.rows[0] for example in trainer.own_examples(step)])
        targets += batch.targets[batch.targets != NO_TARGET].tolist()
    # The epoch's first rows fill up its last step.
    repeated = -len(rows) % sft_context.recipe.sft.batch_rows
    first = [trainer.examples[index].rows[0] for index in trainer.schedule.rows_of(1)[:repeated]]
    assert sorted(targets) == sorted(token for row in [*rows, *first] for token in row.answer_ids)


def test_the_loss_of_a_step_is_the_mean_loss_of_its_rows_scored_alone(
    sft_context: Context, backend: backends.Backend, figure: Callable[[str], None]
) -> None:
    """Packed or padded, no row attends to another."""
    trainer, _ = build(sft_context, backend)
    examples = trainer.examples[:4]
    loss = float(trainer.gradient(examples, trainer.objective.weight(examples)))
    alone = [score(trainer.forward, [example.rows[0]])[0] for example in examples]
    expected = -sum(found.logprob for found in alone) / sum(found.tokens for found in alone)
    figure(f"loss of a step {loss:.6f}, of its rows alone {expected:.6f}")
    assert loss == pytest.approx(expected, rel=2e-2 if backend.bf16 else 1e-4)


def test_training_lowers_the_loss_and_changes_no_weight_of_the_base(
    sft_context: Context, backend: backends.Backend, cuda: bool, figure: Callable[[str], None], capsys: Any
) -> None:
    trainer, tokenizer = build(sft_context, backend)
    held_out = [row for (row,) in trainers.encoded(sft_context, tokenizer, "validation")]
    before = sft.validate(trainer.forward, held_out, sft_context)["eval_loss"]
    frozen = {name: part.detach().clone() for name, part in trainer.model.named_parameters() if "lora_" not in name}
    assert frozen
    assert {part.dtype for name, part in trainer.model.named_parameters() if "lora_" in name} == {torch.float32}
    trainer.prepare()
    trainer.train(None)
    slower = [line for line in capsys.readouterr().out.splitlines() if "which is slower" in line]
    after = sft.validate(trainer.forward, held_out, sft_context)["eval_loss"]
    figure(f"validation loss {before:.4f} before and {after:.4f} after {trainer.state.steps} steps; {slower}")
    assert after < before
    changed = [
        name
        for name, part in trainer.model.named_parameters()
        if name in frozen and not torch.equal(part, frozen[name])
    ]
    assert changed == []
    assert sft_context.recipe.sft.quantization != "none" or slower == []


def test_dpo_starts_with_a_proven_reference_and_trains_a_finite_adapter(
    dpo_context: Context, backend: backends.Backend, figure: Callable[[str], None]
) -> None:
    dpo.work(dpo_context)
    proof = dpo_context.metrics["step_zero"]
    figure(f"step 0 of DPO: {proof}")
    assert proof["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert proof["margin"] == pytest.approx(0, abs=1e-6)
    assert proof["step_loss"] == pytest.approx(math.log(2), abs=2e-2 if backend.bf16 else 1e-4), "of the real step"
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


def test_dpo_refuses_the_base_as_its_reference(dpo_context: Context, backend: backends.Backend) -> None:
    """The policy that `build` makes is the bare base, without the SFT adapter."""
    context, base = dpo_context, dpo_context.inputs["prepare"] / "base"
    tokenizer = load_tokenizer(base)
    pairs: Any = trainers.encoded(context, tokenizer)
    expected = step_zero.score_reference_separately(
        backend, base, context.inputs["sft"] / "adapter", pairs, tokenizer.pad_token_id
    )
    trainer, _ = build(context, backend)
    with pytest.raises(ProofError, match="the reference is not the SFT policy"):
        step_zero.prove(trainer, expected)


def test_the_merged_model_is_the_base_with_both_adapters(
    dpo_context: Context, backend: backends.Backend, settings: Settings
) -> None:
    """The merge proves this itself, in fp32 on the CPU; this test compares the models on the backend.

    The merge runs in this process, after a training on the GPU. With Unsloth it runs in a process of its own, as the
    stage does: Unsloth patches Llama for the whole process, and a model on the CPU then fails.
    """
    context = dpo_context
    dpo.work(context)
    backends.free_memory()
    manifest = tiny.publish(context.store, context.output, "dpo", context.recipe, dict(context.parents))
    if backend.name == "unsloth":
        recipe = context.work / "recipe.yaml"
        recipe.write_text(tiny.RECIPE)
        overrides = [word for setting in settings for word in ("--set", setting)]
        exit_code, lines = processes.run("merge", recipe, str(context.work / "store"), *overrides)
        assert exit_code == 0, "\n".join(lines)
        (model,) = (context.work / "store" / "artifacts" / "merge").rglob("model")
    else:
        merging = trainers.make_context("merge", context.recipe, context.inputs["prepare"], context.work / "merge")
        merging.parents |= context.parents | {"dpo": manifest}
        merging.inputs |= context.inputs | {"dpo": context.output}
        merge.work(merging)
        model = merging.output / "model"
    base = context.inputs["prepare"] / "base"
    tokenizer = load_tokenizer(base)
    pairs = encode_pairs(tokenizer, read_rows(context.inputs["prepare"] / "preferences", "test"))[:4]
    answers = [answer for pair in pairs for answer in pair]
    found = per_token(backend.load(model, dtype=context.recipe.merge.dtype), tokenizer, backend, answers)
    policy = adapters.merge_in_memory(
        base, context.inputs["sft"] / "adapter", context.work / "policy", bf16=backend.bf16
    )
    with_adapter = adapters.attach_adapter(backend.load(policy), context.output / "adapter")
    expected = per_token(with_adapter, tokenizer, backend, answers)
    tolerance = step_zero._TOLERANCE["bf16" if backend.bf16 else "fp32"]
    assert max(abs(one - other) for one, other in zip(found, expected, strict=True)) < 3 * tolerance


def test_answers_generated_in_a_batch_equal_those_of_each_prompt_alone(
    sft_context: Context, trained: Path, backend: backends.Backend
) -> None:
    """Left padding must not shift positions. In bf16 a near tie may change any token, so only 4 tokens are compared."""
    from llamarefine_jobs.models.generation import generate

    base = sft_context.inputs["prepare"] / "base"
    tokenizer = load_tokenizer(base)
    model = adapters.attach_adapter(backend.load(base), trained / "adapter")
    prompts = [row.prompt_ids for (row,) in trainers.encoded(sft_context, tokenizer, "test")[:6]]
    options: dict[str, Any] = {"max_new_tokens": 4, "batch_rows": 6}
    together = generate(model, tokenizer, prompts, **options)
    alone = [generate(model, tokenizer, [prompt], **options)[0] for prompt in prompts]
    assert sum(one.text == other.text for one, other in zip(together, alone, strict=True)) >= len(prompts) - 1


def test_gradient_checkpointing_gives_the_same_losses(
    prepared: Path, settings: Settings, tmp_path: Path, backend: backends.Backend
) -> None:
    losses = []
    for recompute in ("false", "true"):
        recipe = tiny.recipe(*settings, "sft.max_steps=3", f"sft.gradient_checkpointing={recompute}")
        context = trainers.make_context("sft", recipe, prepared, tmp_path / recompute)
        sft.work(context)
        losses.append([row["loss"] for row in context.metrics["history"] if "loss" in row])
        backends.free_memory()
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=2e-2 if backend.bf16 else 1e-4)


def build(context: Context, backend: backends.Backend) -> tuple[Any, Any]:
    """Return the trainer as the stage builds it on the bare base, and the tokenizer."""
    model, tokenizer = trainers.load(backend, context, context.inputs["prepare"] / "base")
    forward = trainers.make_forward(context, backend, model, tokenizer)
    examples = trainers.make_examples(context, forward, tokenizer)
    return trainers.make_trainer(context, forward, tokenizer, examples), tokenizer


def per_token(model: Any, tokenizer: Any, backend: backends.Backend, answers: list[Any]) -> list[float]:
    """Return the log-probability of each answer, in nats per token."""
    scores = score(trainers.plain_forward(backend, model, tokenizer), answers)
    return [found.logprob / found.tokens for found in scores]
