"""Control characters in data, answers and logs never reach a terminal."""

import io
import json
from typing import Any

import pytest
from rich.table import Table
from rich.text import Text

from llamarefine_jobs import infer
from llamarefine_jobs.models.generation import Answer
from llamarefine_jobs.untrusted.control_characters import strip_control_characters, strip_for_stream
from llamarefine_k8s.commands import terminal

HOSTILE = "a\x1b[2Jb\x1b]0;owned\x07c\x9b31md\x08\x7fe\tf\ng"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def controls(text: str) -> set[str]:
    return {char for char in text if (ord(char) < 32 or 127 <= ord(char) < 160) and char not in "\n\t"}


def test_control_characters_are_removed_and_text_is_kept() -> None:
    assert strip_control_characters(HOSTILE) == "ab]0;ownedc31mde\tf\ng"
    assert (
        strip_control_characters("a\x1b]8;;http://x\x1b\\b\x1b]52;c;eA==\x07 \u202egpj.exe\u2066")
        == "a]8;;http://x\\b]52;c;eA== gpj.exe"
    )
    assert strip_control_characters("größer, 更好 🦙 e\u0301") == "größer, 更好 🦙 e\u0301"


def test_a_pipe_gets_every_character_and_a_terminal_no_control_character() -> None:
    assert strip_for_stream(HOSTILE, io.StringIO()) == HOSTILE
    assert controls(strip_for_stream(HOSTILE, Terminal())) == set()


@pytest.mark.parametrize("shown", [HOSTILE, Text(HOSTILE, "red"), "table"])
def test_tables_and_lines_on_a_terminal_hold_no_control_character(shown: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    output = Terminal()
    console = terminal.open_console()
    console.file = output
    if shown == "table":
        shown = Table(title=HOSTILE)
        shown.add_column(HOSTILE)
        shown.add_row(HOSTILE)
    console.print(shown)
    assert "owned" in output.getvalue()
    assert controls(output.getvalue()) == set()


def test_an_answer_on_a_terminal_holds_no_control_character(monkeypatch: pytest.MonkeyPatch) -> None:
    output = Terminal()
    monkeypatch.setattr("sys.stdout", output)
    infer.show(["q"], [Answer(HOSTILE, 3, True)], None, "merged")
    assert "owned" in output.getvalue()
    assert controls(output.getvalue()) == set()


def test_json_escapes_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_json({"a": HOSTILE})
    output = capsys.readouterr().out
    assert controls(output) == set()
    assert json.loads(output) == {"a": HOSTILE}
