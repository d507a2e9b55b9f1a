"""The recipe that `llamarefine init` writes: a packaged, commented recipe with the user's values filled in."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

from llamarefine_jobs.contract.errors import DataError, from_os_error
from llamarefine_jobs.recipe_file import parse_recipe

FULL, DEMO = "tinyllama-nvidia-docs.yaml", "demo.yaml"

KEYS = {
    "name": "name",
    "base": "prepare.base.source",
    "questions": "prepare.questions.source",
    "preferences": "prepare.preferences.source",
}


def write_recipe(path: Path, sources: Mapping[str, str], *, demo: bool = False) -> None:
    """Write a recipe with the values of `sources` (by the names in KEYS), after parsing it.

    Raises RecipeError for a wrong value, DataError if `path` exists already: a file is never replaced.
    """
    text = recipes_folder().joinpath(DEMO if demo else FULL).read_text(encoding="utf-8")
    # The packaged head describes other data, and names a schema that is not copied along.
    text = f"# Made by `llamarefine init`; `llamarefine plan {path}` shows what it would run.\n\n" + _without_head(text)
    for name, value in ({"name": _run_name(path)} | dict(sources)).items():
        text = replace_value(text, KEYS[name], value)
        if name in ("questions", "preferences") and not demo:
            text = replace_value(text, f"prepare.{name}.format", "auto")
    parse_recipe(text, str(path))
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise DataError(f"{path}: exists already; remove it, or name another file") from None
    except OSError as error:
        raise from_os_error(error) from None


def defaults(path: Path) -> dict[str, str]:
    """Return the default of each value in KEYS: the full recipe's sources, and a name derived from `path`."""
    recipe = parse_recipe(recipes_folder().joinpath(FULL).read_text(encoding="utf-8"), FULL)
    return {"name": _run_name(path)} | {name: source.source for name, source in recipe.sources().items()}


def recipes_folder() -> Path:
    """Return the folder of packaged recipes: in an installed wheel within this package, in a checkout under jobs/."""
    packaged = Path(__file__).parents[1] / "recipes"
    return packaged if packaged.is_dir() else Path(__file__).parents[3] / "jobs" / "recipes"


def replace_value(text: str, key: str, value: str) -> str:
    """Return the YAML `text` with the value of one dotted `key` replaced; comments and layout are kept."""
    lines = text.splitlines(keepends=True)
    open_keys: list[tuple[int, str]] = []
    for number, line in enumerate(lines):
        name, colon, rest = line.partition(":")
        if not colon or not name.strip() or name.lstrip().startswith(("#", "-")):
            continue
        indent = len(name) - len(name.lstrip())
        open_keys = [(depth, parent) for depth, parent in open_keys if depth < indent] + [(indent, name.strip())]
        if ".".join(parent for _, parent in open_keys) == key:
            before, hash_sign, comment = rest.partition(" #")
            gap = " " * (len(before) - len(before.rstrip())) if hash_sign else ""
            lines[number] = f"{name}: {_scalar(value)}{gap}{hash_sign}{comment}".rstrip("\n") + "\n"
            return "".join(lines)
    raise AssertionError(f"the packaged recipe has no line for {key}")


def _without_head(text: str) -> str:
    """Return a recipe from its first key on, without the comment above it."""
    lines = text.splitlines(keepends=True)
    first = next(number for number, line in enumerate(lines) if line.strip() and not line.startswith("#"))
    return "".join(lines[first:])


def _run_name(path: Path) -> str:
    """Turn the file's name into a valid recipe name."""
    return re.sub(r"[^a-z0-9]+", "-", path.stem.lower()).strip("-")[:40].strip("-") or "recipe"


def _scalar(value: str) -> str:
    """Return `value` as a YAML scalar: plain where that is safe, else quoted as in JSON, which YAML reads too."""
    plain = value.replace("/", "").replace("-", "").replace("_", "").replace(".", "").isalnum() and value[0].isalpha()
    return (
        value
        if plain and value.lower() not in ("true", "false", "null", "yes", "no", "on", "off")
        else json.dumps(value)
    )
