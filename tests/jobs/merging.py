"""Runs that are complete up to DPO without training: a random base, and adapters with random A and B."""

import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llamarefine_jobs import entry, merge
from llamarefine_jobs.contract.artifact import Manifest
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.models.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Update
from llamarefine_jobs.store import Store

from . import tiny

_SCRATCH = tempfile.TemporaryDirectory(prefix="llamarefine-tests-")  # removed when the process ends

LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass
class Run:
    """The folders that prepare, sft and dpo would write, and the store that they are published in."""

    recipe: Recipe
    store: Store
    folders: dict[str, Path]

    @property
    def base(self) -> Path:
        return self.folders["prepare"] / "base"

    def adapter(self, stage: str) -> Path:
        return self.folders[stage] / "adapter"

    def publish(self) -> dict[str, Manifest]:
        """Publish the current content of the folders; return the manifests by stage."""
        manifests: dict[str, Manifest] = {}
        for stage, parents in (("prepare", ()), ("sft", ("prepare",)), ("dpo", ("prepare", "sft"))):
            manifests[stage] = tiny.publish(
                self.store, self.folders[stage], stage, self.recipe, {name: manifests[name] for name in parents}
            )
        return manifests

    def merge(self) -> Path:
        """Publish, merge, and return the merged model's folder in the store."""
        self.publish()
        return self.model(entry.run("merge", merge.work, self.recipe, self.store))

    def model(self, manifest: Manifest) -> Path:
        return Path(self.store.uri.removeprefix("file://")) / manifest.folder / "model"

    def merged_artifacts(self) -> list[str]:
        return [found.path for found in self.store.entries("artifacts/merge/")]


def make_run(
    folder: Path,
    *overrides: str,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "1GB",
    shape: dict[str, Any] | None = None,
    sft: dict[str, Any] | None = None,
    dpo: dict[str, Any] | None = None,
) -> Run:
    """Make a run in `folder`. `sft` and `dpo` are arguments of make_adapter."""
    prepared = shutil.copytree(_prepared(), folder / "prepare")
    base = prepared / "base"
    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    (base / "model.safetensors").unlink()
    model = tiny.make_model(vocabulary, seed=1, **(shape or {}))
    model.to(dtype).save_pretrained(base, max_shard_size=shard_size)
    run = Run(
        tiny.recipe(*overrides),
        Store((folder / "store").as_uri()),
        {"prepare": prepared, "sft": folder / "sft", "dpo": folder / "dpo"},
    )
    make_adapter(base, run.adapter("sft"), seed=2, **(sft or {}))
    make_adapter(base, run.adapter("dpo"), seed=3, **(dpo or {}))
    return run


@functools.cache
def _prepared() -> Path:
    """Return a prepare folder that all runs of this process copy: training its tokenizer takes longer than a merge."""
    return tiny.write_prepared(Path(_SCRATCH.name, "prepare"))


def make_adapter(base: Path, into: Path, seed: int, size: float = 0.02, **lora: Any) -> None:
    """Save an adapter with PEFT. The standard deviation of B is `size`; with 0 the adapter adds nothing.

    `lora` are arguments of PEFT's LoraConfig.
    """
    from peft import LoraConfig, get_peft_model

    settings = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": LAYERS, **lora}
    torch.manual_seed(seed)
    model = get_peft_model(load(base), LoraConfig(**settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=size) if size else parameter.data.zero_()
    model.save_pretrained(into, save_embedding_layers=False)


def make_adapter_for(run: Run, stage: str, **shape: Any) -> None:
    """Replace the run's adapter of `stage` with an adapter of another base, which has the given shape."""
    other = run.folders[stage].parent / "other_base"
    tiny.make_model(400, **shape).save_pretrained(other)
    make_adapter(other, run.adapter(stage), seed=4)


def load(folder: Path, dtype: Any = torch.float32) -> Any:
    """Load a model with plain transformers."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def merged_by_peft(run: Run) -> dict[str, torch.Tensor]:
    """Return the tensors of base + both adapters, merged by PEFT in fp32."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(load(run.base), run.adapter("sft"), adapter_name="sft")
    model.load_adapter(run.adapter("dpo"), adapter_name="dpo")
    model.base_model.set_adapter(["sft", "dpo"])
    return model.merge_and_unload(adapter_names=["sft", "dpo"]).state_dict()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors in the files of a model folder."""
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def change_config(adapter: Path, **values: Any) -> None:
    path = adapter / ADAPTER_CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_tensors(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Rewrite a safetensors file after `change` has edited its tensors."""
    found = load_file(file)
    change(found)
    save_file({name: value.clone() for name, value in found.items()}, file, metadata={"format": "pt"})


def change_adapter(adapter: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    change_tensors(adapter / ADAPTER_WEIGHTS, change)


def add(weight: torch.Tensor, update: Update) -> torch.Tensor:
    """Return weight + update in fp32."""
    return weight.float() + update.scale * update.b @ update.a


def copy(run: Run, into: Path, *overrides: str) -> Run:
    """Copy a run's folders, so that they can be changed, and give the copy a new store."""
    folders = {stage: shutil.copytree(folder, into / stage) for stage, folder in run.folders.items()}
    recipe = tiny.recipe(*overrides) if overrides else run.recipe
    return Run(recipe, Store((into / "store").as_uri()), folders)
