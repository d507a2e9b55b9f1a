"""Trained adapters: which run they belong to, how they are attached, merged in memory, and saved.

`models/lora.py` reads what an adapter adds to each weight; `merge` adds it without loading the model.
"""

import json
from pathlib import Path
from typing import Any

from llamarefine_jobs.context import Context
from llamarefine_jobs.contract.artifact import Manifest, artifact_key, artifact_path, short
from llamarefine_jobs.contract.errors import DataError, IntegrityError
from llamarefine_jobs.contract.stages import STAGES
from llamarefine_jobs.models.backends import freeze, loading
from llamarefine_jobs.models.encoding import load_tokenizer
from llamarefine_jobs.models.lora import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_adapter


def check_lineage(context: Context, child: str, *origins: str) -> None:
    """Raise IntegrityError unless the adapter of stage `child` was trained from this run's artifacts of `origins`."""
    adapter = context.parents[child]
    for origin in origins:
        if not _was_made_from(adapter, context.parents[origin], context):
            raise IntegrityError(
                f"the {child.upper()} adapter {short(adapter.key)} was not trained from this run's {origin} "
                f"({short(context.parents[origin].key)}); to train it again, remove "
                f"{context.store.uri}/{artifact_path(child, adapter.key)} and run again"
            )


def _was_made_from(child: Manifest, origin: Manifest, context: Context) -> bool:
    """Return whether `child` was made from `origin`, or from an artifact with the same bytes in what `child` reads."""
    recorded = child.parents.get(origin.stage)
    if recorded is None:
        return False
    if recorded.manifest_sha256 == origin.sha256():
        return True
    reads = STAGES[child.stage].reads[origin.stage]
    earlier = context.store.manifest(origin.stage, recorded.key)
    if earlier is not None and earlier.sha256() == recorded.manifest_sha256:
        return earlier.content_sha256(*reads) == origin.content_sha256(*reads)
    # The recorded artifact was replaced or removed since. The child's key still identifies the bytes that it read.
    parents = {name: context.parents[name] for name in STAGES[child.stage].reads}
    return artifact_key(child.stage, context.recipe, parents) == child.key


def attach_adapter(model: Any, folder: Path) -> Any:
    """Return `model` with the published adapter in `folder`, for inference. The weights themselves do not change.

    Raises DataError unless the adapter is a plain LoRA in safetensors that fits the model.
    """
    from peft import PeftModel

    if not (folder / ADAPTER_WEIGHTS).is_file():  # PEFT would load a pickle instead, or download from the Hub
        raise DataError(f"the adapter in {folder.name}/ has no {ADAPTER_WEIGHTS}; only safetensors are read")
    read_adapter(folder, folder.parent.name)  # raises unless PEFT's config describes a plain LoRA
    with loading("the adapter does not fit its base"):
        return freeze(PeftModel.from_pretrained(model, folder, is_trainable=False))


def merge_in_memory(base: Path, adapter: Path, into: Path, *, bf16: bool) -> Path:
    """Write base + adapter to `into` as a model folder, added in fp32 on the CPU, and return `into`.

    The DPO stage trains on the result. The base's tokenizer is copied too, because Unsloth loads no model without one.
    """
    import torch
    from safetensors.torch import save_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        base,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        dtype=torch.float32,
        device_map={"": "cpu"},
    )
    merged = attach_adapter(model, adapter).merge_and_unload().to(torch.bfloat16 if bf16 else torch.float32)
    # `merged.save_pretrained` is not used: with several processes it writes only in the first one.
    merged.config.dtype = merged.dtype
    merged.config.save_pretrained(into)
    merged.generation_config.save_pretrained(into)
    save_model(merged, str(into / "model.safetensors"), metadata={"format": "pt"})
    load_tokenizer(base).save_pretrained(into)
    return into


def adapter_state(model: Any) -> dict[str, Any]:
    """Return the adapter's tensors on the CPU, under the names that PEFT gives them in a file."""
    from peft import get_peft_model_state_dict

    return {name: tensor.detach().cpu().clone() for name, tensor in get_peft_model_state_dict(model).items()}


def save_adapter(config: Any, state: dict[str, Any], folder: Path, base_name: str | None) -> None:
    """Write an adapter to `folder` in PEFT's format.

    The same adapter gives the same bytes, because the config names no path of this machine.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    values = {
        key: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        for key, value in config.to_dict().items()
    }
    values |= {"base_model_name_or_path": base_name, "inference_mode": True, "revision": None, "auto_mapping": None}
    # Layer names instead of a backend's regular expression: read_adapter refuses expressions.
    values["target_modules"] = sorted({name.rsplit(".", 3)[1] for name in state})
    text = json.dumps(values, indent=2, sort_keys=True, default=str)
    (folder / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
