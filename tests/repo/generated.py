"""Files and parts of files that are generated from the code. `make docs` writes them, and a test compares them."""

import ast
import json
from pathlib import Path

import click
from click.testing import CliRunner

from llamarefine_jobs.contract.errors import Disposition, all_errors
from llamarefine_jobs.contract.recipe import json_schema
from llamarefine_k8s.cli import cli

from . import chart
from .documents import ROOT, text_of
from .sections import replaced, table

_CLI_HEAD = """# The command line

Written from the commands' own `--help` by `make docs`.
"""

_ON_A_CLUSTER = {
    Disposition.FAIL: "fails at once",
    Disposition.RETRY: "is retried, at most `retries` times",
    Disposition.RESUME: "resumes from the checkpoint; not counted as a retry",
}


def cli_reference() -> str:
    """Return the help of every command, as a terminal of 110 columns shows it."""
    parts = [_CLI_HEAD, _section([])]
    parts.extend(_section([name]) for name in cli.list_commands(click.Context(cli)))
    return "\n".join(parts)


def _section(command: list[str]) -> str:
    result = CliRunner(env={"COLUMNS": "110"}).invoke(cli, [*command, "--help"], prog_name="llamarefine")
    assert result.exit_code == 0, result.output
    name = " ".join(["llamarefine", *command])
    return f"## {name}\n\n```\n{result.output.rstrip()}\n```\n"


def exit_codes() -> str:
    """Return docs/exit-codes.md with a table of the errors in contract/errors.py."""
    rows = [
        (str(kind.exit_code), kind.reason, _first_line(kind.__doc__), _ON_A_CLUSTER[kind.disposition])
        for kind in all_errors()
    ]
    head = ("exit code", "reason", "what it means", "the stage's Job on a cluster")
    return replaced(text_of("docs/exit-codes.md"), "exit codes", table(head, rows))


def module_tables(document: str, package: str) -> str:
    """Return `document` with a table of the modules of `package`: first its own, then those of each subpackage."""
    root = ROOT / package
    rows = _modules(root, root)
    for folder in sorted(path.parent for path in root.glob("*/__init__.py")):
        rows.append((f"**`{folder.name}/`**", f"**{_docstring(folder / '__init__.py')}**"))
        rows.extend(_modules(folder, root))
    assert len(rows) > 20
    return replaced(text_of(document), "modules", table(("module", "what it does"), rows))


def _modules(folder: Path, root: Path) -> list[tuple[str, ...]]:
    paths = sorted(path for path in folder.glob("*.py") if path.name != "__init__.py")
    return [(f"`{path.relative_to(root).as_posix()}`", _docstring(path)) for path in paths]


def _docstring(path: Path) -> str:
    return _first_line(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))))


def _first_line(docstring: str | None) -> str:
    assert docstring, "a module, package or error without a docstring"
    return docstring.splitlines()[0].replace("``", "`")


def contents() -> dict[str, str]:
    """Return what each file with generated text must contain, by its path in the repository."""
    return {
        "docs/cli.md": cli_reference(),
        "docs/exit-codes.md": exit_codes(),
        "jobs/README.md": module_tables("jobs/README.md", "jobs/llamarefine_jobs"),
        "jobs/recipes/recipe.schema.json": json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n",
        "k8s/README.md": module_tables("k8s/README.md", "k8s/llamarefine_k8s"),
        **chart.contents(),
    }


if __name__ == "__main__":
    for path, text in contents().items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(text, encoding="utf-8")
        print(f"wrote {path}")
