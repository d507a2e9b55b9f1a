"""Estimated GPU memory of a recipe's trainings: the estimate of contract/memory.py for the recipe's base model.

The estimate was derived from tensors counted on a CPU. So a training is refused only if its estimate far exceeds the
card's memory.
"""

import hashlib
import os
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from llamarefine_jobs.contract.artifact import artifact_key
from llamarefine_jobs.contract.errors import DataError, LlamaRefineError, from_os_error
from llamarefine_jobs.contract.memory import Shape, training_bytes
from llamarefine_jobs.contract.recipe import Base, Dpo, Recipe, Sft
from llamarefine_jobs.sources import locations
from llamarefine_jobs.sources.locations import Kind
from llamarefine_jobs.sources.web import read_head
from llamarefine_jobs.store import Store
from llamarefine_jobs.store.uri import open_objects
from llamarefine_jobs.untrusted.safe_json import LIMIT_BYTES, parse_object
from llamarefine_k8s.runs.checks import Check, fail, ok, warning

REFUSED_FROM = 1.5  # an estimate above so many times the card's memory is refused
UNMEASURED = "an estimate from tensors counted on a CPU"
_CONFIG_BYTES = 1 << 20
_KEY = "prepare.base"
_PREPARED_CONFIG = "base/config.json"


def estimates(recipe: Recipe, store_uri: str, *, ask_hub: bool = True) -> dict[str, int]:
    """Return the estimated bytes by training stage; empty for tiny-llama, or if the base's shape cannot be read here.

    With `ask_hub` false, the config of a base on the Hub is not fetched.
    """
    base = recipe.prepare.base
    may_read = ask_hub or locations.kind(base.source, hub_id_allowed=True) is not Kind.HUB
    try:
        config = _prepared_config(recipe, Store(store_uri)) or (base_config(base) if may_read else None)
        if config is None:
            return {}
        shape = Shape.from_config(config)
        return {
            stage: training_bytes(shape, _training(recipe, stage), recipe.max_length_tokens) for stage in ("sft", "dpo")
        }
    except (LlamaRefineError, ValueError):
        return {}  # prepare reads the base and reports what is wrong with it


def base_config(base: Base) -> dict[str, Any] | None:
    """Return the config.json of a base model, read from its source; None for tiny-llama.

    Raises DataError if the source has no valid config.json, AccessError or StoreError if it cannot be reached from
    here.
    """
    match locations.kind(base.source, hub_id_allowed=True):
        case Kind.PATH:
            data = _read_file(locations.local_path(base.source) / "config.json")
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
        raise DataError(f"{_KEY}: {base.source} has no config.json; expected a model folder")
    try:
        return parse_object(data, "config.json")
    except ValueError as error:
        raise DataError(f"{_KEY}: {base.source}: {error}; expected a model's folder") from None


def check_card(recipe: Recipe, stage: str, needed_bytes: int, card_bytes: int, where: str) -> Check:
    """Compare an estimate with a card: ok if it fits, a warning if not, a failure above REFUSED_FROM times the card.

    `where` follows the card's memory in the text, as in "of this machine's GPU".
    """
    name = f"GPU memory for {stage}"
    text = f"{describe(recipe, stage, needed_bytes)} of the {gib(card_bytes)} {where}, {UNMEASURED}"
    to_do = _how_to_need_less(recipe, stage)
    if needed_bytes > REFUSED_FROM * card_bytes:
        return fail(name, text, to_do)
    return warning(name, text, to_do) if needed_bytes > card_bytes else ok(name, text)


def describe(recipe: Recipe, stage: str, needed_bytes: int) -> str:
    """Return an estimate as text: "at least 3.1 GiB", or "about 25.0 GiB" if the recipe sets the rows of a pass.

    Without `micro_batch_rows`, a training uses more memory where there is more: larger passes are faster.
    """
    return f"{'about' if _training(recipe, stage).micro_batch_rows else 'at least'} {gib(needed_bytes)}"


def gib(size_bytes: float) -> str:
    """Return bytes as text in GiB, the unit of a card's memory."""
    return f"{size_bytes / 2**30:.1f} GiB"


def _training(recipe: Recipe, stage: str) -> Sft | Dpo:
    """Return the section of a training stage."""
    return recipe.sft if stage == "sft" else recipe.dpo


def _how_to_need_less(recipe: Recipe, stage: str) -> str:
    """Return which settings to change so that a training needs less GPU memory."""
    section = _training(recipe, stage)
    rows = f"{stage}.micro_batch_rows or " if (section.micro_batch_rows or 1) > 1 else ""
    settings = [] if section.gradient_checkpointing else [f"{stage}.gradient_checkpointing to true"]
    if section.quantization == "none":
        settings.append(f"{stage}.quantization to nf4")
    return f"lower {rows}max_length_tokens" + (f", or set {' or '.join(settings)}" if settings else "")


def _prepared_config(recipe: Recipe, store: Store) -> dict[str, Any] | None:
    """Return the config of the base that prepare has already stored.

    None if there is none, or if its sha256 differs from the manifest: then it is not the file that prepare wrote.
    """
    if recipe.prepare.base.source == locations.TINY_LLAMA:
        return None
    manifest = store.manifest("prepare", artifact_key("prepare", recipe, {}))
    if manifest is None:
        return None
    data = store.read(f"{manifest.folder}/{_PREPARED_CONFIG}")
    written = {file.sha256 for file in manifest.part(_PREPARED_CONFIG)}
    if data is None or hashlib.sha256(data).hexdigest() not in written:
        return None  # the stage that fetches the base reports the difference
    return parse_object(data, "config.json")


def _read_file(file: Path) -> bytes | None:
    try:
        with file.open("rb") as source:
            return source.read(LIMIT_BYTES + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise from_os_error(error) from None
