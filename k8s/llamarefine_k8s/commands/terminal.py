"""What every command needs of the terminal: a console, JSON, and an end that is one line and an exit code."""

import io
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from llamarefine_jobs.contract.errors import LlamaRefineError, from_os_error
from llamarefine_jobs.untrusted.control_characters import strip_control_characters, strip_for_stream

if TYPE_CHECKING:
    from rich.console import Console


def run_command(command: click.Command) -> None:
    """Run the command: a mistake is one line and the exit code of its kind, never a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a screen without our signs shows others
    sys.exit(_exit_code(command))


def open_console(*, stderr: bool = False) -> "Console":
    """A console that prints text as it is, but for control characters, which it leaves out."""
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class CleanConsole(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(strip_control_characters(segment.text), segment.style)

    console = CleanConsole(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 120  # nobody's window: wide enough for every table
    return console


def command() -> str:
    """How this command is typed here: as its wrapper says, by its name where the shell finds it, else as it was."""
    by_name = "llamarefine" if shutil.which("llamarefine") else shlex.quote(sys.argv[0])
    return os.environ.get("LLAMAREFINE_COMMAND") or by_name


def print_json(value: Any) -> None:
    """A value, for a script to read; what a screen would obey is escaped."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    click.echo(re.sub(r"[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text))


def print_text(text: str) -> None:
    """Text that others wrote: as it is into a file or a pipe, without control characters on a terminal."""
    click.echo(strip_for_stream(text, sys.stdout))


def _exit_code(command: click.Command) -> int:
    try:
        code: int | None = command.main(prog_name="llamarefine", standalone_mode=False)
        return code or 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return 130
    except LlamaRefineError as error:
        click.echo(strip_control_characters(f"{'' if error.reason == 'interrupted' else 'error: '}{error}"), err=True)
        return error.exit_code
    except BrokenPipeError:  # `llamarefine report | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the last flush finds an open end
        return 0
    except OSError as error:
        known = from_os_error(error)
        click.echo(strip_control_characters(f"error: {known}"), err=True)
        return known.exit_code
