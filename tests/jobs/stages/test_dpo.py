"""DPO after SFT: the proof before the first step refuses every wrong reference. Real trainings of a tiny model."""

import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamarefine_jobs import dpo, sft
from llamarefine_jobs.context import Context
from llamarefine_jobs.contract.errors import IntegrityError, ProofError
from llamarefine_jobs.contract.prompt import answer, question
from llamarefine_jobs.contract.recipe import Evaluate
from llamarefine_jobs.models import adapters, backends
from llamarefine_jobs.models.encoding import encode_pairs, load_tokenizer, read_rows
from llamarefine_jobs.models.forward import forward_for
from llamarefine_jobs.models.generation import Answer
from llamarefine_jobs.models.lora import ADAPTER_WEIGHTS
from llamarefine_jobs.models.scoring import score
from llamarefine_jobs.report.metrics import ComparedRows, ModelResults, compare
from llamarefine_jobs.training import step_zero
from tests.jobs import tiny
from tests.jobs.stages.test_sft import batches_of, ids_before_and_targets, make_context, record_passes


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_prepared(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished SFT, with adapter/ in it."""
    context = make_context("sft", prepared, tmp_path_factory.mktemp("sft"))
    sft.work(context)
    return context.output


@pytest.fixture
def context(prepared: Path, trained: Path, tmp_path: Path) -> Context:
    return make_dpo(prepared, trained, tmp_path)


def make_dpo(prepared: Path, trained: Path, folder: Path, *overrides: str) -> Context:
    """Return a DPO context with an SFT adapter that is published with prepare as its parent."""
    context = make_context("dpo", prepared, folder, *overrides, sft=trained)
    context.parents["sft"] = tiny.publish(
        context.store, trained, "sft", context.recipe, {"prepare": context.parents["prepare"]}
    )
    return context


def test_before_the_first_step_loss_is_ln_2_and_the_reference_is_the_sft_policy(context: Context) -> None:
    dpo.work(context)
    proof = context.metrics["step_zero"]
    assert proof["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert proof["margin"] == 0
    assert proof["step_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert context.metrics["history"][0]["loss"] == pytest.approx(math.log(2), abs=1e-6), "the first real step"
    assert proof["reference_error"] < 1e-5
    assert proof["distance_from_base"] > 100 * proof["reference_error"]


def test_training_raises_the_margin_on_validation_pairs(context: Context) -> None:
    dpo.work(context)
    margins = [row["eval_reward_margin"] for row in context.metrics["history"] if "eval_reward_margin" in row]
    assert margins[-1] > margins[0] > 0
    validation = context.metrics["validation"]
    assert validation["pairs"] == 10
    assert validation["accuracy"]["value"] == 1
    assert validation["margin"]["value"] == pytest.approx(margins[-1], rel=0.05)
    assert 0 < validation["margin"]["low"] < validation["margin"]["value"] < validation["margin"]["high"]
    adapter = load_file(context.output / "adapter" / ADAPTER_WEIGHTS)
    given = load_file(context.inputs["sft"] / "adapter" / ADAPTER_WEIGHTS)
    assert adapter.keys() == given.keys()
    assert all(not torch.equal(adapter[name], given[name]) for name in adapter), (
        "the DPO adapter is the SFT adapter, trained further"
    )


def test_the_manifest_has_the_same_preference_figures_as_the_report(context: Context) -> None:
    """The report's metrics, computed over the validation pairs, give the figures of the manifest."""
    dpo.work(context)
    tokenizer = load_tokenizer(context.inputs["prepare"] / "base")
    pairs = encode_pairs(tokenizer, rows_of(context, "validation"))
    sft_model = backends.choose_backend().load(sft_policy(context))
    reference = results_of(sft_model, tokenizer, pairs)
    policy = results_of(adapters.attach_adapter(sft_model, context.output / "adapter"), tokenizer, pairs)
    groups = [str(place) for place in range(len(pairs))]
    rows = ComparedRows({"answers": groups, "pairs": groups, "generated": groups}, [""] * len(pairs))
    models = {"base": reference, "sft": reference, "merged": policy}
    lines = {
        line["name"]: line["values"]["merged"]["value"]
        for line in compare(models, rows, Evaluate(bootstrap_resamples=10), beta=context.recipe.dpo.beta, seed=0)
    }
    assert context.metrics["validation"]["accuracy"]["value"] == lines["preference_accuracy"]
    assert context.metrics["validation"]["margin"]["value"] == pytest.approx(lines["preference_margin"], abs=1e-6)


def test_changing_the_reports_confidence_changes_no_byte_of_dpo(prepared: Path, trained: Path, tmp_path: Path) -> None:
    made = []
    for settings in ((), ("evaluate.confidence=0.8", "evaluate.bootstrap_resamples=10")):
        folder = tmp_path / str(len(settings))
        folder.mkdir()
        context = make_dpo(prepared, trained, folder, "dpo.max_steps=2", *settings)
        dpo.work(context)
        adapter = (context.output / "adapter" / ADAPTER_WEIGHTS).read_bytes()
        timed = ("train_seconds", "tokens_per_s")
        made.append((adapter, {name: value for name, value in context.metrics.items() if name not in timed}))
    assert made[0] == made[1]


@pytest.mark.parametrize("backend", ["packed", "transformers"])
def test_both_answers_of_a_pair_are_in_one_pass_and_each_pair_is_in_one_step_of_an_epoch(
    backend: str, prepared: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = make_dpo(prepared, trained, tmp_path, f"dpo.backend={backend}", "dpo.epochs=1")
    passes = record_passes(monkeypatch)
    dpo.work(context)
    tokenizer = load_tokenizer(context.inputs["prepare"] / "base")
    pairs = encode_pairs(tokenizer, rows_of(context, "train"))
    expected = {(tuple(chosen.answer_ids), tuple(rejected.answer_ids)) for chosen, rejected in pairs}
    learned = [
        (tuple(chosen), tuple(rejected))
        for answers in passes
        for chosen, rejected in zip(answers[0::2], answers[1::2], strict=True)
    ]
    assert set(learned) == expected
    assert len(learned) == 8 * 8 + 8, "8 steps of 8 pairs, and the first step once more for the proof"
    assert {len(answers) for answers in passes} == {2 * context.recipe.dpo.micro_batch_rows}


def test_a_reference_on_the_bare_base_is_refused(context: Context) -> None:
    """The most common mistake: a fresh adapter on the base. Policy and reference agree, so the loss is ln 2 as well."""
    base = context.inputs["prepare"] / "base"
    with pytest.raises(ProofError, match="it is the bare base: the SFT adapter is missing in it"):
        prove_with(context, base)


def test_a_reference_with_the_sft_adapter_applied_twice_is_refused(context: Context) -> None:
    adapter = context.inputs["sft"] / "adapter"
    once = adapters.merge_in_memory(context.inputs["prepare"] / "base", adapter, context.work / "once", bf16=False)
    twice = adapters.merge_in_memory(once, adapter, context.work / "twice", bf16=False)
    with pytest.raises(ProofError, match="the SFT adapter counts twice in it"):
        prove_with(context, twice)


def test_a_reference_of_other_weights_is_refused(context: Context, tmp_path: Path) -> None:
    other = tiny.write_prepared(tmp_path / "other", seed=5)
    policy = adapters.merge_in_memory(
        other / "base", context.inputs["sft"] / "adapter", context.work / "policy", bf16=False
    )
    with pytest.raises(ProofError, match="was SFT trained on another base"):
        prove_with(context, policy)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("bare base", "it is the bare base: the SFT adapter is missing in it"),
        ("twice", "the SFT adapter counts twice in it"),
        ("other", "was SFT trained on another base"),
    ],
)
def test_a_wrong_precomputed_reference_is_refused_also_with_the_right_policy(
    wrong: str, message: str, context: Context, tmp_path: Path
) -> None:
    base, adapter = context.inputs["prepare"] / "base", context.inputs["sft"] / "adapter"
    if wrong == "twice":
        base = adapters.merge_in_memory(sft_policy(context), adapter, tmp_path / "twice", bf16=False)
    elif wrong == "other":
        base = tiny.write_prepared(tmp_path / "other", seed=5) / "base"
    trainer, expected = trainer_on(context, sft_policy(context))
    trainer.examples = trainer_on(context, base)[0].examples
    with pytest.raises(ProofError, match=message):
        step_zero.prove(trainer, expected)


def test_a_policy_without_sft_is_refused_also_with_the_right_reference(context: Context) -> None:
    """Policy and reference are different models: the policy is the base, the reference is the SFT policy."""
    trainer, expected = trainer_on(context, context.inputs["prepare"] / "base")
    trainer.examples = trainer_on(context, sft_policy(context))[0].examples
    with pytest.raises(ProofError, match="the first training step does not start from the reference"):
        step_zero.prove(trainer, expected)


def test_a_policy_whose_adapter_is_not_fresh_is_refused(context: Context) -> None:
    trainer, expected = trainer_on(context, sft_policy(context))
    for name, weight in trainer.model.named_parameters():
        if "lora_B" in name:
            weight.data.fill_(0.01)
    with pytest.raises(ProofError, match="the policy does not start from the SFT policy"):
        step_zero.prove(trainer, expected)


def test_the_proof_changes_neither_a_weight_nor_the_gradient(context: Context) -> None:
    trainer, expected = trainer_on(context, sft_policy(context))
    before = trainer.weights.values.clone()
    step_zero.prove(trainer, expected)
    assert torch.equal(trainer.weights.values, before)
    assert not trainer.weights.gradient.any()


@pytest.mark.parametrize("backend", ["packed", "transformers"])
def test_the_training_uses_the_precomputed_scores_of_the_sft_policy(
    backend: str, prepared: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every pass, up to the last step, the loss gets what the merged SFT policy gives to each answer."""
    from llamarefine_jobs.models.forward import PaddedForward
    from llamarefine_jobs.training.objectives import DpoObjective

    context = make_dpo(prepared, trained, tmp_path, f"dpo.backend={backend}")
    tokenizer = load_tokenizer(context.inputs["prepare"] / "base")
    rows = [answer for pair in encode_pairs(tokenizer, rows_of(context, "train")) for answer in pair]
    policy = PaddedForward(backends.choose_backend().load(sft_policy(context)), tokenizer.pad_token_id)
    expected = {
        (*row.prompt_ids, *row.answer_ids): found.logprob for row, found in zip(rows, score(policy, rows), strict=True)
    }
    used = []
    original = DpoObjective.loss

    def loss(objective: DpoObjective, nats_T: Any, batch: Any, reference_R: Any, weight: Any) -> Any:
        used.extend(zip(rows_in(batch), reference_R.tolist(), strict=True))
        return original(objective, nats_T, batch, reference_R, weight)

    monkeypatch.setattr(DpoObjective, "loss", loss)
    dpo.work(context)
    assert len(used) >= 2 * 8 * 16
    for row, nats in used:
        assert nats == pytest.approx(expected[row], abs=1e-4)


def test_an_sft_adapter_that_learned_nothing_is_refused(context: Context, tmp_path: Path) -> None:
    zeroed = tmp_path / "zeroed" / "adapter"
    shutil.copytree(context.inputs["sft"] / "adapter", zeroed)
    weights = load_file(zeroed / ADAPTER_WEIGHTS)
    save_file(
        {name: torch.zeros_like(tensor) if "lora_B" in name else tensor for name, tensor in weights.items()},
        zeroed / ADAPTER_WEIGHTS,
    )
    context.inputs["sft"] = zeroed.parent
    with pytest.raises(ProofError, match="it learned nothing"):
        dpo.work(context)
    assert not list(context.output.iterdir())


def test_an_sft_adapter_of_another_base_is_refused_before_anything_is_loaded(context: Context, tmp_path: Path) -> None:
    other = make_context("sft", tiny.write_prepared(tmp_path / "other", seed=5), tmp_path / "elsewhere", "seed=4")
    context.parents["sft"] = tiny.publish(
        other.store, context.inputs["sft"], "sft", other.recipe, {"prepare": other.parents["prepare"]}
    )
    with pytest.raises(IntegrityError, match=r"the SFT adapter .* was not trained from this run's prepare"):
        dpo.work(context)


def test_a_base_that_is_prepared_again_with_the_same_bytes_is_accepted(context: Context) -> None:
    """The earlier manifest of prepare may be gone; the key of the adapter still identifies the bytes of its base."""
    prepare = context.parents["prepare"]
    again = prepare.model_copy(update={"finished_at": prepare.finished_at.replace(year=2000)})
    context.parents["prepare"] = again
    shutil.rmtree(context.work / "store" / "artifacts" / "prepare")
    dpo.work(context)
    assert (context.output / "adapter" / ADAPTER_WEIGHTS).exists()


def test_an_adapter_with_other_shapes_is_a_one_line_error(context: Context, tmp_path: Path) -> None:
    wide = tmp_path / "wide"
    shutil.copytree(context.inputs["prepare"], wide)
    tokenizer = load_tokenizer(wide / "base")
    tiny.make_model(len(tokenizer), hidden_size=64).save_pretrained(wide / "base")
    context.inputs["prepare"] = wide
    with pytest.raises(Exception, match="the adapter does not fit its base") as caught:
        dpo.work(context)
    assert "\n" not in str(caught.value)


def test_in_random_conversations_the_loss_covers_the_answers_with_eos_and_no_prompt_token(prepared: Path) -> None:
    tokenizer = load_tokenizer(prepared / "base")
    texts = random_pairs(200)
    pairs = encode_pairs(tokenizer, texts)
    for row, pair in zip(texts, pairs, strict=True):
        for batch, ids in batches_of(list(pair), tokenizer):
            for place, text in enumerate((row["chosen"], row["rejected"])):
                predicted_after, learned = ids_before_and_targets(batch, ids, place)
                assert tokenizer.decode(learned) == text + tokenizer.eos_token
                assert learned[-1] == tokenizer.eos_token_id
                assert predicted_after == [pair[place].prompt_ids[-1], *learned[:-1]]


def test_the_policy_has_one_adapter_and_no_copy_of_it_as_reference(context: Context) -> None:
    trainer, _ = trainer_on(context, sft_policy(context))
    assert list(trainer.model.peft_config) == ["default"]
    base = context.inputs["prepare"] / "base"
    frozen = [weight for weight in trainer.model.parameters() if not weight.requires_grad]
    assert len(frozen) == len(list(backends.choose_backend().load(base).parameters()))


def results_of(model: Any, tokenizer: Any, pairs: list[Any]) -> ModelResults:
    """Return what evaluate would pass to the report for these pairs, with placeholders for questions and answers."""
    forward = forward_for(model, tokenizer.pad_token_id)
    chosen, rejected = (score(forward, [pair[side] for pair in pairs]) for side in (0, 1))
    return ModelResults(chosen, chosen, rejected, [Answer("", 1, True)] * len(pairs))


def prove_with(context: Context, policy: Path) -> dict[str, float]:
    """Run the step-0 proof of a trainer whose frozen policy is the model in `policy`; return its figures."""
    return step_zero.prove(*trainer_on(context, policy))


def rows_in(batch: Any) -> list[tuple[int, ...]]:
    """Return the token ids of each row of a packed or padded batch, without padding."""
    if hasattr(batch, "mask_BT"):
        return [tuple(ids[mask.bool()].tolist()) for ids, mask in zip(batch.ids_BT, batch.mask_BT, strict=True)]
    return [tuple(batch.ids[batch.row_of == row].tolist()) for row in range(batch.rows)]


def random_pairs(count: int) -> list[dict[str, Any]]:
    """Return pairs with prompts of one to five turns, in several scripts."""
    draw = random.Random(11)

    def text() -> str:
        alphabet = draw.choice(["abc XYZ.,?\n", "éàüß ñ", "日本語。 ", "👍🏽 \t-", "</>|user assistant"])
        return "".join(draw.choices(alphabet, k=draw.randint(1, 30)))

    rows = []
    for place in range(count):
        turns = [message for _ in range(draw.randint(0, 2)) for message in (*question(text()), *answer(text()))]
        prompt = [*turns, *question(text())]
        rows.append({"prompt": prompt, "chosen": text(), "rejected": text(), "group": str(place)})
    return rows


def trainer_on(context: Context, policy: Path) -> tuple[Any, step_zero.ExpectedScores]:
    """Return the trainer that dpo.work builds on the frozen policy in a folder, and what the proof expects."""
    from llamarefine_jobs.training import loop
    from llamarefine_jobs.training.objectives import DpoObjective
    from llamarefine_jobs.training.reference_logprobs import examples_with_reference

    backend, section = backends.choose_backend(), context.recipe.dpo
    base = context.inputs["prepare"] / "base"
    tokenizer = load_tokenizer(base)
    pairs = encode_pairs(tokenizer, rows_of(context, "train"))
    expected = step_zero.score_reference_separately(
        backend, base, context.inputs["sft"] / "adapter", pairs, tokenizer.pad_token_id
    )
    model = loop.set_token_ids(backend.load(policy), tokenizer)
    model = backend.add_adapter(model, section.lora, seed=1, gradient_checkpointing=False)
    forward = forward_for(model, tokenizer.pad_token_id)
    examples = examples_with_reference(forward, pairs, None, context)
    validation = dpo.PairValidation(pairs, context)
    trainer = loop.Trainer(context, section, forward, examples, DpoObjective(section.beta), validation.validate)
    return trainer, expected


def sft_policy(context: Context) -> Path:
    folder = context.work / "policy"
    if folder.exists():
        return folder
    return adapters.merge_in_memory(
        context.inputs["prepare"] / "base", context.inputs["sft"] / "adapter", folder, bf16=False
    )


def rows_of(context: Context, split: str) -> list[dict[str, Any]]:
    return read_rows(context.inputs["prepare"] / "preferences", split)
