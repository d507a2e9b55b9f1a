"""Read a recipe from a YAML file, with overrides and one line per mistake, and write one."""

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

# A few lines of YAML with aliases can be a value whose full repr would not fit in memory.
_SHORT_REPR = reprlib.Repr()
_SHORT_REPR.maxlevel, _SHORT_REPR.maxdict, _SHORT_REPR.maxlist = 2, 3, 4
_SHORT_REPR.maxstring, _SHORT_REPR.maxother = 80, 80


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and validate a recipe, after applying ``section.key=value`` overrides.

    Raises RecipeError with one line per mistake: the key, what was found and what is allowed.
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
    """Parse and validate a recipe like `load_recipe`, from its text. Errors begin with `where`."""
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
    """Apply one ``section.key=value`` override to the recipe's unvalidated values. The value is YAML."""
    shown = _one_line(override)
    name, equals, text = override.partition("=")
    if not equals or not name.strip():
        raise RecipeError(f"--set {shown}: expected key=value, such as sft.epochs=2")
    *sections, key = name.strip().split(".")
    for section in sections:
        if values.get(section) is None:  # YAML reads `sft:` with nothing below it as null
            values[section] = {}
        below = values[section]
        if not isinstance(below, dict):
            raise RecipeError(f"--set {shown}: expected keys below `{section}`, found {_kind(below)}")
        values = below
    try:
        values[key] = safe_yaml.load(text)
    except ValueError as error:
        raise RecipeError(f"--set {shown}: the value is not YAML: {error}") from None


def _causes(error: ValidationError) -> list[ErrorDetails]:
    """Return the mistakes without those that follow from another (a list without its invalid item is too short)."""
    mistakes = error.errors()
    below = {mistake["loc"][:depth] for mistake in mistakes for depth in range(len(mistake["loc"]))}
    return [mistake for mistake in mistakes if mistake["loc"] not in below or not mistake["loc"]]


def _explain(mistake: ErrorDetails) -> str:
    location = mistake["loc"]
    name = _one_line(".".join(str(part) for part in location))
    found = mistake.get("input")
    match mistake["type"]:
        case "extra_forbidden":
            return f"`{name}` is not a key of a recipe; {_suggestion(location)}"
        case "missing":
            return f"`{name}` is missing"
        case "value_error":
            return (f"`{name}`: " if name else "") + mistake["msg"].removeprefix("Value error, ")
        case "model_type" | "dict_type" | "model_attributes_type":
            return f"`{name}`: expected keys below it, found {_kind(found)}"
        case _:
            expected = mistake["msg"].replace("tuple", "list")
            return f"`{name}`: {expected[0].lower()}{expected[1:]}, found {_shown(found)}"


def _suggestion(location: Sequence[int | str]) -> str:
    """Return what to write instead of an unknown key: the key with the nearest spelling, or a list of valid keys."""
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
    return f"expected one of {', '.join(names)}"


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
        return _SHORT_REPR.repr(value)
    except ValueError:  # Python refuses to convert an integer of thousands of digits to text
        return "a number too long to show"


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


def to_yaml(recipe: Recipe) -> str:
    """Return the recipe as YAML, including all defaults."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
