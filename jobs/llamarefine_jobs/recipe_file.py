"""A recipe as a YAML file: read with overrides on top, every mistake one line, written back whole."""

import difflib
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeGuard

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from llamarefine_jobs.contract.errors import RecipeError
from llamarefine_jobs.contract.recipe import Recipe, Section
from llamarefine_jobs.untrusted import safe_yaml

# A few lines of YAML can alias themselves into a value whose full repr fills the memory.
_BRIEF = reprlib.Repr()
_BRIEF.maxlevel, _BRIEF.maxdict, _BRIEF.maxlist, _BRIEF.maxstring, _BRIEF.maxother = 2, 3, 4, 80, 80


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe, with ``section.key=value`` overrides on top.

    Raises RecipeError; one line a mistake, each with the key, what was found and what is allowed.
    """
    try:
        with path.open("rb") as file:
            text = file.read(safe_yaml.LIMIT_BYTES + 1).decode("utf-8-sig")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe; `llamarefine init` writes one to start from") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: a recipe is UTF-8 text; byte {error.start} is not") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    if len(text) > safe_yaml.LIMIT_BYTES:
        raise RecipeError(f"{path}: expected a recipe, found more than {safe_yaml.LIMIT_BYTES} bytes")
    return parse_recipe(text, str(path), overrides)


def parse_recipe(text: str, where: str, overrides: Sequence[str] = ()) -> Recipe:
    """`load_recipe` on the text itself; `where` names it in errors."""
    try:
        values = safe_yaml.load(text)
    except ValueError as error:
        raise RecipeError(f"{where}: not YAML: {error}") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{where}: expected keys such as `name` and `prepare`, found {_kind(values)}")
    for override in overrides:
        _apply(values, override)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError("\n".join(f"{where}: {_explain(mistake)}" for mistake in _causes(error))) from None


def _apply(values: dict[str, Any], override: str) -> None:
    """Set ``section.key=value`` in the recipe's plain values; the value is YAML."""
    shown = _one_line(override)
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise RecipeError(f"--set {shown}: expected key=value, such as sft.epochs=2")
    *sections, key = name.strip().split(".")
    for section in sections:
        if values.get(section) is None:  # `sft:` with nothing below it reads as null
            values[section] = {}
        below = values[section]
        if not isinstance(below, dict):
            raise RecipeError(f"--set {shown}: `{section}` holds {_kind(below)}, no keys")
        values = below
    try:
        values[key] = safe_yaml.load(text)
    except ValueError as error:
        raise RecipeError(f"--set {shown}: the value is not YAML: {error}") from None


def _causes(error: ValidationError) -> list[ErrorDetails]:
    """Its mistakes, but none that only follows from one below it (a list without its one wrong item is too short)."""
    mistakes = error.errors()
    below = {mistake["loc"][:depth] for mistake in mistakes for depth in range(len(mistake["loc"]))}
    return [mistake for mistake in mistakes if mistake["loc"] not in below or not mistake["loc"]]


def _explain(mistake: ErrorDetails) -> str:
    location = mistake["loc"]
    name = _one_line(".".join(str(part) for part in location))
    found = mistake.get("input")
    match mistake["type"]:
        case "extra_forbidden":
            return f"`{name}` is no key of a recipe; {_nearest(location)}"
        case "missing":
            return f"`{name}` is missing"
        case "value_error":
            return (f"`{name}`: " if name else "") + mistake["msg"].removeprefix("Value error, ")
        case "model_type" | "dict_type" | "model_attributes_type":
            return f"`{name}`: expected keys below it, found {_kind(found)}"
        case _:
            expected = mistake["msg"].replace("tuple", "list")
            return f"`{name}`: {expected[0].lower()}{expected[1:]}, found {_shown(found)}"


def _nearest(location: Sequence[int | str]) -> str:
    """What may stand where an unknown key stands, the nearest spelling first."""
    *path, wrong = (str(part) for part in location)
    section: Any = Recipe
    for part in path:
        if part.isdigit():
            continue
        annotation = section.model_fields[part].annotation
        section = next((kind for kind in (annotation, *getattr(annotation, "__args__", ())) if _is_section(kind)), None)
        if section is None:
            return "remove it"
    names = list(section.model_fields)
    prefix = ".".join(path) + "." if path else ""
    close = difflib.get_close_matches(wrong, names, n=1, cutoff=0.6)
    if close:
        return f"did you mean `{prefix}{close[0]}`?"
    elsewhere = [
        f"{name}.{wrong}"
        for name, field in Recipe.model_fields.items()
        if _is_section(field.annotation) and wrong in field.annotation.model_fields
    ]
    if elsewhere:
        return f"did you mean `{elsewhere[0]}`?"
    return f"there are {', '.join(names)}"


def _is_section(kind: Any) -> TypeGuard[type[Section]]:
    return isinstance(kind, type) and issubclass(kind, Section)


def _kind(value: Any) -> str:
    match value:
        case None:
            return "nothing"
        case dict():
            return "keys"
        case list() | tuple():
            return "a list"
        case _:
            return f"the value {_shown(value)}"


def _shown(value: Any) -> str:
    try:
        return _BRIEF.repr(value)
    except ValueError:  # Python refuses to write out an integer of thousands of digits
        return "a number too long to show"


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


def to_yaml(recipe: Recipe) -> str:
    """The whole recipe, defaults written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
