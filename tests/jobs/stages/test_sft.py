"""SFT: which tokens carry a loss, what is trained, which trainings fail. Real trainers on a tiny model."""

import re
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from llamarefine_jobs import sft
from llamarefine_jobs.context import Context
from llamarefine_jobs.contract.artifact import checkpoint_path
from llamarefine_jobs.contract.errors import DataError, DivergedError, ProofError, RecipeError
from llamarefine_jobs.contract.stages import STAGES
from llamarefine_jobs.models import adapters, backends
from llamarefine_jobs.models.encoding import encode, encode_questions, load_tokenizer, read_rows, set_special_tokens
from llamarefine_jobs.models.lora import ADAPTER_WEIGHTS
from llamarefine_jobs.process.sigterm import Stop
from llamarefine_jobs.store import Store
from tests.jobs import tiny

text = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=60)
turns = st.lists(st.tuples(text, text), min_size=0, max_size=2)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_prepared(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def tokenizer(prepared: Path) -> Any:
    return load_tokenizer(prepared / "base")


@pytest.fixture
def context(prepared: Path, tmp_path: Path) -> Context:
    return make_context("sft", prepared, tmp_path)


def make_context(stage: str, prepared: Path, folder: Path, *overrides: str, **inputs: Path) -> Context:
    """Return a context for `stage` with real folders."""
    recipe = tiny.recipe(*overrides)
    store = Store(str(folder / "store"))
    manifest = tiny.publish_prepared(store, prepared, recipe)
    (folder / "output").mkdir(parents=True)
    return Context(
        stage=STAGES[stage],
        recipe=recipe,
        store=store,
        key="0" * 64,
        parents={"prepare": manifest},
        inputs={"prepare": prepared, **inputs},
        output=folder / "output",
        work=folder,
        started_at=datetime.now(UTC),
        stop=Stop(),
    )


@given(prompt_text=text, answer_text=text, before=turns)
@settings(max_examples=200, deadline=None)
def test_answer_tokens_and_eos_carry_a_loss_and_prompt_tokens_do_not(
    tokenizer: Any, prompt_text: str, answer_text: str, before: list[tuple[str, str]]
) -> None:
    prompt = [
        message
        for user, assistant in before
        for message in ({"role": "user", "content": user}, {"role": "assistant", "content": assistant})
    ] + [{"role": "user", "content": prompt_text}]
    row = encode(tokenizer, prompt, answer_text)
    columns = sft.labelled([row])
    ids, labels = columns["input_ids"][0], columns["labels"][0]
    counted = [label != sft.NO_LOSS for label in labels]
    assert counted == [False] * len(row.prompt_ids) + [True] * len(row.answer_ids)
    assert labels[-1] == ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(row.prompt_ids).endswith("\n<|assistant|>\n")
    assert tokenizer.decode(row.answer_ids) == answer_text + tokenizer.eos_token


def test_the_trainers_batches_have_exactly_the_answers_as_labels(context: Context, tokenizer: Any) -> None:
    trainer, rows = build(context, tokenizer)
    for batch in trainer.get_train_dataloader():
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            learned = ids[labels != sft.NO_LOSS].tolist()
            assert learned in [row.answer_ids for row in rows]
            assert learned[-1] == tokenizer.eos_token_id


def test_rows_are_not_flattened_if_attention_would_mix_them(context: Context, tokenizer: Any) -> None:
    backend = backends.choose_backend()
    trainer, _ = build(context, tokenizer)
    assert trainer.padding_free is backend.flattens is False
    assert trainer.args.packing is False


def test_training_changes_the_adapter_and_no_weight_of_the_base(context: Context) -> None:
    base = context.inputs["prepare"] / "base" / "model.safetensors"
    before = base.read_bytes()
    sft.work(context)
    adapter = load_file(context.output / "adapter" / ADAPTER_WEIGHTS)
    assert len(adapter) == 2 * 7 * 2  # layers x linear layers x A and B
    assert all(tensor.abs().max() > 0 for tensor in adapter.values()), "a LoRA matrix was never trained"
    assert base.read_bytes() == before
    losses = [row["eval_loss"] for row in context.metrics["history"] if "eval_loss" in row]
    assert min(losses) < losses[0]
    assert context.metrics["validation_loss"] == min(losses)


def test_the_published_adapter_has_the_lowest_validation_loss(prepared: Path, tmp_path: Path) -> None:
    noisy = ("sft.max_steps=4", "sft.learning_rate=0.1", "sft.lr_schedule=constant", "sft.evaluate_every_steps=1")
    context = make_context("sft", prepared, tmp_path, *noisy)
    sft.work(context)
    history = [row for row in context.metrics["history"] if "eval_loss" in row]
    best = min(history, key=lambda row: row["eval_loss"])
    assert context.metrics["best_step"] == best["step"]
    assert best["step"] < history[-1]["step"], "this recipe no longer overfits, so the test shows nothing"
    assert validation_loss(context) == pytest.approx(best["eval_loss"], abs=1e-5)


def test_lora_settings_reach_the_adapter(prepared: Path, tmp_path: Path) -> None:
    lora = "{rank: 2, alpha: 6, rslora: true, target_layers: [q_proj, v_proj]}"
    context = make_context("sft", prepared, tmp_path, f"sft.lora={lora}", "sft.max_steps=2")
    sft.work(context)
    adapter = load_file(context.output / "adapter" / ADAPTER_WEIGHTS)
    assert {name.split(".")[-3] for name in adapter} == {"q_proj", "v_proj"}
    assert all(2 in tensor.shape for tensor in adapter.values())
    from peft import LoraConfig

    config = LoraConfig.from_pretrained(context.output / "adapter")
    assert (config.r, config.lora_alpha, config.use_rslora) == (2, 6, True)
    assert context.metrics["steps"] == 2


def test_another_micro_batch_size_gives_the_same_adapter_up_to_rounding(prepared: Path, tmp_path: Path) -> None:
    adapters = []
    for rows in (8, 2):
        folder = tmp_path / str(rows)
        folder.mkdir()
        context = make_context("sft", prepared, folder, f"sft.micro_batch_rows={rows}")
        sft.work(context)
        adapters.append(load_file(context.output / "adapter" / ADAPTER_WEIGHTS))
    for name, tensor in adapters[0].items():
        torch.testing.assert_close(tensor, adapters[1][name], atol=2e-4, rtol=0)


def test_a_step_orders_its_rows_from_the_longest_to_the_shortest(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uneven = shutil.copytree(prepared, tmp_path / "uneven")
    rows = [(f"What is {place}?", "It is alpha" + " beta" * (place * 7 % 20)) for place in range(60)]
    tiny.write_splits(uneven, {"train": rows[:48], "validation": rows[48:54], "test": rows[54:]})
    context = make_context("sft", uneven, tmp_path)
    widths = record_widths(monkeypatch)
    sft.work(context)
    assert_longest_first(widths, context.recipe.sft.micro_batches)


def test_a_trainer_that_cuts_rows_fails_the_label_check(context: Context, tokenizer: Any) -> None:
    trainer, rows = build(context, tokenizer)
    trainer.train_dataset = trainer.train_dataset.map(lambda row: {"labels": row["labels"][:-1]})
    with pytest.raises(ProofError, match="would learn"):
        sft.check_labels(trainer, rows)


def test_a_nan_loss_ends_the_training(context: Context, prepared: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    broken = AutoModelForCausalLM.from_pretrained(prepared / "base")
    broken.model.norm.weight.data[0] = float("nan")
    broken.save_pretrained(tmp_path / "broken" / "base")
    tokenizer = load_tokenizer(prepared / "base")
    tokenizer.save_pretrained(tmp_path / "broken" / "base")
    (tmp_path / "broken" / "questions").symlink_to(prepared / "questions")
    context.inputs["prepare"] = tmp_path / "broken"
    with pytest.raises(DivergedError, match=r"loss is nan at step 1 of 16; lower sft.learning_rate"):
        sft.work(context)
    assert not list(context.output.iterdir())


def test_a_loss_that_explodes_ends_the_training_and_names_the_last_good_checkpoint(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model is damaged after its fifth step, so the checkpoint of that step is not good, although it is finite."""

    def damage(model: Any) -> None:
        model.get_output_embeddings().weight.data.mul_(1000)

    after_step_5(damage, monkeypatch)
    context = make_context("sft", prepared, tmp_path, "sft.checkpoint_every_steps=1")
    with pytest.raises(DivergedError) as caught:
        sft.work(context)
    found = re.fullmatch(
        r"the loss is [\d.e+]+ at step (\d+) of 16; lower sft.learning_rate \(now 0.01\); "
        r"the last good checkpoint is at step (\d+), (\S+)",
        str(caught.value),
    )
    assert found, caught.value
    assert (found[1], found[2]) == ("6", "4"), "the loss of step 6 is computed with the weights after step 5"
    assert found[3] == f"{context.store.uri}/{checkpoint_path('sft', context.key, 4)}"
    assert context.store.fetch_checkpoint("sft", context.key, tmp_path / "resume") == 4


def test_weights_that_are_not_finite_are_never_saved_in_a_checkpoint(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_step_5(set_one_weight_to_nan, monkeypatch)
    context = make_context("sft", prepared, tmp_path, "sft.checkpoint_every_steps=1")
    with pytest.raises(DivergedError, match=r"no finite weights at step 5 of 16; .* is at step 4, file:"):
        sft.work(context)
    assert context.store.fetch_checkpoint("sft", context.key, tmp_path / "resume") == 4


def test_an_adapter_that_is_not_finite_is_not_kept_even_with_a_good_validation_loss(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend that validates without the adapter returns a good loss for any adapter."""
    after_step_5(set_one_weight_to_nan, monkeypatch)
    monkeypatch.setattr(sft, "validate", lambda *_: {"eval_loss": 1.0})
    context = make_context("sft", prepared, tmp_path, "sft.evaluate_every_steps=5")
    with pytest.raises(DivergedError, match="no finite weights at step 5 of 16"):
        sft.work(context)
    assert not list(context.output.iterdir())


def test_nf4_without_cuda_is_a_one_line_error(prepared: Path, tmp_path: Path) -> None:
    context = make_context("sft", prepared, tmp_path, "sft.quantization=nf4")
    with pytest.raises(RecipeError, match="nf4 needs a CUDA device") as caught:
        sft.work(context)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_pad_token_gets_one_that_differs_from_eos(tokenizer: Any) -> None:
    bare = tiny.make_tokenizer(["some words"])
    bare.pad_token = None
    bare.chat_template = None
    set_special_tokens(bare)
    assert bare.pad_token_id is not None
    assert bare.pad_token_id != bare.eos_token_id
    assert bare.chat_template


def test_a_tokenizer_without_eos_is_an_error() -> None:
    bare = tiny.make_tokenizer(["some words"])
    bare.eos_token = None
    with pytest.raises(DataError, match="no EOS token"):
        set_special_tokens(bare)


def after_step_5(change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Apply `change` to the model in training after its fifth step."""
    from llamarefine_jobs.training import loop

    original = loop.TrainingCallback.on_step_end

    def changed(callback: Any, args: Any, state: Any, control: Any, model: Any = None, **more: Any) -> None:
        if state.global_step == 5:
            change(model)
        original(callback, args, state, control, model=model, **more)

    monkeypatch.setattr(loop.TrainingCallback, "on_step_end", changed)


def set_one_weight_to_nan(model: Any) -> None:
    next(weight for weight in model.parameters() if weight.requires_grad).data[0] = float("nan")


def build(context: Context, tokenizer: Any) -> tuple[Any, list[Any]]:
    """Return the trainer as sft.work builds it, and its rows."""
    from llamarefine_jobs.training import loop

    backend = backends.choose_backend()
    section = context.recipe.sft
    questions = context.inputs["prepare"] / "questions"
    rows = encode_questions(tokenizer, read_rows(questions, "train"))
    model = backend.add_adapter(
        loop.set_token_ids(backend.load(context.inputs["prepare"] / "base"), tokenizer),
        section.lora,
        seed=1,
        gradient_checkpointing=False,
    )
    callback = loop.TrainingCallback(
        section, context, 10, lambda model: sft.validate(model, tokenizer.pad_token_id, rows, context)
    )
    return sft.build_trainer(context, section, backend, model, tokenizer, rows, callback), rows


def record_widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list to which trainers add the width in tokens of each micro-batch that they run."""
    from transformers import Trainer

    widths: list[int] = []
    original = Trainer.training_step

    def training_step(self: Any, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        widths.append(inputs["input_ids"].shape[1])
        return original(self, model, inputs, *rest, **more)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    return widths


def assert_longest_first(widths: list[int], micro_batches: int) -> None:
    steps = [widths[start : start + micro_batches] for start in range(0, len(widths), micro_batches)]
    assert all(step == sorted(step, reverse=True) for step in steps)
    assert sum(step[0] > step[-1] for step in steps) > len(steps) / 2


def validation_loss(context: Context) -> float:
    """Return the validation loss of the published adapter, computed with models/scoring.py."""
    from llamarefine_jobs.models.scoring import score

    base = context.inputs["prepare"] / "base"
    tokenizer = load_tokenizer(base)
    model = adapters.attach_adapter(backends.choose_backend().load(base), context.output / "adapter")
    rows = encode_questions(tokenizer, read_rows(context.inputs["prepare"] / "questions", "validation"))
    scores = score(model, tokenizer.pad_token_id, rows, 4)
    return -sum(found.logprob for found in scores) / sum(found.tokens for found in scores)
