"""What a training will need of its GPU's memory: the contract's estimate, for the base that a recipe names.

The estimate is not calibrated on any measurement, so only what is far over the card is refused.
"""

import json
import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from llamarefine_jobs import sources
from llamarefine_jobs.contract.artifact import artifact_key
from llamarefine_jobs.contract.errors import DataError, LlamaRefineError, from_os_error
from llamarefine_jobs.contract.memory import Shape, training_bytes
from llamarefine_jobs.contract.recipe import Base, Dpo, Recipe, Sft
from llamarefine_jobs.download import read_head
from llamarefine_jobs.objects import open_objects
from llamarefine_jobs.sources import Kind
from llamarefine_jobs.store import Store
from llamarefine_k8s.checks import Check, fail, ok, warning

REFUSED_FROM = 1.5  # times the card
UNCALIBRATED = "an estimate that no measurement has calibrated"
_CONFIG_BYTES = 1 << 20
_KEY = "prepare.base"


def estimates(recipe: Recipe, store_uri: str, *, ask_hub: bool = True) -> dict[str, int]:
    """Bytes by training stage; nothing where the base's shape is not known from here, or it is the tiny one."""
    base = recipe.prepare.base
    is_near = ask_hub or sources.kind(base.source, hub_id_allowed=True) is not Kind.HUB
    try:
        config = _prepared_config(recipe, Store(store_uri)) or (base_config(base) if is_near else None)
        shape = Shape.of(config) if config else None
    except (LlamaRefineError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return {}  # whoever reads the base says what is wrong with it
    if shape is None:
        return {}
    sections: dict[str, Sft | Dpo] = {"sft": recipe.sft, "dpo": recipe.dpo}
    return {name: training_bytes(shape, section, recipe.max_length_tokens) for name, section in sections.items()}


def base_config(base: Base) -> dict[str, Any] | None:
    """The config.json of a base, read where it lies; None for the tiny one.

    Raises DataError where there is none, AccessError or StoreError where it cannot be reached from here.
    """
    match sources.kind(base.source, hub_id_allowed=True):
        case Kind.PATH:
            data = _read_file(sources.local_path(base.source) / "config.json")
        case Kind.S3:
            parts = urlsplit(base.source)
            data = open_objects(f"s3://{parts.netloc}").read(f"{unquote(parts.path).strip('/')}/config.json")
        case Kind.HUB:
            hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
            place = f"{base.source.removeprefix('hf://')}/resolve/{base.revision or 'main'}/config.json"
            data = read_head(f"{hub}/{place}", _KEY, _CONFIG_BYTES, timeout_s=5)
        case _:
            return None
    if data is None:
        raise DataError(f"{_KEY}: {base.source} holds no config.json; expected a model's folder")
    try:
        config: dict[str, Any] = dict(json.loads(data))
    except (ValueError, TypeError):
        raise DataError(f"{_KEY}: the config.json of {base.source} is no JSON object") from None
    return config


def check_card(stage: str, needed_bytes: int, card_bytes: int, where: str) -> Check:
    """The estimate beside a card: refused only where it is far over it."""
    name = f"GPU memory for {stage}"
    text = f"{gib(needed_bytes)} of the {gib(card_bytes)} {where}, {UNCALIBRATED}"
    to_do = f"lower {stage}.micro_batch_rows or max_length_tokens, or set {stage}.gradient_checkpointing"
    if needed_bytes > REFUSED_FROM * card_bytes:
        return fail(name, text, to_do)
    return warning(name, text, to_do) if needed_bytes > card_bytes else ok(name, text)


def gib(size_bytes: float) -> str:
    """Bytes as people count a card's memory."""
    return f"{size_bytes / 2**30:.1f} GiB"


def _prepared_config(recipe: Recipe, store: Store) -> dict[str, Any] | None:
    """That of the base that is prepared already."""
    if recipe.prepare.base.source == sources.TINY_LLAMA:
        return None
    manifest = store.manifest("prepare", artifact_key("prepare", recipe, {}))
    data = store.read(f"{manifest.folder}/base/config.json") if manifest else None
    return dict(json.loads(data)) if data else None


def _read_file(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise from_os_error(error) from None
