"""The packed step and whole trainings equal those of TRL's SFTTrainer and DPOTrainer, in fp32 and fp64 on the CPU."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import ANY

import pytest
import torch

from llamarefine_jobs.models.encoding import Encoded
from llamarefine_jobs.models.packing import Size
from llamarefine_jobs.training.objectives import DpoObjective, Example, SftObjective
from tests.jobs import packed, tiny

BETA = 0.1
# Relative: of a loss, and of a gradient to the largest number of its tensor. In fp32, TRL's gradients and ours
# are up to 3e-6 away from those in fp64, where rounding hides nothing.
LOSS_TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}
GRADIENT_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-11}
MODELS = {
    "grouped heads": {"num_key_value_heads": 2},
    "tied embeddings": {"tie_word_embeddings": True, "num_hidden_layers": 3},
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.make_tokenizer(["the quick brown fox"], packed.TOKENS)


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the arguments that both of TRL's trainers get."""
    return {
        "output_dir": str(tmp_path_factory.mktemp("trl")),
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "max_length": None,
        "logging_strategy": "no",
        "save_strategy": "no",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }


def sft_trainer(model: Any, rows: Sequence[Encoded], tokenizer: Any, **arguments: Any) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=model,
        args=SFTConfig(**arguments, loss_type="nll", packing=False),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(
            [
                {
                    "input_ids": row.prompt_ids + row.answer_ids,
                    "labels": [-100] * len(row.prompt_ids) + row.answer_ids,
                }
                for row in rows
            ]
        ),
    )


def dpo_trainer(model: Any, pairs: Sequence[tuple[Encoded, Encoded]], tokenizer: Any, **arguments: Any) -> Any:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    trainer = DPOTrainer(
        model=model,
        ref_model=None,
        args=DPOConfig(**arguments, beta=BETA),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": "the ", "chosen": "quick", "rejected": "fox"}]),
    )
    trainer.model.delete_adapter("ref")  # then the reference is the model without its adapter, as in our training
    trainer.train_dataset = Dataset.from_list(
        [
            {"prompt_ids": chosen.prompt_ids, "chosen_ids": chosen.answer_ids, "rejected_ids": rejected.answer_ids}
            for chosen, rejected in pairs
        ]
    )
    return trainer


def gradient_of_trl(trainer: Any) -> tuple[float, dict[str, Any]]:
    """Return loss and gradients of one of TRL's training steps on all its rows."""
    batch = trainer.data_collator(list(trainer.train_dataset))
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    items = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    loss = trainer.training_step(trainer.model, batch, num_items_in_batch=items)
    return float(loss), packed.gradients(trainer.model)


def gradient_of_ours(
    forward: Any, objective: Any, examples: Sequence[Example], **limits: int
) -> tuple[float, dict[str, Any], int]:
    """Return loss, gradients and number of passes of one of our steps."""
    from llamarefine_jobs.training.adapter_weights import AdapterWeights
    from llamarefine_jobs.training.gradient import StepGradient

    weights: Any = SimpleNamespace(clear_gradient=forward.model.zero_grad)
    if forward.model.dtype == torch.float32:
        weights = AdapterWeights(forward.model, weight_decay=0.0, most_gradient_norm=1.0)
    options: dict[str, Any] = {"most_tokens": None, **limits}
    step = StepGradient(forward, objective, weights, pytest.fail, **options)
    loss = step(examples, objective.weight(examples))
    return float(loss), packed.gradients(forward.model), len(list(step._split(examples)))


def exactly_packed(model: Any) -> Any:
    from llamarefine_jobs.models.forward import PackedForward

    return PackedForward(model)


def padded(model: Any) -> Any:
    from llamarefine_jobs.models.forward import PaddedForward

    return PaddedForward(model, packed.PAD)


def of_size(tokens: int, rows: int, longest: int) -> Callable[[Any], Any]:
    return lambda model: packed.sized_forward(model, Size(tokens, rows, longest))


# A forward, limits of a pass, and the number of passes that these give for the rows and for the pairs.
WAYS: dict[str, tuple[Callable[[Any], Any], dict[str, int], int, int]] = {
    "packed": (exactly_packed, {}, 1, 1),
    "packed, padded with garbage": (of_size(4096, 24, 384), {}, 1, 1),
    "packed, padded with garbage in many pieces": (of_size(4000, 40, 301), {}, 1, 1),
    "packed in two passes": (exactly_packed, {"most_tokens": 1200, "most_examples": 6}, 2, 2),
    "packed in many passes": (exactly_packed, {"most_tokens": 620, "most_examples": 3}, 4, 5),
    "packed in passes of two with garbage": (of_size(768, 14, 384), {"most_examples": 2}, 6, 6),
    "padded": (padded, {}, 1, 1),
    "padded in two passes": (padded, {"most_examples": 6}, 2, 2),
    "padded in passes of few tokens": (padded, {"most_tokens": 320}, 4, 12),
}


@contextlib.contextmanager
def computing_in(dtype: torch.dtype) -> Iterator[None]:
    """With fp64, let transformers and TRL compute in fp64 where they would convert to fp32."""
    from transformers.models.llama import modeling_llama

    to_fp32 = torch.Tensor.float

    def norm(module: Any, hidden_BTH: Any) -> Any:
        return torch.nn.functional.rms_norm(hidden_BTH, module.weight.shape, module.weight, module.variance_epsilon)

    with pytest.MonkeyPatch.context() as patch:
        if dtype == torch.float64:
            patch.setattr(torch.Tensor, "float", lambda one: one if one.dtype == dtype else to_fp32(one))
            patch.setattr(modeling_llama.LlamaRMSNorm, "forward", norm)
        yield


def with_reference(model: Any, pairs: Sequence[tuple[Encoded, Encoded]]) -> list[Example]:
    """Return the pairs with the log-probabilities that the model without its adapter gives to them."""
    from llamarefine_jobs.models.scoring import score

    with model.disable_adapter():
        scores = [one.logprob for one in score(exactly_packed(model), [row for pair in pairs for row in pair])]
    return [Example(pair, (scores[2 * place], scores[2 * place + 1])) for place, pair in enumerate(pairs)]


@pytest.fixture(
    scope="module",
    params=[("grouped heads", torch.float32), ("grouped heads", torch.float64), ("tied embeddings", torch.float64)],
    ids=lambda case: f"{case[0]}, {case[1]}",
)
def case(request: pytest.FixtureRequest) -> tuple[Callable[[], Any], torch.dtype]:
    """Return a function that makes the same model at each call, and the type of its numbers."""
    config, dtype = request.param
    return lambda: packed.make_policy(**MODELS[config]).to(dtype), dtype


@pytest.fixture(scope="module")
def sft_of_trl(case: Any, tokenizer: Any, arguments: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Return loss and gradients of TRL's step on all rows."""
    make_model, dtype = case
    with computing_in(dtype):
        return gradient_of_trl(sft_trainer(make_model(), packed.rows(), tokenizer, **arguments))


@pytest.fixture(scope="module")
def dpo_of_trl(case: Any, tokenizer: Any, arguments: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Return loss and gradients of TRL's step on all pairs."""
    make_model, dtype = case
    with computing_in(dtype):
        return gradient_of_trl(dpo_trainer(make_model(), packed.pairs(), tokenizer, **arguments))


@pytest.mark.parametrize("way", WAYS)
def test_an_sft_step_equals_trls(way: str, case: Any, sft_of_trl: tuple[float, dict[str, Any]]) -> None:
    (make_model, dtype), (loss, gradients) = case, sft_of_trl
    make_forward, limits, sft_passes, _ = WAYS[way]
    with computing_in(dtype):
        examples = packed.sft_examples(packed.rows())
        found = gradient_of_ours(make_forward(make_model()), SftObjective(), examples, **limits)
    assert found == (pytest.approx(loss, rel=LOSS_TOLERANCE[dtype]), ANY, sft_passes)
    assert packed.worst_difference(found[1], gradients) < GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("way", WAYS)
def test_a_dpo_step_equals_trls(way: str, case: Any, dpo_of_trl: tuple[float, dict[str, Any]]) -> None:
    (make_model, dtype), (loss, gradients) = case, dpo_of_trl
    make_forward, limits, _, dpo_passes = WAYS[way]
    with computing_in(dtype):
        model = make_model()
        examples = with_reference(model, packed.pairs())
        found = gradient_of_ours(make_forward(model), DpoObjective(BETA), examples, **limits)
    assert found == (pytest.approx(loss, rel=LOSS_TOLERANCE[dtype]), ANY, dpo_passes)
    assert packed.worst_difference(found[1], gradients) < GRADIENT_TOLERANCE[dtype]


# Settings of a training, and the rows of one of TRL's passes.
TRAININGS = {
    "cosine": (("lr_schedule=cosine", "warmup_fraction=0.2", "weight_decay=0.1", "epochs=3"), 8),
    "linear": (("lr_schedule=linear", "warmup_fraction=0.1", "epochs=2.5", "max_gradient_norm=0.01"), 4),
    "constant": (("lr_schedule=constant", "micro_batch_rows=2", "max_steps=7", "max_gradient_norm=100"), 2),
}
LEARNING_RATE = 0.01
ROWS = 21  # the last of three steps of an epoch has five new rows
WEIGHT_TOLERANCE = 2e-5  # of weights of up to 0.5; Adam divides small gradients by small numbers


@pytest.mark.parametrize("settings", TRAININGS)
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_training_equals_trls(
    stage: str, settings: str, tokenizer: Any, arguments: dict[str, Any], tmp_path: Path
) -> None:
    from llamarefine_jobs.training.loop import Trainer

    overrides, rows_of_a_pass = TRAININGS[settings]
    overrides = (*overrides, f"learning_rate={LEARNING_RATE}", "micro_batch_rows=null", "log_every_steps=1")
    context = packed.make_context(tmp_path, stage, *(f"{stage}.{override}" for override in overrides))
    section: Any = getattr(context.recipe, stage)
    lengths = [3 + 7 * place for place in range(ROWS)]
    model = packed.make_policy(**MODELS["grouped heads"])
    pairs, rows = packed.pairs(lengths), packed.rows(lengths)
    examples = packed.sft_examples(rows) if stage == "sft" else with_reference(model, pairs)
    objective = SftObjective() if stage == "sft" else DpoObjective(BETA)
    ours = Trainer(context, section, exactly_packed(model), examples, objective, lambda forward: {"eval_loss": 1.0})
    order = [index for step in range(1, ours.schedule.steps + 1) for index in ours.schedule.rows_of(step)]
    assert len(order) == 8 * ours.schedule.steps > 40
    before = ours.weights.values.clone()
    ours.train(None)
    losses = [entry["loss"] for entry in ours.state.history if "loss" in entry]

    arguments = arguments | {
        "per_device_train_batch_size": rows_of_a_pass,
        "gradient_accumulation_steps": 8 // rows_of_a_pass,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": section.lr_schedule,
        "warmup_steps": section.warmup_fraction,
        "weight_decay": section.weight_decay,
        "max_grad_norm": section.max_gradient_norm,
    }
    model = packed.make_policy(**MODELS["grouped heads"])
    trl = (
        sft_trainer(model, [rows[index] for index in order], tokenizer, **arguments)
        if stage == "sft"
        else dpo_trainer(model, [pairs[index] for index in order], tokenizer, **arguments)
    )
    losses_of_passes: list[float] = []
    step_of_trl = trl.training_step

    def training_step(*args: Any, **kwargs: Any) -> Any:
        loss = step_of_trl(*args, **kwargs)
        losses_of_passes.append(float(loss))
        return loss

    trl.training_step = training_step
    trl.train()
    passes = 8 // rows_of_a_pass
    losses_of_trl = [sum(losses_of_passes[at : at + passes]) for at in range(0, len(losses_of_passes), passes)]
    assert losses == pytest.approx(losses_of_trl, rel=1e-5)
    assert len(losses) == ours.schedule.steps
    assert (ours.weights.values - before).abs().max() > 100 * WEIGHT_TOLERANCE, "nothing was learned"
    expected = dict(trl.model.named_parameters())
    trained = {name: weight for name, weight in ours.model.named_parameters() if weight.requires_grad}
    worst = max(float((weight - expected[name]).detach().abs().max()) for name, weight in trained.items())
    assert worst < WEIGHT_TOLERANCE
