"""The merge stage refuses inputs that cannot be merged exactly, with a reason in one line, and publishes nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llamarefine_jobs import entry, merge
from llamarefine_jobs.contract.artifact import Manifest, Parent
from llamarefine_jobs.contract.errors import DataError, IntegrityError, LlamaRefineError
from tests.jobs import merging, tiny

Q_PROJ = "model.layers.0.self_attn.q_proj"
A, B = (f"base_model.model.{Q_PROJ}.lora_{half}.weight" for half in "AB")
Change = Callable[[merging.Run], object]


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> merging.Run:
    return merging.make_run(tmp_path_factory.mktemp("untouched"))


@pytest.fixture
def run(untouched: merging.Run, tmp_path: Path) -> merging.Run:
    return merging.copy(untouched, tmp_path)


def adapter_config(**values: Any) -> Change:
    return lambda run: merging.change_config(run.adapter("dpo"), **values)


def adapter_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    return lambda run: merging.change_adapter(run.adapter("sft"), change)


def base_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    return lambda run: merging.change_tensors(run.base / "model.safetensors", change)


def base_config(**values: Any) -> Change:
    def change(run: merging.Run) -> None:
        path = run.base / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def adapt_a_tied_head(run: merging.Run) -> None:
    base_config(tie_word_embeddings=True)(run)
    base_tensors(lambda found: found.pop("lm_head.weight"))(run)
    adapter_tensors(
        lambda found: found.update(
            {"base_model.model.lm_head.lora_A.weight": found[A], "base_model.model.lm_head.lora_B.weight": found[B]}
        )
    )(run)


def index_a_missing_tensor(run: merging.Run) -> None:
    places = dict.fromkeys(("model.norm.weight", "model.extra.weight"), "model.safetensors")
    (run.base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


REFUSED: dict[str, tuple[Change, type[LlamaRefineError], str]] = {
    "DoRA": (adapter_config(use_dora=True), DataError, "the DPO adapter has use_dora: true; only a plain LoRA"),
    "bias": (adapter_config(bias="all"), DataError, 'has bias: "all"'),
    "whole modules": (adapter_config(modules_to_save=["lm_head"]), DataError, 'has modules_to_save: \\["lm_head"\\]'),
    "fan_in_fan_out": (adapter_config(fan_in_fan_out=True), DataError, "has fan_in_fan_out: true"),
    "ranks by layer": (adapter_config(rank_pattern={"q_proj": 8}), DataError, "has rank_pattern"),
    "alphas by layer": (adapter_config(alpha_pattern={"q_proj": 8}), DataError, "has alpha_pattern"),
    "a setting of a future PEFT": (adapter_config(use_telepathy=True), DataError, "has use_telepathy: true"),
    "another method": (adapter_config(peft_type="IA3"), DataError, "has the type IA3; only LORA"),
    "PiSSA": (
        adapter_config(init_lora_weights="pissa_niter_16"),
        DataError,
        "was initialised with pissa_niter_16, which also changes the base",
    ),
    "another rank": (adapter_config(r=8), DataError, "is 4×64 and its B 32×4; expected rank 8"),
    "no rank": (adapter_config(r=0), DataError, "r: 0, lora_alpha: 8; expected positive"),
    "no config": (
        lambda run: (run.adapter("sft") / "adapter_config.json").unlink(),
        DataError,
        "the SFT adapter has no adapter_config.json",
    ),
    "embeddings": (
        adapter_tensors(lambda found: found.update({"base_model.model.model.embed_tokens.lora_embedding_A": found[A]})),
        DataError,
        "embed_tokens.lora_embedding_A, which is not a LoRA of a linear layer",
    ),
    "an A without its B": (adapter_tensors(lambda found: found.pop(B)), DataError, f"holds {A} without {B}"),
    "no tensors": (adapter_tensors(lambda found: found.clear()), DataError, "holds no tensors"),
    "NaN": (adapter_tensors(lambda found: found[B][0, 0].fill_(float("nan"))), DataError, f"{B} holds NaN or infinity"),
    "infinity": (
        adapter_tensors(lambda found: found[A][0, 0].fill_(float("inf"))),
        DataError,
        f"{A} holds NaN or infinity",
    ),
    "a tensor the base lacks": (
        adapter_tensors(
            lambda found: found.update({half.replace("layers.0", "layers.9"): found[half] for half in (A, B)})
        ),
        IntegrityError,
        "another base: it adds to model.layers.9.self_attn.q_proj.weight, which",
    ),
    "a base of another size": (
        lambda run: merging.make_adapter_for(run, "sft", hidden_size=64),
        IntegrityError,
        "another base: .* is 32×64 here, the adapter was trained on 64×64",
    ),
    "a tied head": (adapt_a_tied_head, DataError, "adds to lm_head, which this base ties to its embeddings"),
    "two embeddings where the config says one": (
        base_config(tie_word_embeddings=True),
        DataError,
        "ties lm_head.weight to model.embed_tokens.weight, but these two differ in its weights",
    ),
    "too large for float16": (
        base_tensors(lambda found: found["model.norm.weight"][3].fill_(7e4)),
        DataError,
        "model.norm.weight would hold 7e\\+04, but the largest torch.float16 is 6.55e\\+04; "
        "set merge.dtype to bfloat16",
    ),
    "a base with NaN": (
        base_tensors(lambda found: found[f"{Q_PROJ}.weight"][3, 3].fill_(float("nan"))),
        DataError,
        f"{Q_PROJ}.weight holds NaN or infinity",
    ),
    "a quantised base": (base_config(quantization_config={"bits": 4}), DataError, "the base model is quantised"),
    "a base of integers": (
        base_tensors(lambda found: found.update({"model.norm.weight": found["model.norm.weight"].to(torch.int8)})),
        DataError,
        "model.norm.weight has the type I8; expected float32, float16, bfloat16",
    ),
    "an index of tensors that are not there": (
        index_a_missing_tensor,
        DataError,
        "lists model.extra.weight in model.safetensors, which lacks it",
    ),
    "a base without safetensors": (
        lambda run: (run.base / "model.safetensors").rename(run.base / "pytorch_model.bin"),
        DataError,
        "neither model.safetensors nor model.safetensors.index.json",
    ),
    "a base cut short": (
        lambda run: (run.base / "model.safetensors").write_bytes((run.base / "model.safetensors").read_bytes()[:-9]),
        DataError,
        "the base model's weights cannot be read",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_inputs_that_cannot_be_merged_exactly_are_refused(case: str, run: merging.Run) -> None:
    change, error, message = REFUSED[case]
    change(run)
    with pytest.raises(error, match=message) as caught:
        run.merge()
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert run.merged_artifacts() == []


@pytest.mark.parametrize(("child", "origin"), [("sft", "prepare"), ("dpo", "prepare"), ("dpo", "sft")])
def test_an_adapter_that_was_trained_from_another_parent_is_refused(child: str, origin: str, run: merging.Run) -> None:
    manifests = run.publish()
    other = merging.copy(run, run.folders["prepare"].parent / "other")
    merging.change_tensors(other.base / "model.safetensors", lambda found: found["model.norm.weight"].mul_(2))
    merging.change_adapter(other.adapter("sft"), lambda found: found[B].mul_(2))
    other_parent = tiny.publish(
        run.store, other.folders[origin], origin, tiny.recipe("seed=9"), _parents(manifests, origin)
    )
    parents = manifests[child].parents | {origin: Parent(key=other_parent.key, manifest_sha256=other_parent.sha256())}
    _publish_again(run, manifests[child], parents)
    with pytest.raises(
        IntegrityError, match=f"the {child.upper()} adapter .* was not trained from this run's {origin} "
    ):
        entry.run("merge", merge.work, run.recipe, run.store)
    assert run.merged_artifacts() == []


def test_an_sft_adapter_is_merged_after_only_the_preference_pairs_changed(run: merging.Run) -> None:
    """prepare ran again for new pairs. Its base and questions are the same, so SFT was not trained again."""
    manifests = run.publish()
    pairs = run.folders["prepare"] / "preferences" / "train.jsonl"
    pairs.write_text(pairs.read_text().replace("alpha", "omega"))
    recipe = tiny.recipe("prepare.near_duplicate_similarity=0.8")
    prepared = tiny.publish(run.store, run.folders["prepare"], "prepare", recipe, {})
    assert prepared.key != manifests["prepare"].key
    tiny.publish(run.store, run.folders["dpo"], "dpo", recipe, {"prepare": prepared, "sft": manifests["sft"]})
    merged = entry.run("merge", merge.work, recipe, run.store)
    assert merged.parents["sft"].key == manifests["sft"].key


def _parents(manifests: dict[str, Manifest], stage: str) -> dict[str, Manifest]:
    return {} if stage == "prepare" else {"prepare": manifests["prepare"]}


def _publish_again(run: merging.Run, manifest: Manifest, parents: dict[str, Parent]) -> None:
    """Publish the artifact again with other parents in its manifest."""
    for found in list(run.store.entries(f"artifacts/{manifest.stage}/{manifest.key}/")):
        run.store.objects.delete(found.path)
    run.store.publish(run.folders[manifest.stage], manifest.model_copy(update={"parents": parents}))
