"""The launcher's settings: flag > environment > file > default.

click has settled the first two when `load` is called; the file is ``llamarefine.yaml`` beside the work.
"""

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from llamarefine_jobs.contract.errors import RecipeError

FILE = Path("llamarefine.yaml")


class Settings(BaseModel):
    """Where things are, the same for every recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    store: str = "./llamarefine-store"


def load(file: Path = FILE, **given: Any) -> Settings:
    """The settings, `given` on top of the file; a value of None was not given. RecipeError for a wrong file."""
    values = _read(file) | {name: value for name, value in given.items() if value is not None}
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        mistake = error.errors()[0]
        name = ".".join(str(part) for part in mistake["loc"])
        if mistake["type"] == "extra_forbidden":
            raise RecipeError(f"{file}: `{name}` is no setting; {_nearest(name)}") from None
        raise RecipeError(f"{file}: `{name}`: {mistake['msg']}, found {mistake['input']!r}") from None


def _read(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{file}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise RecipeError(f"{file}: expected settings such as `store: s3://bucket/prefix`")
    return values


def _nearest(name: str) -> str:
    names = list(Settings.model_fields)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean `{close[0]}`?" if close else f"there are {', '.join(names)}"
