"""The demo's rows (`source: python-docstrings`), made from the standard library of the Python that runs.

Questions come from four of five documented names, preference pairs from the fifth: no question is
in both. The sources are parsed, never imported, so nothing runs and the order is that of the names.
"""

import ast
import hashlib
import re
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from llamarefine_jobs.contract.errors import DataError

RULES = (
    "a question asks for a function, method or class by its full name; the answer is its docstring's first paragraph",
    "that paragraph must be a sentence of 4 to 60 words: no code, no signature",
    "chosen: the docstring's first paragraph; rejected: that text hedged (as many words as chosen, two of three pairs) "
    "or with its words shuffled (the third)",
)

# Packaged apart on some systems, only data, or not written to be read: they would make the rows depend on the machine.
_LEFT_OUT = {"antigravity", "distutils", "encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "this"}
_LEFT_OUT |= {"tkinter", "turtle", "turtledemo"}
_FORMS = {
    "class": ("What is `{name}`?", "What is the class `{name}` for?"),
    "function": ("What does `{name}` do?", "What is the function `{name}` for?", "What happens when I call `{name}`?"),
}
_HEDGES = (
    "I am not sure, but it might be something like this:",
    "Hard to say. Maybe, but do not count on it:",
    "It depends, and I could be wrong here:",
)
_NOT_PROSE = re.compile(r">>>|->|::|[{}|\\]|\w\(.*=")


@dataclass(frozen=True)
class _Documented:
    name: str
    kind: str
    text: str


def question_rows() -> Iterator[tuple[str, str]]:
    """Questions and answers."""
    for item in _documented():
        if not _is_for_preferences(item):
            yield _question(item), item.text


def preference_rows() -> Iterator[tuple[str, str, str]]:
    """Prompts with a chosen and a rejected answer."""
    for item in _documented():
        if _is_for_preferences(item):
            yield _question(item), item.text, _worse(item)


def _question(item: _Documented) -> str:
    forms = _FORMS[item.kind]
    return forms[_number(item.name, "form") % len(forms)].format(name=item.name)


def _worse(item: _Documented) -> str:
    """The answer as fewer people would want it: without commitment, or without order."""
    words = item.text.split()
    if _number(item.name, "rule") % 3 == 0:
        order = sorted(range(len(words)), key=lambda place: _number(item.name, "order", str(place)))
        return " ".join(words[place] for place in order)
    hedge = _HEDGES[_number(item.name, "hedge") % len(_HEDGES)]
    return " ".join((hedge.split() + words)[: max(len(words), len(hedge.split()) + 2)])


def _is_for_preferences(item: _Documented) -> bool:
    return _number(item.name, "set") % 5 == 0


def _number(*texts: str) -> int:
    return int.from_bytes(hashlib.sha256("\n".join(texts).encode()).digest()[:8], "big")


@cache
def _documented() -> tuple[_Documented, ...]:
    """Every public function, method and class with a sentence to say, by module and then as written."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = sorted(name for name in sys.stdlib_module_names - _LEFT_OUT if not name.startswith("_"))
    found: list[_Documented] = []
    for module in modules:
        for file in _files(root, module):
            parts = file.relative_to(root).with_suffix("").parts
            prefix = ".".join(part for part in parts if part != "__init__")
            found += _in_body(ast.parse(file.read_bytes()), prefix)
    if not found:
        raise DataError(f"{root} holds no Python sources to take docstrings from; give a file as the rows' source")
    return tuple(found)


def _files(root: Path, module: str) -> list[Path]:
    single = root / f"{module}.py"
    if single.is_file():
        return [single]
    files = sorted((root / module).rglob("*.py"))
    return [file for file in files if not any(map(_is_private, file.relative_to(root).with_suffix("").parts))]


def _in_body(node: ast.Module | ast.ClassDef, prefix: str) -> Iterator[_Documented]:
    for child in node.body:
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or _is_private(child.name):
            continue
        name = f"{prefix}.{child.name}"
        text = _first_paragraph(ast.get_docstring(child) or "")
        if text:
            yield _Documented(name, "class" if isinstance(child, ast.ClassDef) else "function", text)
        if isinstance(child, ast.ClassDef):
            yield from _in_body(child, name)


def _first_paragraph(docstring: str) -> str | None:
    text = " ".join(docstring.split("\n\n")[0].split())
    is_sentence = text.endswith((".", "!", "?")) and 4 <= len(text.split()) <= 60
    return text if is_sentence and not _NOT_PROSE.search(text) else None


def _is_private(name: str) -> bool:
    return (name.startswith("_") and name != "__init__") or name in ("test", "tests")
