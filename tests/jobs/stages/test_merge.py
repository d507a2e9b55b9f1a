"""The merge stage: for every kind of base the sum equals PEFT's, rounded once, and the folder loads alone."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoTokenizer

from llamarefine_jobs.contract.artifact import Manifest
from llamarefine_jobs.contract.prompt import CHAT_TEMPLATE
from llamarefine_jobs.models.lora import read_adapter
from llamarefine_jobs.recipe_file import to_yaml
from tests.jobs import merging, processes

FP32 = "merge.dtype=float32"
BASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "in several files": {"shard_size": "40KB"},
    "tied embeddings": {"shape": {"tie_word_embeddings": True}},
    "grouped heads": {"shape": {"num_key_value_heads": 2}},
    "rslora": {"sft": {"use_rslora": True}, "dpo": {"use_rslora": True, "r": 8}},
    "different layers": {"sft": {"target_modules": ["q_proj", "v_proj"]}, "dpo": {"target_modules": ["up_proj"]}},
    "one head adapted": {"sft": {"target_modules": ["q_proj", "lm_head"]}},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> merging.Run:
    """Return a run that several tests merge once and only read."""
    return merging.make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def model(run: merging.Run) -> Path:
    return run.merge()


@pytest.fixture(scope="module")
def exact(run: merging.Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the same merge in fp32, so without rounding."""
    return merging.copy(run, tmp_path_factory.mktemp("exact"), FP32).merge()


@pytest.mark.parametrize("kind", BASES)
def test_the_sum_equals_pefts_own_merge(kind: str, tmp_path: Path) -> None:
    run = merging.make_run(tmp_path, FP32, **BASES[kind])
    assert (run.base / "model.safetensors.index.json").exists() == (kind == "in several files")
    merged, expected = merging.tensors(run.merge()), merging.merged_by_peft(run)
    assert expected.keys() - merged.keys() == ({"lm_head.weight"} if kind == "tied embeddings" else set())
    for name, tensor in merged.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)
    changed = [name for name in merged if not torch.equal(merged[name], merging.load(run.base).state_dict()[name])]
    assert changed, "nothing was added"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_sum_is_rounded_once(dtype: torch.dtype, run: merging.Run, exact: Path, tmp_path: Path) -> None:
    """The result is bit for bit the rounded fp32 sum. Rounding after each adapter gives other bits."""
    copied = merging.copy(run, tmp_path, f"merge.dtype={str(dtype).removeprefix('torch.')}")
    rounded, unrounded = merging.tensors(copied.merge()), merging.tensors(exact)
    assert rounded.keys() == unrounded.keys()
    assert all(torch.equal(rounded[name], unrounded[name].to(dtype)) for name in rounded)

    sft, dpo = (read_adapter(run.adapter(stage), stage) for stage in ("sft", "dpo"))
    base = merging.tensors(run.base)
    twice = {name: merging.add(merging.add(base[name], sft[name]).to(dtype), dpo[name]).to(dtype) for name in sft}
    assert all(torch.allclose(twice[name].float(), unrounded[name], atol=1e-2) for name in twice)
    assert not any(torch.equal(twice[name], rounded[name]) for name in twice)


def test_a_large_model_is_written_in_files_of_the_requested_size(tmp_path: Path) -> None:
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    run = merging.make_run(tmp_path, FP32, "merge.max_shard_mb=1", shape=shape)
    model = run.merge()
    files = sorted(model.glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size <= 10**6 for file in files)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    found = merging.tensors(model)
    assert set(index["weight_map"]) == set(found)
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    expected = merging.merged_by_peft(run)
    for name, tensor in merging.load(model).state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


def test_tied_tensors_that_the_base_stores_twice_are_written_once(tmp_path: Path) -> None:
    run = merging.make_run(tmp_path, shape={"tie_word_embeddings": True})
    merging.change_tensors(
        run.base / "model.safetensors",
        lambda found: found.update({"lm_head.weight": found["model.embed_tokens.weight"].clone()}),
    )
    model = run.merge()
    assert "lm_head.weight" not in merging.tensors(model)
    loaded = merging.load(model)
    assert loaded.config.tie_word_embeddings
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_the_same_inputs_give_the_same_bytes(run: merging.Run, model: Path, tmp_path: Path) -> None:
    again = merging.copy(run, tmp_path).merge()
    names = {path.name for path in model.iterdir()}
    assert {"model.safetensors", "config.json", "README.md", "tokenizer.json"} <= names
    assert names == {path.name for path in again.iterdir()}
    assert all((model / name).read_bytes() == (again / name).read_bytes() for name in names)


def test_the_configs_hold_the_type_and_the_special_tokens(run: merging.Run, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float16"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    base, merged = AutoConfig.from_pretrained(run.base).to_dict(), AutoConfig.from_pretrained(model).to_dict()
    assert {name for name in merged if merged[name] != base.get(name)} - {"_name_or_path"} == {"dtype"}
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    generation = json.loads((model / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "do_sample": False}
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2)


def test_scaled_rotary_positions_are_written_in_both_spellings(tmp_path: Path) -> None:
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    run = merging.make_run(tmp_path, shape={"rope_parameters": rope})
    model = run.merge()
    config = json.loads((model / "config.json").read_text())
    assert config["rope_scaling"] == rope
    assert AutoConfig.from_pretrained(model).rope_parameters == AutoConfig.from_pretrained(run.base).rope_parameters


def test_the_model_cards_example_generates_an_answer(model: Path) -> None:
    """It runs in the model's folder, in a process that imports nothing of this project."""
    card = (model / "README.md").read_text()
    snippet = card.split("```python\n")[1].split("```")[0]
    snippet += "\nprint(model.dtype, len(output[0]) > inputs['input_ids'].shape[1])\n"
    completed = subprocess.run([sys.executable, "-c", snippet], cwd=model, capture_output=True, text=True, timeout=120)
    assert completed.returncode == 0, completed.stderr
    assert completed.stdout.splitlines()[-1] == "torch.float16 True"


def test_the_model_card_names_the_artifacts_and_settings_of_the_model(run: merging.Run, model: Path) -> None:
    _, front, card = (model / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["llama", "sft", "dpo"],
    }
    for manifest in run.publish().values():
        assert manifest.key in card
    settings = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert settings["dpo"]["beta"] == run.recipe.dpo.beta
    assert "<|user|>\nQUESTION</s>\n<|assistant|>\n```" in card
    assert str(run.base) not in card


def test_the_model_card_names_a_base_from_the_hub(tmp_path: Path) -> None:
    run = merging.make_run(tmp_path, "prepare.base.source=somebody/llama", "prepare.base.revision=v1")
    _, front, card = (run.merge() / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == "somebody/llama"
    assert "somebody/llama at v1" in card


def test_the_manifest_holds_the_figures_of_the_proof(run: merging.Run, model: Path) -> None:
    manifest = Manifest.from_bytes((model.parent.parent / "manifest.json").read_bytes())
    metrics = manifest.metrics
    assert metrics["parameters"] == sum(tensor.numel() for tensor in merging.tensors(model).values())
    assert metrics["dtype"] == "float16"
    proof = metrics["proof"]
    assert proof["difference"] <= proof["tolerance"] < proof["distance_from_sft"] < proof["distance_from_base"] * 10
    assert proof["sft_share"] == pytest.approx(1, abs=0.01)
    assert proof["dpo_share"] == pytest.approx(1, abs=0.01)
    assert metrics["sum_peak_memory_bytes"] <= metrics["peak_memory_bytes"]


def test_an_adapter_that_adds_nothing_is_merged_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = merging.make_run(tmp_path, FP32, dpo={"size": 0})
    merged, expected = merging.tensors(run.merge()), merging.merged_by_peft(run)
    assert all(torch.allclose(merged[name], expected[name], atol=1e-6) for name in merged)
    assert "merge: warning: the DPO adapter adds zero everywhere" in capsys.readouterr().out


def test_sigterm_during_a_merge_leaves_no_artifact_and_no_files(
    run: merging.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = merging.copy(run, tmp_path)
    copied.publish()
    (tmp_path / "recipe.yaml").write_text(to_yaml(copied.recipe))
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("LLAMAREFINE_WORK", str(tmp_path / "work"))
    process = processes.start("merge", tmp_path / "recipe.yaml", copied.store.uri)
    lines = processes.signal_when(process, signal.SIGTERM, lambda line: "phase=adding" in line)
    assert process.returncode == 30, lines
    assert lines[-1] == "merge: error: merge was stopped by SIGTERM; run the same command again to resume"
    assert copied.merged_artifacts() == []
    assert list((tmp_path / "work").iterdir()) == []


MEMORY_PROBE = """
import resource, sys, torch
from pathlib import Path
from llamarefine_jobs.models.lora import Update
from llamarefine_jobs.merge import Sum, one_thread
from llamarefine_jobs.models.weights import Weights, write_weights

def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform != "darwin" else 1024**2)

base, merged = Path(sys.argv[1], "base"), Path(sys.argv[1], "merged")
base.mkdir(), merged.mkdir()
shapes = {f"{layer}.weight": (2048, 2048) for layer in range(24)}
zeros = bytes(2048 * 2048 * 4)
write_weights(base, shapes, "float32", 10**9, lambda name: [zeros])
update = {name: Update(torch.ones(4, 2048), torch.ones(2048, 4), 0.5) for name in shapes}
before = peak_mb()
with one_thread():
    write_weights(merged, shapes, "float32", 10**9, Sum(Weights(base), [update], "float32").blocks)
print((merged / "model.safetensors").stat().st_size // 2**20, peak_mb() - before)
"""


def test_the_sum_needs_the_memory_of_a_tensor_not_of_the_model(tmp_path: Path) -> None:
    completed = subprocess.run(
        [sys.executable, "-c", MEMORY_PROBE, tmp_path], capture_output=True, text=True, timeout=120
    )
    assert completed.returncode == 0, completed.stderr
    size_mb, grown_mb = map(int, completed.stdout.split())
    assert size_mb == 24 * 16
    assert grown_mb < size_mb / 4
