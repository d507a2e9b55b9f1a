"""What data, a model or a log say is shown on a terminal, never obeyed by it."""

import io
import json
from typing import Any

import pytest
from rich.table import Table
from rich.text import Text

from llamarefine_jobs import infer
from llamarefine_jobs.models.scoring import Answer
from llamarefine_jobs.untrusted.control_characters import strip_control_characters, strip_for_stream
from llamarefine_k8s.commands import terminal

HOSTILE = "a\x1b[2Jb\x1b]0;owned\x07c\x9b31md\x08\x7fe\tf\ng"


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def controls(text: str) -> set[str]:
    return {sign for sign in text if (ord(sign) < 32 or 127 <= ord(sign) < 160) and sign not in "\n\t"}


def test_control_characters_go_and_text_stays() -> None:
    assert strip_control_characters(HOSTILE) == "ab]0;ownedc31mde\tf\ng"
    assert (
        strip_control_characters("a\x1b]8;;http://x\x1b\\b\x1b]52;c;eA==\x07 \u202egpj.exe\u2066")
        == "a]8;;http://x\\b]52;c;eA== gpj.exe"
    )
    assert strip_control_characters("größer, 更好 🦙 e\u0301") == "größer, 更好 🦙 e\u0301"


def test_a_pipe_has_every_byte_and_a_terminal_has_none_that_it_obeys() -> None:
    assert strip_for_stream(HOSTILE, io.StringIO()) == HOSTILE
    assert controls(strip_for_stream(HOSTILE, Screen())) == set()


@pytest.mark.parametrize("shown", [HOSTILE, Text(HOSTILE, "red"), "table"])
def test_tables_and_lines_of_a_run_hold_none(shown: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    console = terminal.open_console()
    console.file = screen
    if shown == "table":
        shown = Table(title=HOSTILE)
        shown.add_column(HOSTILE)
        shown.add_row(HOSTILE)
    console.print(shown)
    assert "owned" in screen.getvalue()
    assert controls(screen.getvalue()) <= set()


def test_an_answer_on_a_terminal_holds_none(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr("sys.stdout", screen)
    infer.show(["q"], [Answer(HOSTILE, 3, True)], None, "merged")
    assert "owned" in screen.getvalue()
    assert controls(screen.getvalue()) == set()


def test_json_escapes_them(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_json({"a": HOSTILE})
    said = capsys.readouterr().out
    assert controls(said) == set()
    assert json.loads(said) == {"a": HOSTILE}
