"""How the progress of a run is displayed, on a terminal and in plain lines."""

import io
from datetime import UTC, datetime, timedelta

import pytest
from rich.console import Console

from llamarefine_jobs.contract.progress import Progress
from llamarefine_jobs.contract.stages import SEQUENCE
from llamarefine_k8s.commands.display import (
    LiveTable,
    PlainLines,
    duration,
    open_display,
    progress_text,
    strip_control_characters,
)
from llamarefine_k8s.runs.records import Driver, RunRecord, StageRecord

KEY = "0123456789ab" + 52 * "f"


def record(**stages: StageRecord) -> RunRecord:
    now = datetime.now(UTC)
    every = {name: stages.get(name, StageRecord()) for name in SEQUENCE}
    driver = Driver.this_process()
    return RunRecord(run="run-12345678", created_at=now, updated_at=now, driver=driver, stages=every, recipe={})


def test_a_terminal_gets_a_live_table_and_anything_else_plain_lines() -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "xterm"})
    assert isinstance(open_display(terminal, str), LiveTable)
    assert isinstance(open_display(Console(file=io.StringIO()), str), PlainLines)
    dumb = Console(file=io.StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    assert isinstance(open_display(dumb, str), PlainLines)


def test_the_table_shows_progress_keys_errors_and_logs() -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, color_system=None, _environ={"TERM": "xterm"})
    began = datetime.now(UTC) - timedelta(seconds=34)
    with open_display(console, lambda path: f"/store/{path}") as display:
        display.note("sft", "packing is off")
        display.show(
            record(
                prepare=StageRecord(
                    state="reused", key=KEY, started_at=began, finished_at=began + timedelta(seconds=34)
                ),
                sft=StageRecord(
                    state="running", key=KEY, started_at=began, progress=Progress("sft", 40, 100, loss=4.5)
                ),
                dpo=StageRecord(state="failed", started_at=began, error="dpo: NaN", log="runs/r/logs/dpo.log"),
            )
        )
    shown = screen.getvalue()
    for text in (
        *("packing is off", "0123456789ab  already in the store, made in 34 s", "step 40/100, loss 4.5", "✗  dpo"),
        *("·  merge", "log: /store/runs/r/logs/dpo.log"),
    ):
        assert text in shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (34, "34 s"), (59.7, "1 min 00 s"), (245, "4 min 05 s"), (7800, "2 h 10 min")],
)
def test_durations_are_shown_in_seconds_minutes_and_hours(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_progress_leaves_out_unknown_values() -> None:
    assert progress_text(Progress("sft", 1, 9)) == "step 1/9"
    assert progress_text(Progress("evaluate", 1, 9, phase="base:answers")) == "base answers 1/9"


def test_escape_sequences_are_removed_from_logs() -> None:
    assert strip_control_characters("\x1b[2J\x1b]0;title\x07red\x1b[31m") == "]0;titlered"
