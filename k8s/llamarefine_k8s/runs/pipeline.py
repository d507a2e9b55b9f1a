"""The loop that runs the stages which are due, in order, on this machine and on a cluster alike.

The store decides what is due: a stage whose artifact exists is never run again, so the same command resumes wherever an
earlier one ended. An `Executor` decides where and how a stage runs.
"""

import contextlib
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import Protocol, Self

from llamarefine_jobs.contract import progress
from llamarefine_jobs.contract.artifact import Manifest, artifact_key, run_path, short
from llamarefine_jobs.contract.errors import (
    AccessError,
    Disposition,
    IntegrityError,
    LlamaRefineError,
    PreemptedError,
    StoreError,
)
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.stages import SEQUENCE, STAGES
from llamarefine_jobs.sources.fingerprints import file_sha256
from llamarefine_jobs.store import Store
from llamarefine_k8s.runs import provenance, signing
from llamarefine_k8s.runs.plan import newest_checkpoint
from llamarefine_k8s.runs.records import RecordWriter, RunRecord
from llamarefine_k8s.runs.results import Report, read_report

RETRY_AFTER_S = (2.0, 10.0)

READ_TO = "# read to "  # begins the marker, the last line of a log in a bucket
_MARKER_BYTES = 100  # more than the longest marker
_UPLOAD_EVERY_S, _UPLOAD_AT_MOST_BYTES = 15.0, 4 << 20  # a longer log is uploaded only when its stage ends
_IN_THE_RECORD = ("error: ", "makes ", "published ")  # log lines not shown as notes: the record says the same


@dataclass(frozen=True)
class Task:
    """One stage of one run, for an executor to run. The recipe is pinned."""

    run: str
    stage: str
    key: str
    recipe: Recipe
    store_uri: str
    oom_micro_batch_rows: tuple[int, ...] = ()  # rows in a pass for which the kernel killed the stage


class Executor(Protocol):
    """Runs one stage at a time."""

    read_to: str | None
    """Time of the last log line that was passed on, if lines have times. Set it before a stage to continue there."""

    def execute(self, task: Task, on_line: Callable[[str], None]) -> None:
        """Run a stage to its end and pass each line of its log to `on_line`.

        Raises the LlamaRefineError that belongs to the stage's exit code, with the stage's own message.
        """

    def finish(self, task: Task, on_line: Callable[[str], None]) -> None:
        """Pass on the rest of the log of a stage that has finished, but whose driver died before it read all of it."""

    def cancel(self) -> bool:
        """Request that the running stage saves and stops; a second call, that it stops at once. False if none runs.

        Called from a signal handler, so it only records the request. `execute` acts on it and raises PreemptedError.
        """


class RunObserver(Protocol):
    """Shows a run while it is driven: implemented by the terminal's displays, and by a recorder in tests."""

    def show(self, record: RunRecord) -> None:
        """Called with the record after each change."""

    def note(self, stage: str, text: str) -> None:
        """Called with a message that a stage logged under its own name, once for each text."""


class InterruptedRunError(PreemptedError):
    """Ctrl-C or SIGTERM ended the run."""

    exit_code = 130
    reason = "interrupted"


class Pipeline:
    """Drives one run once. `recipe` is pinned."""

    def __init__(
        self,
        recipe: Recipe,
        store: Store,
        executor: Executor,
        observer: RunObserver,
        retry_after_s: tuple[float, ...] = RETRY_AFTER_S,
    ) -> None:
        self.recipe = recipe
        self.store = store
        self.executor = executor
        self.observer = observer
        self.retry_after_s = retry_after_s
        self.made: dict[str, Manifest] = {}
        self._noted: set[str] = set()

    def drive(self) -> RunRecord:
        """Run every stage whose artifact is not in the store; return the run's record, with the state `done`.

        Raises the error of the first failing stage, or InterruptedRunError after Ctrl-C or SIGTERM. In both cases the
        next drive resumes from what is in the store, and the record describes how far this one came.
        """
        key = signing.find_key()  # raises for an unusable key now, not after the last stage
        with RecordWriter(self.store, self.recipe, self.observer.show) as self.record_writer:
            stage = SEQUENCE[0]
            try:
                with _Signals(self.executor) as signals:
                    for stage in SEQUENCE:
                        signals.check()
                        self.made[stage] = self._find_or_run(stage)
                    report = publish_report(self.store, self.record_writer.record.run, self.made["evaluate"])
                    provenance.publish(self.store, self.record_writer.record, self.made, key)
            except (KeyboardInterrupt, PreemptedError) as error:
                by_user = isinstance(error, KeyboardInterrupt) or signals.received
                raise self._record_end(stage, "interrupted", self._interruption(stage, by_user)) from None
            except LlamaRefineError as error:
                raise self._record_end(stage, "failed", error) from None
            except BaseException as error:
                self._record_end(stage, "failed", LlamaRefineError(f"{type(error).__name__}: {error}"))
                raise
            passed = all(gate.passed for gate in report.gates) if report.gates else None
            self.record_writer.run(state="done", gates_passed=passed)
        return self.record_writer.record

    def _find_or_run(self, stage: str) -> Manifest:
        """Return the manifest of the stage's artifact for this recipe; run the stage first if there is none."""
        key = artifact_key(stage, self.recipe, {name: self.made[name] for name in STAGES[stage].reads})
        existing = self.store.manifest(stage, key)
        if existing:
            if not self.store.objects.keeps_checksums:
                self.store.verify(existing)
            if self.record_writer.was_left_running(stage, key):
                self._finish_log(stage, key)
            self.record_writer.stage(
                stage, state="reused", key=key, started_at=existing.started_at, finished_at=existing.finished_at
            )
            return existing
        self.record_writer.stage(
            stage, state="running", key=key, started_at=datetime.now(UTC), finished_at=None, progress=None, error=None
        )
        self._execute(stage, key)
        manifest = self.store.manifest(stage, key)
        if manifest is None:
            raise IntegrityError(
                f"{stage} exited with code 0, but {self.store.uri} has no artifact {short(key)} of it; "
                "check that the stage uses the same store and the same version of llamarefine"
            )
        self.record_writer.stage(stage, state="done", finished_at=datetime.now(UTC))
        return manifest

    def _execute(self, stage: str, key: str) -> None:
        """Run a stage. After an error that may be temporary, run it again after each pause of `retry_after_s`."""
        task = self._task(stage, key)
        with self._log(stage) as log:

            def on_line(line: str) -> None:
                log.write(line, self.executor.read_to)
                self._handle_line(stage, line)

            for attempt, pause_s in enumerate((*self.retry_after_s, None), start=1):
                self.record_writer.stage(stage, attempts=attempt)
                try:
                    self.executor.execute(task, on_line)
                    return
                except LlamaRefineError as error:
                    if error.disposition is not Disposition.RETRY or pause_s is None:
                        raise
                    self.observer.note(stage, f"{error}; retrying in {pause_s:g} s")
                    time.sleep(pause_s)

    def _finish_log(self, stage: str, key: str) -> None:
        """Complete the log of a finished stage with the lines that its killed driver did not read."""
        task = self._task(stage, key)
        with self._log(stage) as log:
            self.executor.finish(task, lambda line: log.write(line, self.executor.read_to))

    @contextlib.contextmanager
    def _log(self, stage: str) -> Iterator["StageLog"]:
        """Open the log of a stage for appending; record its path now, and its digest when it is closed."""
        log = StageLog(self.store, self.record_writer.record.run, stage)
        try:
            with log:
                self.record_writer.stage(stage, log=log.path, log_sha256=None)
                self.executor.read_to = log.read_to
                yield log
        finally:
            self.record_writer.log_digest(stage, log.sha256)

    def _task(self, stage: str, key: str) -> Task:
        return Task(self.record_writer.record.run, stage, key, self.recipe, self.store.uri)

    def _handle_line(self, stage: str, line: str) -> None:
        """Record a line of progress; pass a message of the stage to the observer, once; ignore any other line."""
        parsed = progress.parse(line)
        if parsed:
            self.record_writer.progress(stage, parsed)
            return
        prefix, colon, text = line.partition(": ")
        if not colon or prefix != stage or text.startswith(_IN_THE_RECORD):
            return
        if text not in self._noted:
            self._noted.add(text)
            self.observer.note(stage, text)

    def _interruption(self, stage: str, by_user: bool) -> PreemptedError:
        """Return the error of an interrupted run: what is kept, and how to resume."""
        key = self.record_writer.record.stages[stage].key
        step = newest_checkpoint(self.store, stage, key) if key and STAGES[stage].has_checkpoints else None
        kept = [name for name in SEQUENCE if name in self.made]
        kept += [f"{stage}'s checkpoint at step {step}"] if step is not None and stage not in self.made else []
        text = f"in {stage}; kept: {', '.join(kept) or 'nothing yet'}; rerun the same command to resume"
        if by_user:
            return InterruptedRunError(f"interrupted {text}")
        return PreemptedError(f"preempted {text}")

    def _record_end(self, stage: str, state: str, error: LlamaRefineError) -> LlamaRefineError:
        """Record how the run ended; return the error with the stage's name in front."""
        shown = str(error) if isinstance(error, PreemptedError) else _with_stage(stage, str(error))
        with contextlib.suppress(StoreError, AccessError):  # an outage that ends the run also prevents this write
            if stage not in self.made:
                self.record_writer.stage(stage, retry=False, state=state, finished_at=datetime.now(UTC), error=shown)
            self.record_writer.run(retry=False, state=state, error=shown)
        return type(error)(shown)


class StageLog:
    """The log of one stage of a run, ``runs/<run>/logs/<stage>.log``, open for appending.

    In a folder it is written line by line. In a bucket it is uploaded every _UPLOAD_EVERY_S and when it is closed.
    There its last line is a marker with the time up to which the pod's log was read, so that the next driver neither
    loses nor repeats a line: log and marker are one object. If driver and pod vanish together, the lines since the last
    upload are lost.
    """

    def __init__(self, store: Store, run: str, stage: str) -> None:
        self.path = run_path(run, "logs", f"{stage}.log")
        self.read_to: str | None = None
        self.sha256: str | None = None  # set when it is closed and stored
        self._store = store
        self._uploaded_s = time.monotonic()
        self._folder = tempfile.TemporaryDirectory(prefix="llamarefine-log-")

    def __enter__(self) -> Self:
        if local := self._store.objects.local_path(self.path):
            self._store.write(self.path, self._store.read(self.path) or b"")
            self.file = local
        else:
            self.file = Path(self._folder.name, "log")
            with self.file.open("wb") as into:
                self._store.objects.download(self.path, into, lambda chunk: None)
            self._remove_marker()
        self._lines = self.file.open("a", encoding="utf-8", buffering=1)
        return self

    def write(self, line: str, read_to: str | None = None) -> None:
        """Append a line. `read_to` is the time up to which the log that it came from was read."""
        self._lines.write(f"{line}\n")
        self.read_to = read_to
        if time.monotonic() - self._uploaded_s > _UPLOAD_EVERY_S:
            self._upload()
            self._uploaded_s = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._store.objects.root:
            self._lines.close()
            self.sha256 = file_sha256(self.file)
        else:
            self._lines.write(self._marker())
            self._lines.close()
            # If the stage failed, its own error is reported, not that its log could not be uploaded.
            with contextlib.suppress(*((StoreError, AccessError) if kind else ())):
                self._store.objects.upload(self.path, self.file, lambda chunk: None)
                self.sha256 = file_sha256(self.file)
        self._folder.cleanup()

    def _upload(self) -> None:
        """Upload the log so far with its marker; if that fails, the next upload includes it."""
        if self._store.objects.root or self.file.stat().st_size > _UPLOAD_AT_MOST_BYTES:
            return
        with contextlib.suppress(LlamaRefineError):
            self._store.write(self.path, self.file.read_bytes() + self._marker().encode(), retry=False)

    def _marker(self) -> str:
        return f"{READ_TO}{self.read_to}\n" if self.read_to else ""

    def _remove_marker(self) -> None:
        """Read the marker from the last line and remove that line, if it is one."""
        with self.file.open("r+b") as log:
            size_bytes = log.seek(0, 2)
            log.seek(max(0, size_bytes - _MARKER_BYTES))
            *_, last = log.read().splitlines(keepends=True) or [b""]
            if last.startswith(READ_TO.encode()):
                self.read_to = last[len(READ_TO) :].decode(errors="replace").strip()
                log.truncate(size_bytes - len(last))


class _Signals:
    """Turns SIGINT, SIGTERM and SIGHUP into a cancel of the running stage, or KeyboardInterrupt if none is running."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.received = False

    def __enter__(self) -> Self:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        self._before = {number: signal.signal(number, self._on_signal) for number in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if not self._executor.cancel():
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raise KeyboardInterrupt if a signal came when the last stage was about to end and could no longer stop."""
        if self.received:
            raise KeyboardInterrupt


def publish_report(store: Store, run: str, evaluate: Manifest) -> Report:
    """Copy the files of an evaluation's report, verified, into the run's folder; return the report."""
    with tempfile.TemporaryDirectory(prefix="llamarefine-report-") as folder:
        fetched = store.fetch(evaluate, Path(folder, "report"), *STAGES["evaluate"].writes)
        for name in STAGES["evaluate"].writes:
            store.write(run_path(run, "report", name), (fetched / name).read_bytes())
    return read_report(store, run)


def _with_stage(stage: str, text: str) -> str:
    """Return `text` with the stage's name in front, unless it is there already."""
    return text if text.startswith((f"{stage} ", f"{stage}: ")) else f"{stage}: {text}"
