"""Read a JSON object of limited size, from a file that came with a model, an adapter or a checkpoint."""

import json
from pathlib import Path
from typing import Any

LIMIT_BYTES = 64 << 20  # the largest known file, a tokenizer.json, has 30 MB


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`. Raises a one-line ValueError for anything else, OSError if reading fails."""
    with path.open("rb") as file:
        return parse_object(file.read(LIMIT_BYTES + 1), path.name)


def parse_object(data: bytes, name: str) -> dict[str, Any]:
    """Return the JSON object in `data`. Raises a one-line ValueError, which begins with `name`, for anything else."""
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
