"""The updates that a LoRA adapter adds to its base, read from PEFT's two files.

Adapters that cannot be added exactly are refused, and so is every setting that is not known to be harmless.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamarefine_jobs.contract.errors import DataError, IntegrityError
from llamarefine_jobs.untrusted.safe_json import read_object

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_LAYER = re.compile(r"[A-Za-z_][\w.]*", re.ASCII)
_PREFIX = "base_model.model."
_HALVES = (".lora_A.weight", ".lora_B.weight")

# Settings that do not change the update of a plain LoRA, or that are read below. Any other setting is refused, and so
# are the settings of future PEFT versions.
_HARMLESS = {
    "base_model_name_or_path", "inference_mode", "lora_alpha", "lora_dropout", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "r", "revision", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# The other initialisations (PiSSA, OLoRA, LoftQ, …) also change the weights of the base.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")


@dataclass(frozen=True)
class Update:
    """An adapter's update of one weight with R rows and C columns: scale · b (R, r) a (r, C), both fp32."""

    a: Any
    b: Any
    scale: float


Updates = Mapping[str, Update]


def read_adapter(folder: Path, name: str) -> Updates:
    """Return the updates of the adapter in `folder`, by the name of the base tensor. Errors call the adapter `name`.

    Raises DataError, in one line, unless the adapter is a plain LoRA of linear layers with finite numbers.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = read_object(folder / ADAPTER_CONFIG)
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except FileNotFoundError as error:
        raise DataError(f"the {name} adapter has no {Path(error.filename or folder).name}; train it again") from None
    except (SafetensorError, ValueError) as error:
        raise DataError(f"the {name} adapter cannot be read: {str(error).splitlines()[0]}") from None
    scale = _scale(config, name)
    _check_names(tensors, name)
    return {
        _base_name(key): _update(tensors, key, config["r"], scale, name) for key in tensors if key.endswith(_HALVES[0])
    }


def check_fits(updates: Updates, shapes: Mapping[str, tuple[int, ...]], tied: bool, name: str) -> None:
    """Raise IntegrityError unless the base has a tensor of the same shape for every update.

    Raises DataError for an update of lm_head when the base ties it to its embeddings.
    """
    for target, update in updates.items():
        if target not in shapes:
            if tied and target == "lm_head.weight":
                raise DataError(
                    f"the {name} adapter adds to lm_head, which this base ties to its embeddings: "
                    "one cannot change without the other; train without lm_head in target_layers"
                )
            raise IntegrityError(
                f"the {name} adapter belongs to another base: it adds to {target}, which this base does not have"
            )
        expected, found = shapes[target], (update.b.shape[0], update.a.shape[1])
        if expected != found:
            raise IntegrityError(
                f"the {name} adapter belongs to another base: {target} is {_shape_text(expected)} here, "
                f"the adapter was trained on {_shape_text(found)}"
            )


def changes_nothing(updates: Updates) -> bool:
    """Return whether the adapter adds zero to every weight, as an untrained adapter does."""
    return not any(update.scale and update.a.any() and update.b.any() for update in updates.values())


def _scale(config: Mapping[str, Any], name: str) -> float:
    """Return the scale of the update: alpha/r, or alpha/sqrt(r) with rslora.

    Raises DataError unless the config describes a plain LoRA.
    """
    if config.get("peft_type") != "LORA":
        raise DataError(f"the {name} adapter has the type {config.get('peft_type')}; only LORA can be merged")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise DataError(
            f"the {name} adapter was initialised with {start}, which also changes the base; train a plain LoRA"
        )
    for key, value in config.items():
        if key not in _HARMLESS and key != "init_lora_weights" and value not in (None, False, "none", [], {}):
            raise DataError(
                f"the {name} adapter has {key}: {json.dumps(value):.80}; only a plain LoRA can be merged exactly"
            )
    targets = config.get("target_modules")
    # PEFT reads a string as a regular expression, and an untrusted expression can take forever to match.
    if not (isinstance(targets, list) and all(isinstance(name, str) and _LAYER.fullmatch(name) for name in targets)):
        raise DataError(f"the {name} adapter's config has target_modules: {targets!r:.80}; expected layer names")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not (isinstance(rank, int) and rank > 0 and isinstance(alpha, int | float) and math.isfinite(alpha)):
        raise DataError(f"the {name} adapter's config has r: {rank}, lora_alpha: {alpha}; expected positive numbers")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _check_names(tensors: Mapping[str, Any], name: str) -> None:
    """Raise DataError unless every tensor is the A or the B of a linear layer, and its counterpart exists."""
    for key in tensors:
        half = next((half for half in _HALVES if key.endswith(half)), None)
        if half is None or not key.startswith(_PREFIX):
            raise DataError(
                f"the {name} adapter holds {key}, which is not a LoRA of a linear layer: it cannot be merged exactly"
            )
        other = key.removesuffix(half) + _HALVES[1 - _HALVES.index(half)]
        if other not in tensors:
            raise DataError(f"the {name} adapter holds {key} without {other}: it is incomplete; train it again")
    if not tensors:
        raise DataError(f"the {name} adapter holds no tensors: it is incomplete; train it again")


def _update(tensors: Mapping[str, Any], key_of_a: str, rank: int, scale: float, name: str) -> Update:
    import torch

    key_of_b = key_of_a.removesuffix(_HALVES[0]) + _HALVES[1]
    a_rC, b_Rr = tensors[key_of_a].to(torch.float32), tensors[key_of_b].to(torch.float32)
    if not (a_rC.ndim == b_Rr.ndim == 2 and a_rC.shape[0] == b_Rr.shape[1] == rank):
        raise DataError(
            f"the {name} adapter's {key_of_a} is {_shape_text(a_rC.shape)} and its B {_shape_text(b_Rr.shape)}; "
            f"expected rank {rank}"
        )
    for key, tensor in ((key_of_a, a_rC), (key_of_b, b_Rr)):
        if not tensor.isfinite().all():
            raise DataError(
                f"the {name} adapter's {key} holds NaN or infinity: its training diverged; lower its learning rate"
            )
    return Update(a_rC, b_Rr, scale)


def _base_name(key_of_a: str) -> str:
    return key_of_a.removeprefix(_PREFIX).removesuffix(_HALVES[0]) + ".weight"


def _shape_text(shape: tuple[int, ...]) -> str:
    return "×".join(str(size) for size in shape)
