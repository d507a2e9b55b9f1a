"""SFT: which tokens carry a loss, what is trained, which trainings fail. Real trainings of a tiny model."""

import re
import shutil
from collections import Counter
from collections.abc import Callable
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
from llamarefine_jobs.contract.errors import DataError, DivergedError, RecipeError
from llamarefine_jobs.models import adapters, backends
from llamarefine_jobs.models.encoding import encode, encode_questions, load_tokenizer, read_rows, set_special_tokens
from llamarefine_jobs.models.lora import ADAPTER_WEIGHTS
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
    parents = {"prepare": tiny.publish_prepared(Store(str(folder / "store")), prepared, recipe)}
    return tiny.make_context(stage, recipe, folder, parents, {"prepare": prepared, **inputs})


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
    other = encode(tokenizer, [{"role": "user", "content": "and?"}], "other")
    for batch, ids in batches_of([row, other], tokenizer):
        for place, expected in enumerate((row, other)):
            predicted_after, learned = ids_before_and_targets(batch, ids, place)
            assert learned == expected.answer_ids
            assert learned[-1] == tokenizer.eos_token_id
            assert predicted_after == [expected.prompt_ids[-1], *expected.answer_ids[:-1]]
    assert tokenizer.decode(row.prompt_ids).endswith("\n<|assistant|>\n")
    assert tokenizer.decode(row.answer_ids) == answer_text + tokenizer.eos_token


@pytest.mark.parametrize("backend", ["packed", "transformers"])
def test_an_epoch_learns_each_answer_with_eos_and_no_prompt_token(
    backend: str, prepared: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batches of a real training of 8 steps of 8 rows: each of the 60 rows once, and 4 of them twice."""
    passes = record_passes(monkeypatch)
    context = make_context("sft", prepared, tmp_path, f"sft.backend={backend}", "sft.epochs=1")
    sft.work(context)
    learned = Counter(tuple(answer) for answers in passes for answer in answers)
    rows = encode_questions(tokenizer, read_rows(prepared / "questions", "train"))
    assert learned.keys() == {tuple(row.answer_ids) for row in rows}
    assert sum(learned.values()) == 64
    assert all(answer[-1] == tokenizer.eos_token_id for answer in learned)


def test_each_backend_trains_the_same_adapter_up_to_rounding(prepared: Path, tmp_path: Path) -> None:
    trained = {}
    for backend in ("packed", "transformers"):
        (tmp_path / backend).mkdir()
        context = make_context("sft", prepared, tmp_path / backend, f"sft.backend={backend}")
        sft.work(context)
        assert context.backend == backend
        trained[backend] = load_file(context.output / "adapter" / ADAPTER_WEIGHTS)
    for name, tensor in trained["packed"].items():
        torch.testing.assert_close(tensor, trained["transformers"][name], atol=2e-4, rtol=0)


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
    for rows in ("8", "2", "null"):
        folder = tmp_path / rows
        folder.mkdir()
        context = make_context("sft", prepared, folder, f"sft.micro_batch_rows={rows}")
        sft.work(context)
        adapters.append(load_file(context.output / "adapter" / ADAPTER_WEIGHTS))
    for name, tensor in adapters[0].items():
        for other in adapters[1:]:
            torch.testing.assert_close(tensor, other[name], atol=2e-4, rtol=0)


def test_a_step_is_split_into_passes_of_similar_rows_or_of_equal_size(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padded rows go from the longest to the shortest, so that little is padded; packed passes are about equal."""
    uneven = shutil.copytree(prepared, tmp_path / "uneven")
    rows = [(f"What is {place}?", "It is alpha" + " beta" * (place * 7 % 20)) for place in range(60)]
    tiny.write_splits(uneven, {"train": rows[:48], "validation": rows[48:54], "test": rows[54:]})
    for backend in ("transformers", "packed"):
        (tmp_path / backend).mkdir()
        widths = record_widths(monkeypatch)
        context = make_context("sft", uneven, tmp_path / backend, f"sft.backend={backend}", "sft.epochs=1")
        sft.work(context)
        assert len(widths) == 6 * 2, "6 steps of 8 rows, with micro_batch_rows 4"
        steps = list(zip(widths[0::2], widths[1::2], strict=True))
        if backend == "transformers":
            assert_longest_first(steps)
        else:
            assert all(max(step) < 1.3 * min(step) for step in steps), steps


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


@pytest.mark.parametrize(
    "other",
    [
        ("sft.evaluate_every_steps=16",),  # read when they are logged, at step 10
        ("sft.evaluate_every_steps=8",),  # read before the validation of step 8
        ("sft.evaluate_every_steps=16", "sft.checkpoint_every_steps=7"),  # read before the checkpoint of step 7
    ],
)
def test_a_nan_loss_names_its_step_although_losses_are_read_only_now_and_then(
    other: tuple[str, ...], prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    after_step_5(set_one_weight_to_nan, monkeypatch)
    context = make_context("sft", prepared, tmp_path, "sft.log_every_steps=10", *other)
    with pytest.raises(DivergedError, match=r"loss is nan at step 6 of 16; .*; no checkpoint was written before"):
        sft.work(context)
    assert not list(context.output.iterdir())


def test_a_logged_loss_is_the_mean_of_the_steps_since_the_last_one(prepared: Path, tmp_path: Path) -> None:
    logged = {}
    for every in (1, 6):
        (tmp_path / str(every)).mkdir()
        context = make_context("sft", prepared, tmp_path / str(every), f"sft.log_every_steps={every}")
        sft.work(context)
        logged[every] = {row["step"]: row["loss"] for row in context.metrics["history"] if "loss" in row}
    assert list(logged[6]) == [6, 12, 16]
    for step, since in ((6, 0), (12, 6), (16, 12)):
        each = [logged[1][one] for one in range(since + 1, step + 1)]
        assert logged[6][step] == pytest.approx(sum(each) / len(each), rel=1e-12)


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

    original = loop.Trainer.after_step

    def changed(trainer: loop.Trainer) -> bool:
        if trainer.state.step == 5:
            change(trainer.model)
        return original(trainer)

    monkeypatch.setattr(loop.Trainer, "after_step", changed)


def set_one_weight_to_nan(model: Any) -> None:
    next(weight for weight in model.parameters() if weight.requires_grad).data[0] = float("nan")


def batches_of(rows: list[Any], tokenizer: Any) -> list[tuple[Any, Any]]:
    """Return the rows as a packed batch, packed with padding at the end, and padded, each with its token ids."""
    from llamarefine_jobs.models.forward import PaddedBatch
    from llamarefine_jobs.models.packing import Packed, Size, exact_size

    exact = exact_size(rows)
    larger = Size(exact.tokens + 300, exact.rows + 3, exact.longest)
    packed = [Packed(size, "cpu").fill(rows) for size in (exact, larger)]
    padded = PaddedBatch(rows, tokenizer.pad_token_id, "cpu")
    return [(batch, batch.ids) for batch in packed] + [(padded, padded.ids_BT.flatten())]


def ids_before_and_targets(batch: Any, ids: Any, row: int) -> tuple[list[int], list[int]]:
    """Return the tokens of a row after which another one is learned, and the learned ones."""
    has_loss = (batch.row_of == row) & (batch.targets >= 0)
    return ids[has_loss].tolist(), batch.targets[has_loss].tolist()


def record_passes(monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """Return a list to which trainings add, for each pass, the tokens that each of its rows learns."""
    return _record(
        monkeypatch,
        lambda batch: [
            batch.targets[(batch.row_of == row) & (batch.targets >= 0)].tolist() for row in range(batch.rows)
        ],
    )


def record_widths(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return a list to which trainings add, for each pass, its tokens per row, padding included."""
    return _record(monkeypatch, lambda batch: batch.targets.numel() / batch.rows)


def _record(monkeypatch: pytest.MonkeyPatch, describe: Callable[[Any], Any]) -> list[Any]:
    from llamarefine_jobs.training.gradient import StepGradient

    recorded: list[Any] = []
    original = StepGradient._run

    def run(self: Any, examples: Any, weight: int) -> Any:
        recorded.append(describe(self.forward.batch([row for example in examples for row in example.rows])))
        return original(self, examples, weight)

    monkeypatch.setattr(StepGradient, "_run", run)
    return recorded


def assert_longest_first(steps: list[tuple[float, ...]]) -> None:
    assert all(list(step) == sorted(step, reverse=True) for step in steps)
    assert sum(step[0] > step[-1] for step in steps) > len(steps) / 2


def validation_loss(context: Context) -> float:
    """Return the validation loss of the published adapter, computed with models/scoring.py on padded rows."""
    from llamarefine_jobs.models.forward import PaddedForward
    from llamarefine_jobs.models.scoring import score

    base = context.inputs["prepare"] / "base"
    tokenizer = load_tokenizer(base)
    model = adapters.attach_adapter(backends.choose_backend().load(base), context.output / "adapter")
    rows = encode_questions(tokenizer, read_rows(context.inputs["prepare"] / "questions", "validation"))
    scores = score(PaddedForward(model, tokenizer.pad_token_id), rows)
    return -sum(found.logprob for found in scores) / sum(found.tokens for found in scores)
