"""Console, JSON output and exit codes of every command. An error is printed as one line, without a traceback."""

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
from llamarefine_jobs.contract.output import has_reader, outlive_readers
from llamarefine_jobs.untrusted.control_characters import strip_control_characters, strip_for_stream

if TYPE_CHECKING:
    from rich.console import Console


def run_command(command: click.Command) -> None:
    """Run the command and exit. An error prints one line, never a traceback, and sets the exit code.

    A closed pipe or terminal ends what the command prints, not its work, and does not change the exit code.
    """
    outlive_readers()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an encoding without ✓ or → prints ? instead of failing
    sys.exit(_exit_code(command))


def open_console(*, stderr: bool = False) -> "Console":
    """Return a rich console that interprets no markup and removes control characters from what it prints."""
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class CleanConsole(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
            for segment in super().render(renderable, options):
                yield segment if segment.control else Segment(strip_control_characters(segment.text), segment.style)

    console = CleanConsole(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 120  # a file or pipe has no width; this fits every table
    return console


def command() -> str:
    """Return how the user types `llamarefine`, for commands that a message suggests.

    LLAMAREFINE_COMMAND if a wrapper has set it; else the name if it is on the PATH; else the path it was started with.
    """
    by_name = "llamarefine" if shutil.which("llamarefine") else shlex.quote(sys.argv[0])
    return os.environ.get("LLAMAREFINE_COMMAND") or by_name


def print_json(value: Any) -> None:
    """Print a value as JSON. Also escapes the control characters that json.dumps leaves unescaped."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    click.echo(re.sub(r"[\x7f-\x9f]", lambda found: f"\\u{ord(found[0]):04x}", text))


def print_text(text: str) -> None:
    """Print untrusted text: unchanged into a file or a pipe, without control characters on a terminal.

    Raises BrokenPipeError, which ends a command successfully, if nobody can read it: its caller only prints.
    """
    click.echo(strip_for_stream(text, sys.stdout))
    if not has_reader(sys.stdout):
        raise BrokenPipeError


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
    except BrokenPipeError:  # from print_text: `llamarefine logs -f | head`
        return 0
    except OSError as error:
        known = from_os_error(error)
        click.echo(strip_control_characters(f"error: {known}"), err=True)
        return known.exit_code
