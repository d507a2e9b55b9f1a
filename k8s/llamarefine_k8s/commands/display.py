"""Progress of a run that this process drives: a live table on a terminal, plain lines into a pipe or a file."""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from llamarefine_jobs.contract.artifact import short
from llamarefine_jobs.contract.progress import Progress
from llamarefine_jobs.untrusted.control_characters import strip_control_characters
from llamarefine_k8s.runs.records import RunRecord, StageRecord

PLAIN_PROGRESS_S = 5.0  # plain output prints at most one progress line per stage in this time
_MARKS = {
    "pending": ("·", "dim"),
    "done": ("✓", "green"),
    "reused": ("✓", "green"),
    "running": ("▸", "cyan"),
    "failed": ("✗", "red"),
    "interrupted": ("‖", "yellow"),
}


class Display(Protocol):
    """A `pipeline.RunObserver` that is open as a context manager while the run is driven."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...

    def show(self, record: RunRecord) -> None:
        """Show the current record of the run."""

    def note(self, stage: str, text: str) -> None:
        """Show a message that a stage logged under its own name."""


def open_display(console: Console, locate: Callable[[str], str]) -> Display:
    """Return the display that fits `console`. `locate` turns a path in the store into one that a user can open."""
    is_live = console.is_terminal and not console.is_dumb_terminal
    return LiveTable(console, locate) if is_live else PlainLines(console, locate)


class LiveTable:
    """A table with one row per stage, redrawn while the run is driven; notes scroll past above it."""

    def __init__(self, console: Console, locate: Callable[[str], str]) -> None:
        self._console = console
        self._locate = locate
        self._record: RunRecord | None = None
        self._spinner = Spinner("dots", style="cyan")
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=8)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._live.stop()
        if self._record:
            for log in failed_logs(self._record):
                self._console.print(Text(f"log: {self._locate(log)}", "dim"), soft_wrap=True)

    def show(self, record: RunRecord) -> None:
        """Keep the record; the next refresh draws it."""
        self._record = record

    def note(self, stage: str, text: str) -> None:
        """Print a dim line above the table."""
        line = Table.grid(padding=(0, 2, 0, 0))
        line.add_row(" ", Text(f"{stage:<8}", "dim"), Text(strip_control_characters(text), "dim"))
        self._live.console.print(line)

    def _render(self) -> RenderableType:
        return stage_table(self._record, self._spinner) if self._record else Text("")


class PlainLines:
    """One line for each change of a stage, and progress every PLAIN_PROGRESS_S; no control characters."""

    def __init__(self, console: Console, locate: Callable[[str], str]) -> None:
        self._console = console
        self._locate = locate
        self._states: dict[str, str] = {}
        self._progress_printed_s: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        return

    def show(self, record: RunRecord) -> None:
        """Print what changed since the last call."""
        for name, stage in record.stages.items():
            if self._states.get(name, "pending") != stage.state:
                self._states[name] = stage.state
                self._print_change(name, stage)
            elif stage.state == "running" and stage.progress:
                self._print_progress(name, stage.progress)

    def note(self, stage: str, text: str) -> None:
        """Print a line."""
        self._print(f"{stage}: {text}")

    def _print_change(self, name: str, stage: StageRecord) -> None:
        texts = {"running": "starts", "done": "done in " + _elapsed(stage), "reused": "already in the store"}
        key = f", {short(stage.key)}" if stage.key and stage.state in ("done", "reused") else ""
        self._print(f"{name}: {texts.get(stage.state, stage.state)}{key}")
        if stage.state == "failed" and stage.log:
            self._print(f"{name}: log: {self._locate(stage.log)}")

    def _print_progress(self, name: str, progress: Progress) -> None:
        now_s = time.monotonic()
        if now_s - self._progress_printed_s.get(name, -PLAIN_PROGRESS_S) >= PLAIN_PROGRESS_S:
            self._progress_printed_s[name] = now_s
            self._print(f"{name}: {progress_text(progress)}")

    def _print(self, text: str) -> None:
        self._console.print(strip_control_characters(text), soft_wrap=True, markup=False, highlight=False, emoji=False)


def stage_table(record: RunRecord, spinner: Spinner | None = None) -> Table:
    """Return a table with one row per stage: mark, name, elapsed time, and progress, short key or error."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=1)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True, justify="right", min_width=6)
    table.add_column(overflow="fold")
    for name, stage in record.stages.items():
        sign, style = _MARKS[stage.state]
        mark: RenderableType = spinner if spinner and stage.state == "running" else Text(sign, style)
        table.add_row(
            mark,
            Text(name, "dim" if stage.state == "pending" else ""),
            Text(_elapsed(stage), "dim"),
            _details(name, stage, is_live=spinner is not None),
        )
    return table


def _details(name: str, stage: StageRecord, *, is_live: bool) -> RenderableType:
    match stage.state:
        case "running" if stage.progress:
            row = Table.grid(padding=(0, 2, 0, 0))
            bar = ProgressBar(total=stage.progress.steps, completed=stage.progress.step, width=20)
            row.add_row(bar, Text(progress_text(stage.progress)))
            return row
        case "running":
            return Text("starting", "dim")
        case "done":
            return Text(f"{short(stage.key or '')}", "dim")
        case "reused":
            return Text(f"{short(stage.key or '')}  already in the store, made in {_duration(stage)}", "dim")
        case "failed":
            error = "" if is_live else stage.error  # the command that drives the run prints the error at its end
            return Text(strip_control_characters((error or "failed").removeprefix(f"{name}: ")), "red")
        case "interrupted":
            at = f" at step {stage.progress.step}/{stage.progress.steps}" if stage.progress else ""
            return Text(f"interrupted{at}", "yellow")
    return Text("")


def progress_text(progress: Progress) -> str:
    """Return a stage's progress as text: phase, step, loss, tokens per second, time left."""
    phase = (progress.phase or "step").replace(":", " ")
    parts = [f"{phase} {progress.step}/{progress.steps}"]
    parts += [f"loss {progress.loss:.4g}"] if progress.loss is not None else []
    parts += [f"{progress.tokens_per_s:,.0f} tokens/s"] if progress.tokens_per_s is not None else []
    parts += [f"{duration(progress.eta_s)} left"] if progress.eta_s is not None else []
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Return a duration as text: 34 s, 4 min 05 s or 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.0f} s" if round(seconds) < 60 else "1 min 00 s"
    minutes, rest_s = divmod(round(seconds), 60)
    return f"{minutes} min {rest_s:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def failed_logs(record: RunRecord) -> list[str]:
    """Return the paths, in the store, of the failed stages' logs."""
    return [stage.log for stage in record.stages.values() if stage.state == "failed" and stage.log]


def _elapsed(stage: StageRecord) -> str:
    """Return how long the stage ran, or has been running; "" if this run did not start it."""
    return "" if stage.started_at is None or stage.state == "reused" else _duration(stage)


def _duration(stage: StageRecord) -> str:
    began = stage.started_at or datetime.now(UTC)
    return duration(((stage.finished_at or datetime.now(UTC)) - began).total_seconds())
