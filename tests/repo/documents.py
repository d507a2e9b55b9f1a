"""The repository's Markdown documents, and the links, anchors, commands and paths in them."""

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]

_FENCED = re.compile(r"^```[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def tracked() -> list[str]:
    """Return the paths of the repository's files: committed, or new and not ignored."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    paths = [path for path in listing if (ROOT / path).is_file()]
    assert len(paths) > 20
    return paths


def text_of(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8", errors="replace")


def documents() -> list[str]:
    """Return the paths of all Markdown files."""
    paths = [path for path in tracked() if path.endswith(".md")]
    assert {"README.md", "docs/gpu.md", "jobs/README.md", "charts/llamarefine/README.md"} <= set(paths)
    return paths


def links(text: str) -> list[tuple[str, str]]:
    """Return (path, anchor) of every link within the repository. The path is empty for a link inside the document."""
    return re.findall(r"\]\((?!https?://)([^)#\s]*)#?([^)\s]*)\)", _FENCED.sub("", text))


def anchors(text: str) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them (a repeated heading once)."""
    titles = re.findall(r"^#+ +(.*?) *$", _FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def words_of_code(text: str) -> list[str]:
    """Return every word inside backticks or a fenced block, without punctuation around it."""
    spans = [*_FENCED.findall(text), *re.findall(r"`([^`]+)`", _FENCED.sub("", text))]
    return [word.strip("'\"()[],;:.") for span in spans for word in span.split()]


def make_targets(text: str) -> set[str]:
    """Return the make targets that a document names, in backticks or as a command in a fenced block."""
    prose = _FENCED.sub("", text)
    named = re.findall(r"`make\s+([a-z][a-z0-9-]*)", prose)
    for block in _FENCED.findall(text):
        named += re.findall(r"(?:^|&& )make ([a-z][a-z0-9-]*)", block, re.MULTILINE)
    return set(named)
