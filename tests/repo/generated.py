"""Files that are written from the code: `make docs` writes them, a test compares them."""

import json
from pathlib import Path

import click
from click.testing import CliRunner

from llamarefine_jobs.contract.recipe import json_schema
from llamarefine_k8s.cli import cli

from . import chart

ROOT = Path(__file__).parents[2]

_CLI_HEAD = """# The command line

Written from the commands' own `--help` by `make docs`.
"""


def cli_reference() -> str:
    """Every command with its help, as a person at a terminal of 110 columns reads it."""
    parts = [_CLI_HEAD, _section([])]
    parts.extend(_section([name]) for name in cli.list_commands(click.Context(cli)))
    return "\n".join(parts)


def _section(command: list[str]) -> str:
    result = CliRunner(env={"COLUMNS": "110"}).invoke(cli, [*command, "--help"], prog_name="llamarefine")
    assert result.exit_code == 0, result.output
    name = " ".join(["llamarefine", *command])
    return f"## {name}\n\n```\n{result.output.rstrip()}\n```\n"


def contents() -> dict[str, str]:
    """What each generated file must hold, by its path in the repository."""
    return {
        "docs/cli.md": cli_reference(),
        "jobs/recipes/recipe.schema.json": json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n",
        **chart.contents(),
    }


if __name__ == "__main__":
    for path, text in contents().items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        (ROOT / path).write_text(text, encoding="utf-8")
        print(f"wrote {path}")
