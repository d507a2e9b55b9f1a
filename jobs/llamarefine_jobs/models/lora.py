"""What a LoRA adapter adds to its base, read from PEFT's two files; refused where it cannot be added exactly."""

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

# Settings that do not change what a plain LoRA adds, or that are read below. Any other that is set is refused:
# so are those that a later PEFT invents.
_HARMLESS = {
    "base_model_name_or_path", "inference_mode", "lora_alpha", "lora_dropout", "megatron_core", "peft_type",
    "peft_version", "qalora_group_size", "r", "revision", "target_modules", "task_type", "use_rslora",
}  # fmt: skip
# The other ways to start an adapter (PiSSA, OLoRA, LoftQ, …) also change the base that it belongs to.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal")


@dataclass(frozen=True)
class Update:
    """What an adapter of rank r adds to one weight of R rows and C columns: scale · b (R, r) a (r, C), both fp32."""

    a: Any
    b: Any
    scale: float


Updates = Mapping[str, Update]


def read_adapter(folder: Path, name: str) -> Updates:
    """The updates of the adapter in `folder`, by the base tensor that each is for; `name` stands in errors.

    Raises DataError, one line, for all that is not a plain LoRA of linear layers with finite numbers.
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
    """Raise unless every update has its tensor in the base, of its shape."""
    for target, update in updates.items():
        if target not in shapes:
            if tied and target == "lm_head.weight":
                raise DataError(
                    f"the {name} adapter adds to lm_head, which this base ties to its embeddings: "
                    "one cannot change without the other; train without lm_head among target_layers"
                )
            raise IntegrityError(
                f"the {name} adapter belongs to another base: it adds to {target}, which this one does not have"
            )
        expected, found = shapes[target], (update.b.shape[0], update.a.shape[1])
        if expected != found:
            raise IntegrityError(
                f"the {name} adapter belongs to another base: {target} is {_by(expected)} here, "
                f"the adapter was trained on {_by(found)}"
            )


def changes_nothing(updates: Updates) -> bool:
    """Whether the adapter adds zero everywhere, as one that was never trained does."""
    return not any(update.scale and update.a.any() and update.b.any() for update in updates.values())


def _scale(config: Mapping[str, Any], name: str) -> float:
    """alpha/r, with rslora alpha/sqrt(r); DataError where the adapter is more than that."""
    if config.get("peft_type") != "LORA":
        raise DataError(f"the {name} adapter is of the type {config.get('peft_type')}; only LORA can be merged")
    start = config.get("init_lora_weights", True)
    if start not in _PLAIN_STARTS:
        raise DataError(f"the {name} adapter started as {start}, which changes the base too: train a plain LoRA")
    for key, value in config.items():
        if key not in _HARMLESS and key != "init_lora_weights" and value not in (None, False, "none", [], {}):
            raise DataError(
                f"the {name} adapter has {key}: {json.dumps(value):.80}; only a plain LoRA can be merged exactly"
            )
    targets = config.get("target_modules")
    # A text is a pattern to PEFT, and a pattern of a stranger's may take for ever to match.
    if not (isinstance(targets, list) and all(isinstance(name, str) and _LAYER.fullmatch(name) for name in targets)):
        raise DataError(f"the {name} adapter's config has target_modules: {targets!r:.80}; expected names of layers")
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not (isinstance(rank, int) and rank > 0 and isinstance(alpha, int | float) and math.isfinite(alpha)):
        raise DataError(f"the {name} adapter's config has r: {rank}, lora_alpha: {alpha}; expected positive numbers")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def _check_names(tensors: Mapping[str, Any], name: str) -> None:
    """Every tensor is one half of a pair."""
    for key in tensors:
        half = next((half for half in _HALVES if key.endswith(half)), None)
        if half is None or not key.startswith(_PREFIX):
            raise DataError(
                f"the {name} adapter holds {key}, which is no LoRA of a linear layer: it cannot be merged exactly"
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
            f"the {name} adapter's {key_of_a} is {_by(a_rC.shape)} and its B {_by(b_Rr.shape)}; expected rank {rank}"
        )
    for key, tensor in ((key_of_a, a_rC), (key_of_b, b_Rr)):
        if not tensor.isfinite().all():
            raise DataError(
                f"the {name} adapter's {key} holds NaN or infinity: its training diverged; lower its learning rate"
            )
    return Update(a_rC, b_Rr, scale)


def _base_name(key_of_a: str) -> str:
    return key_of_a.removeprefix(_PREFIX).removesuffix(_HALVES[0]) + ".weight"


def _by(shape: tuple[int, ...]) -> str:
    return "×".join(str(size) for size in shape)
