"""The demo's rows (`source: python-docstrings`), made from the docstrings of the running Python's standard library.

Four of five documented names become questions, the fifth becomes a preference pair, so no question is in both sets. The
library's files are parsed and never imported, so none of their code runs. The rows are ordered by module name.
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
    "a question names a function, method or class in full; the answer is the first paragraph of its docstring",
    "that paragraph must be a sentence of 4 to 60 words, without code and without a signature",
    "chosen: the docstring's first paragraph; rejected: that text hedged (as many words as chosen, two of three pairs) "
    "or with its words shuffled (the third)",
)

# Modules that some systems package separately, that hold only data, or that have no real documentation. With them the
# rows would depend on the machine.
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
    """Yield questions with their answers."""
    for item in _documented():
        if not _is_for_preferences(item):
            yield _question(item), item.text


def preference_rows() -> Iterator[tuple[str, str, str]]:
    """Yield prompts with a chosen and a rejected answer."""
    for item in _documented():
        if _is_for_preferences(item):
            yield _question(item), item.text, _rejected_answer(item)


def _question(item: _Documented) -> str:
    forms = _FORMS[item.kind]
    return forms[_hash(item.name, "form") % len(forms)].format(name=item.name)


def _rejected_answer(item: _Documented) -> str:
    """Return a worse answer: the docstring's words shuffled, or the docstring after a hedge."""
    words = item.text.split()
    if _hash(item.name, "rule") % 3 == 0:
        order = sorted(range(len(words)), key=lambda place: _hash(item.name, "order", str(place)))
        return " ".join(words[place] for place in order)
    hedge = _HEDGES[_hash(item.name, "hedge") % len(_HEDGES)]
    return " ".join((hedge.split() + words)[: max(len(words), len(hedge.split()) + 2)])


def _is_for_preferences(item: _Documented) -> bool:
    return _hash(item.name, "set") % 5 == 0


def _hash(*texts: str) -> int:
    return int.from_bytes(hashlib.sha256("\n".join(texts).encode()).digest()[:8], "big")


@cache
def _documented() -> tuple[_Documented, ...]:
    """Return all public functions, methods and classes with a suitable docstring, by module, in the file's order."""
    root = Path(sysconfig.get_path("stdlib"))
    modules = sorted(name for name in sys.stdlib_module_names - _LEFT_OUT if not name.startswith("_"))
    found: list[_Documented] = []
    for module in modules:
        for file in _files(root, module):
            parts = file.relative_to(root).with_suffix("").parts
            prefix = ".".join(part for part in parts if part != "__init__")
            found += _in_body(ast.parse(file.read_bytes()), prefix)
    if not found:
        raise DataError(f"{root} has no Python files to read docstrings from; give a file as the rows' source")
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
