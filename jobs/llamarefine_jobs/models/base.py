"""The base model: fetched from a folder, a bucket or the Hub, checked, and copied for the other stages.

Weights are copied unchanged, and only from safetensors. A model that needs its own code is refused.
"""

import json
import shutil
from math import prod
from pathlib import Path
from typing import Any, get_args

from llamarefine_jobs.contract.errors import DataError
from llamarefine_jobs.contract.recipe import Base, LinearLayer
from llamarefine_jobs.models.encoding import load_tokenizer
from llamarefine_jobs.models.weights import INDEX, SINGLE_FILE, Weights
from llamarefine_jobs.sources import hub, locations
from llamarefine_jobs.sources.s3 import download_s3
from llamarefine_jobs.untrusted.remote_code import pickles_in, refuse_remote_code
from llamarefine_jobs.untrusted.safe_json import read_object

# Architectures with Llama's seven linear layers in each block, under the same names.
_MODEL_TYPES = ("llama", "mistral", "qwen2")
_HUB_FILES = ("*.json", "*.safetensors", "tokenizer.model", "merges.txt", "*.jinja")
_KEY = "prepare.base"


def fetch_base(base: Base, work: Path) -> tuple[Path, str | None]:
    """Download the base if it is remote; return its local folder, and the commit of a Hub repository."""
    match locations.kind(base.source, hub_id_allowed=True):
        case locations.Kind.HUB:
            repository = base.source.removeprefix("hf://")
            folder = hub.snapshot(repository, base.revision, "model", _HUB_FILES, _KEY)
            return folder, folder.name
        case locations.Kind.S3:
            return download_s3(base.source, work / _KEY, base.fingerprint), None
        case locations.Kind.PATH:
            return _in_hub_cache(locations.local_path(base.source), base.revision)
        case _:
            raise DataError(f"{_KEY}: expected a Hub id, a folder, s3://… or tiny-llama, found {base.source}")


def install_base(folder: Path, into: Path) -> Any:
    """Check the model in `folder`, copy it to `into`, and return its tokenizer with our chat template.

    Raises DataError, in one line, if it is not a Llama-like model in safetensors that fits its tokenizer.
    """
    config = check_model(folder)
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > config["vocab_size"]:
        raise DataError(
            f"{_KEY}: the tokenizer has {len(tokenizer)} tokens, but the model has {config['vocab_size']}; "
            "they do not belong together"
        )
    into.mkdir()
    index = folder / INDEX
    shards = set(_json(index).get("weight_map", {}).values()) | {INDEX} if index.is_file() else {SINGLE_FILE}
    for name in ("config.json", *sorted(shards)):
        shutil.copyfile(folder / name, into / name)
    write_tokenizer_and_config(into, tokenizer, _json(folder / "generation_config.json"))
    return tokenizer


def write_tokenizer_and_config(into: Path, tokenizer: Any, generation: dict[str, Any]) -> None:
    """Write the tokenizer, and `generation` with the tokenizer's special tokens as generation_config.json."""
    tokenizer.save_pretrained(into)
    known = generation.get("eos_token_id")
    eos = tokenizer.eos_token_id
    config = generation | {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    if known != eos and not (isinstance(known, list) and eos in known):
        config["eos_token_id"] = eos
    text = json.dumps({name: value for name, value in config.items() if value is not None}, indent=2, sort_keys=True)
    (into / "generation_config.json").write_text(text + "\n", encoding="utf-8")


def check_model(folder: Path) -> dict[str, Any]:
    """Return the config of a model folder. Raises DataError if adapters cannot be trained on the model and merged."""
    if not (folder / "config.json").is_file():
        raise DataError(f"{_KEY}: {folder} has no config.json; expected a model folder")
    config = _json(folder / "config.json")
    kind = config.get("model_type")
    try:
        refuse_remote_code(folder)
    except DataError as error:
        raise DataError(f"{_KEY}: {error}") from None
    if kind not in _MODEL_TYPES:
        raise DataError(f"{_KEY}: expected a causal language model of type {', '.join(_MODEL_TYPES)}, found {kind}")
    if "quantization_config" in config:
        raise DataError(
            f"{_KEY}: the model is quantised, so adapters cannot be merged exactly; give its 16-bit original"
        )
    _check_weights(folder, config)
    return config


def describe_base(folder: Path) -> dict[str, Any]:
    """Return the data card's entry about the base in `folder`."""
    config = _json(folder / "config.json")
    shapes = Weights(folder).shapes.values()
    return {
        "model_type": config["model_type"],
        "parameters": sum(prod(shape) for shape in shapes),
        "layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "vocabulary": config["vocab_size"],
    }


def _check_weights(folder: Path, config: dict[str, Any]) -> None:
    """Raise DataError unless the weights are complete safetensors with the tensors that the config describes.

    This checks names and shapes of the embeddings and of the seven linear layers of each block.
    """
    if not (folder / SINGLE_FILE).is_file() and not (folder / INDEX).is_file():
        pickles = pickles_in(folder)
        found = f"only {pickles[0]}, a pickle, which can run code when it is loaded" if pickles else "none"
        raise DataError(f"{_KEY}: expected weights in safetensors, found {found}; convert them, or choose another base")
    shapes = Weights(folder).shapes
    layers, vocabulary, hidden = (_size(config, name) for name in ("num_hidden_layers", "vocab_size", "hidden_size"))
    for layer in range(layers):
        for linear in get_args(LinearLayer):
            part = "mlp" if linear in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            name = f"model.layers.{layer}.{part}.{linear}.weight"
            if len(shapes.get(name, ())) != 2:
                raise DataError(f"{_KEY}: the weights have no matrix {name}; adapters would not fit this base")
            # transformers allocates the shapes of config.json before it reads the weights, however large they are.
            if shapes[name] != (expected := _shape(config, linear, hidden)):
                raise DataError(
                    f"{_KEY}: {name} has the shape {expected} in config.json, the weights hold {shapes[name]}"
                )
    embeddings = shapes.get("model.embed_tokens.weight")
    if embeddings != (vocabulary, hidden):
        raise DataError(
            f"{_KEY}: config.json has embeddings of {vocabulary} tokens × {hidden}, the weights hold {embeddings}"
        )


def _shape(config: dict[str, Any], linear: str, hidden: int) -> tuple[int, int]:
    """Return the shape of a block's linear layer according to config.json."""
    heads = _size(config, "num_attention_heads")
    width = _size(config, "head_dim") if config.get("head_dim") is not None else hidden // heads
    wide_sizes = {
        "q_proj": heads * width,
        "o_proj": heads * width,
        "k_proj": width * (_size(config, "num_key_value_heads") if config.get("num_key_value_heads") else heads),
    }
    wide_sizes["v_proj"] = wide_sizes["k_proj"]
    wide = wide_sizes.get(linear) or _size(config, "intermediate_size")
    return (hidden, wide) if linear in ("o_proj", "down_proj") else (wide, hidden)


def _size(config: dict[str, Any], name: str) -> int:
    if name not in config:
        raise DataError(f"{_KEY}: config.json has no {name}")
    size = config[name]
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise DataError(f"{_KEY}: config.json has {name}: {size!r:.40}; expected a positive whole number")
    return size


def _in_hub_cache(path: Path, revision: str | None) -> tuple[Path, str | None]:
    """Return `path`, or, if `path` is a repository in the Hub's cache, the snapshot of `revision` and its commit."""
    if not path.is_dir():
        raise DataError(f"{_KEY}: {path} is not a folder; expected a model folder with a config.json")
    if not (path / "snapshots").is_dir():
        return path, None
    reference = path / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision
    if commit is None or not (path / "snapshots" / commit).is_dir():
        raise DataError(f"{_KEY}: {path} has no snapshot of {revision or 'main'}")
    return path / "snapshots" / commit, commit


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return read_object(path)
    except ValueError as error:
        raise DataError(f"{_KEY}: {error}") from None
