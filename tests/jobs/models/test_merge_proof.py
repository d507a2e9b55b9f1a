"""The merge proof: correct merges pass, however small the update; every wrong merge fails and is not published."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llamarefine_jobs.contract.errors import ProofError
from llamarefine_jobs.merge import Sum
from llamarefine_jobs.models import merge_proof
from llamarefine_jobs.models.lora import Updates, read_adapter
from llamarefine_jobs.models.weights import Weights, write_weights
from tests.jobs import merging


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> merging.Run:
    return merging.make_run(tmp_path_factory.mktemp("untouched"))


@pytest.fixture(scope="module")
def written(untouched: merging.Run) -> Path:
    """Return the folder of a correct merge."""
    return untouched.merge()


Combine = Callable[[Updates, Updates], list[Updates]]  # (SFT, DPO) -> the updates that are added
WRONG_MERGES: dict[str, tuple[Combine, str]] = {
    "SFT left out": (lambda sft, dpo: [dpo], r"contains the SFT adapter -?0\.0\d times and the DPO adapter"),
    "DPO left out": (lambda sft, dpo: [sft], r"SFT adapter (1.0|0.9)\d times and the DPO adapter -?0\.[01]\d times"),
    "both left out": (lambda sft, dpo: [], r"contains the SFT adapter -?0\.[0-4]\d times"),
    "SFT added twice": (lambda sft, dpo: [sft, sft, dpo], r"contains the SFT adapter (2.[01]|1.9)\d times"),
    "DPO added twice": (lambda sft, dpo: [sft, dpo, dpo], r"the DPO adapter (2.[012]|1.[89])\d times"),
    "rslora read as plain": (lambda sft, dpo: [sft, scaled(dpo, 0.5)], r"the DPO adapter 0.[456]\d times"),
    "one layer left out": (lambda sft, dpo: [sft, without(dpo, "layers.1.mlp")], r"the DPO adapter 0.\d\d times"),
}


def scaled(updates: Updates, factor: float) -> Updates:
    return {name: type(update)(update.a, update.b, update.scale * factor) for name, update in updates.items()}


def without(updates: Updates, part: str) -> Updates:
    return {name: update for name, update in updates.items() if part not in name}


def prove(run: merging.Run, folder: Path, dtype: str) -> merge_proof.Proof:
    return merge_proof.prove(run.base, run.adapter("sft"), run.adapter("dpo"), folder, dtype, lambda: None)


def write_merge(run: merging.Run, into: Path, dtype: str, combine: Combine) -> Path:
    """Write a model folder with the base and the updates that `combine` returns for the two adapters."""
    updates = combine(*(read_adapter(run.adapter(stage), stage) for stage in ("sft", "dpo")))
    base = Weights(run.base)
    into.mkdir()
    write_weights(into, base.shapes, dtype, 10**9, Sum(base, updates, dtype).blocks)
    shutil.copyfile(run.base / "config.json", into / "config.json")
    return into


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("mistake", WRONG_MERGES)
def test_the_proof_detects_every_wrong_merge(mistake: str, dtype: str, untouched: merging.Run, tmp_path: Path) -> None:
    combine, message = WRONG_MERGES[mistake]
    with pytest.raises(ProofError, match=f"the merged model is not base \\+ adapters: .*{message}"):
        prove(untouched, write_merge(untouched, tmp_path / "wrong", dtype, combine), dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("size", [2e-2, 1e-3, 2e-4])
def test_the_proof_accepts_correct_merges_even_if_the_update_is_smaller_than_the_rounding(
    size: float, dtype: str, untouched: merging.Run, tmp_path: Path
) -> None:
    run = merging.copy(untouched, tmp_path)
    merging.make_adapter(run.base, run.adapter("dpo"), seed=5, size=size)
    proof = prove(run, write_merge(run, tmp_path / "right", dtype, lambda sft, dpo: [sft, dpo]), dtype)
    assert proof.sft_share == pytest.approx(1, abs=0.01)
    assert proof.dpo_share == pytest.approx(1, abs=0.02)
    if size < 1e-3 and dtype == "bfloat16":
        assert proof.distance_from_sft < proof.tolerance  # so the distance alone does not detect the wrong merge
        with pytest.raises(ProofError):
            prove(run, write_merge(run, tmp_path / "wrong", dtype, lambda sft, dpo: [sft]), dtype)


def test_the_proof_detects_a_config_that_differs_from_the_bases(
    untouched: merging.Run, written: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(written, tmp_path / "model")
    values = json.loads((folder / "config.json").read_text())
    values["rope_parameters"]["rope_theta"] = 100.0
    (folder / "config.json").write_text(json.dumps(values))
    with pytest.raises(ProofError, match="is not base \\+ adapters"):
        prove(untouched, folder, "float16")


def test_the_proof_detects_a_missing_weight(untouched: merging.Run, written: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(written, tmp_path / "model")
    merging.change_tensors(folder / "model.safetensors", lambda found: found.pop("model.norm.weight"))
    with pytest.raises(ProofError, match=r"model/ lacks the weights model\.norm\.weight"):
        prove(untouched, folder, "float16")


def test_a_merge_that_fails_its_proof_is_not_published(
    untouched: merging.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum is wrong: it leaves out the SFT adapter."""
    run = merging.copy(untouched, tmp_path)
    original = Sum.__init__
    monkeypatch.setattr(Sum, "__init__", lambda self, base, adapters, dtype: original(self, base, adapters[1:], dtype))
    with pytest.raises(ProofError, match=r"contains the SFT adapter -?0\.0"):
        run.merge()
    assert run.merged_artifacts() == []
