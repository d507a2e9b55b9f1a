"""A JSON file that came with a model, an adapter or a checkpoint: one object, of a sane size, whoever wrote it."""

import json
from pathlib import Path
from typing import Any

LIMIT_BYTES = 64 << 20  # the longest, a tokenizer.json, has 30 MB


def read_object(path: Path) -> dict[str, Any]:
    """The object in `path`; ValueError, in one line, for anything else, OSError where it cannot be read."""
    with path.open("rb") as file:
        return parse_object(file.read(LIMIT_BYTES + 1), path.name)


def parse_object(data: bytes, name: str) -> dict[str, Any]:
    """The object in `data`, which `name` holds; ValueError, in one line, for anything else."""
    if len(data) > LIMIT_BYTES:
        raise ValueError(f"{name} holds more than {LIMIT_BYTES >> 20} MiB")
    try:
        found = json.loads(data.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError(f"{name} is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name} holds no JSON object")
    return found
