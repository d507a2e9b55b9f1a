"""Run the stages that are due, in order. The same loop drives them on this machine and on a cluster.

The store decides what is due: a stage whose artifact is there is never run again, so the same command
goes on wherever an earlier one ended. Who runs a stage, and where, is an `Executor`'s business.
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
from llamarefine_k8s.runs.records import Journal, RunRecord
from llamarefine_k8s.runs.results import Report, read_report

RETRY_AFTER_S = (2.0, 10.0)

READ_TO = "# read to "  # begins the last line of a log in a bucket
_MARK_BYTES = 100  # is never as long
_KEEP_EVERY_S, _KEEP_AT_MOST_BYTES = 15.0, 4 << 20  # a longer log goes when its stage ends
_KNOWN_ANYWAY = ("error: ", "makes ", "published ")  # what the record says, a stage's log need not say again


@dataclass(frozen=True)
class Task:
    """One stage of one run, as an executor is given it. The recipe is pinned."""

    run: str
    stage: str
    key: str
    recipe: Recipe
    store_uri: str
    oom_micro_batch_rows: tuple[int, ...] = ()  # micro-batches, in rows, that the kernel has killed it for


class Executor(Protocol):
    """Runs one stage at a time."""

    read_to: str | None
    """Up to when a stage's log was given, where its lines have times; set, it is where the next reading begins."""

    def execute(self, task: Task, on_line: Callable[[str], None]) -> None:
        """Run a stage to its end, giving each line of its log to `on_line`.

        Raises the kind of LlamaRefineError that the stage's exit code means, with the stage's own message.
        """

    def finish(self, task: Task, on_line: Callable[[str], None]) -> None:
        """Give what is left to read of the log of a stage that is made, and whose driver did not live to read it."""

    def cancel(self) -> bool:
        """Ask the stage that runs to save and stop, the second time to stop at once; False where none runs.

        Called from a signal handler: it only takes note. `execute` does the rest and raises PreemptedError.
        """


class RunObserver(Protocol):
    """Shows a run to a person."""

    def show(self, record: RunRecord) -> None:
        """The run as it now stands."""

    def note(self, stage: str, text: str) -> None:
        """Something a stage says of itself."""


class InterruptedRunError(PreemptedError):
    """Ctrl-C or SIGTERM ended the run."""

    exit_code = 130
    reason = "interrupted"


class Pipeline:
    """One drive of one run. `recipe` is pinned."""

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
        self._told: set[str] = set()

    def drive(self) -> RunRecord:
        """Bring every stage of the recipe into the store; the run's record, state `done`.

        Raises what the first failing stage raised, and InterruptedRunError after Ctrl-C or SIGTERM. Both leave
        a store from which the next drive goes on, and a record that says how far this one came.
        """
        key = signing.find_key()  # one that cannot sign is told before a stage runs, not after the last
        with Journal(self.store, self.recipe, self.observer.show) as self.journal:
            stage = SEQUENCE[0]
            try:
                with _Signals(self.executor) as signals:
                    for stage in SEQUENCE:
                        signals.check()
                        self.made[stage] = self._bring(stage)
                    report = publish_report(self.store, self.journal.record.run, self.made["evaluate"])
                    provenance.publish(self.store, self.journal.record, self.made, key)
            except (KeyboardInterrupt, PreemptedError) as error:
                asked = isinstance(error, KeyboardInterrupt) or signals.asked
                raise self._end(stage, "interrupted", self._interruption(stage, asked)) from None
            except LlamaRefineError as error:
                raise self._end(stage, "failed", error) from None
            except BaseException as error:
                self._end(stage, "failed", LlamaRefineError(f"{type(error).__name__}: {error}"))
                raise
            passed = all(gate.passed for gate in report.gates) if report.gates else None
            self.journal.run(state="done", gates_passed=passed)
        return self.journal.record

    def _bring(self, stage: str) -> Manifest:
        """The manifest of `stage` for this recipe: the one that stands, or that of what runs now."""
        key = artifact_key(stage, self.recipe, {name: self.made[name] for name in STAGES[stage].reads})
        standing = self.store.manifest(stage, key)
        if standing:
            if not self.store.objects.keeps_checksums:
                self.store.verify(standing)
            if self.journal.was_left(stage, key):
                self._finish(stage, key)
            self.journal.stage(
                stage, state="reused", key=key, started_at=standing.started_at, finished_at=standing.finished_at
            )
            return standing
        self.journal.stage(stage, state="running", key=key, started_at=datetime.now(UTC))
        self._execute(stage, key)
        manifest = self.store.manifest(stage, key)
        if manifest is None:
            raise IntegrityError(
                f"{stage} ended well, but {self.store.uri} has no artifact {short(key)} of it; "
                "is it the same store, and the same version of llamarefine?"
            )
        self.journal.stage(stage, state="done", finished_at=datetime.now(UTC))
        return manifest

    def _execute(self, stage: str, key: str) -> None:
        """Run a stage, again after trouble that may pass by itself."""
        task = self._task(stage, key)
        with self._log(stage) as log:

            def on_line(line: str) -> None:
                log.write(line, self.executor.read_to)
                self._hear(stage, line)

            for attempt, pause_s in enumerate((*self.retry_after_s, None), start=1):
                self.journal.stage(stage, attempts=attempt)
                try:
                    self.executor.execute(task, on_line)
                    return
                except LlamaRefineError as error:
                    if error.disposition is not Disposition.RETRY or pause_s is None:
                        raise
                    self.observer.note(stage, f"{error}; trying again in {pause_s:g} s")
                    time.sleep(pause_s)

    def _finish(self, stage: str, key: str) -> None:
        """Take along what a driver that was killed left unread."""
        task = self._task(stage, key)
        with self._log(stage) as log:
            self.executor.finish(task, lambda line: log.write(line, self.executor.read_to))

    @contextlib.contextmanager
    def _log(self, stage: str) -> Iterator["StageLog"]:
        """The log of a stage, to be gone on with; the record says where it lies and, when it ends, what it is."""
        log = StageLog(self.store, self.journal.record.run, stage)
        try:
            with log:
                self.journal.stage(stage, log=log.path, log_sha256=None)
                self.executor.read_to = log.read_to
                yield log
        finally:
            self.journal.log_ends(stage, log.sha256)

    def _task(self, stage: str, key: str) -> Task:
        return Task(self.journal.record.run, stage, key, self.recipe, self.store.uri)

    def _hear(self, stage: str, line: str) -> None:
        """Progress into the record, what the stage says of itself to the observer, once; the rest is the log's."""
        now = progress.parse(line)
        if now:
            self.journal.progress(stage, now)
            return
        speaker, colon, text = line.partition(": ")
        if not colon or speaker != stage or text.startswith(_KNOWN_ANYWAY):
            return
        if text not in self._told:
            self._told.add(text)
            self.observer.note(stage, text)

    def _interruption(self, stage: str, asked: bool) -> PreemptedError:
        """What is kept, and how it goes on."""
        key = self.journal.record.stages[stage].key
        step = newest_checkpoint(self.store, stage, key) if key and STAGES[stage].has_checkpoints else None
        kept = [name for name in SEQUENCE if name in self.made]
        kept += [f"{stage}'s checkpoint at step {step}"] if step is not None and stage not in self.made else []
        text = f"in {stage}; kept: {', '.join(kept) or 'nothing yet'}; the same command goes on from there"
        if asked:
            return InterruptedRunError(f"interrupted {text}")
        return PreemptedError(f"stopped from outside {text}")

    def _end(self, stage: str, state: str, error: LlamaRefineError) -> LlamaRefineError:
        """Write down how the run ended; the error, with the stage's name before it."""
        shown = str(error) if isinstance(error, PreemptedError) else _named(stage, str(error))
        with contextlib.suppress(StoreError):  # an outage that ends a run keeps its record from being written, too
            if stage not in self.made:
                self.journal.stage(stage, retry=False, state=state, finished_at=datetime.now(UTC), error=shown)
            self.journal.run(retry=False, state=state, error=shown)
        return type(error)(shown)


class StageLog:
    """A stage's log of a run. In a folder it grows line by line; into a bucket it goes now and then, and when closed.

    There its last line says up to when the pod's log was read, so that whoever goes on neither loses nor repeats a
    line: both are one object. A driver may vanish together with the pod, and then no more is left than what was kept.
    """

    def __init__(self, store: Store, run: str, stage: str) -> None:
        self.path = run_path(run, "logs", f"{stage}.log")
        self.read_to: str | None = None
        self.sha256: str | None = None  # once it is closed and kept
        self._store = store
        self._kept_s = time.monotonic()
        self._folder = tempfile.TemporaryDirectory(prefix="llamarefine-log-")

    def __enter__(self) -> Self:
        if local := self._store.objects.local_path(self.path):
            self._store.write(self.path, self._store.read(self.path) or b"")
            self.file = local
        else:
            self.file = Path(self._folder.name, "log")
            with self.file.open("wb") as into:
                self._store.objects.download(self.path, into, lambda chunk: None)
            self._cut_mark()
        self._lines = self.file.open("a", encoding="utf-8", buffering=1)
        return self

    def write(self, line: str, read_to: str | None = None) -> None:
        """Add a line, and up to when the log it came from was read."""
        self._lines.write(f"{line}\n")
        self.read_to = read_to
        if time.monotonic() - self._kept_s > _KEEP_EVERY_S:
            self._keep()
            self._kept_s = time.monotonic()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._store.objects.root:
            self._lines.close()
            self.sha256 = file_sha256(self.file)
        else:
            self._lines.write(self._mark())
            self._lines.close()
            # What ended the stage is to be told, not that its log could not be kept.
            with contextlib.suppress(*((StoreError,) if kind else ())):
                self._store.objects.upload(self.path, self.file, lambda chunk: None)
                self.sha256 = file_sha256(self.file)
        self._folder.cleanup()

    def _keep(self) -> None:
        """Bring what there is to the bucket; where that does not go now, the next time will."""
        if self._store.objects.root or self.file.stat().st_size > _KEEP_AT_MOST_BYTES:
            return
        with contextlib.suppress(LlamaRefineError):
            self._store.write(self.path, self.file.read_bytes() + self._mark().encode(), retry=False)

    def _mark(self) -> str:
        return f"{READ_TO}{self.read_to}\n" if self.read_to else ""

    def _cut_mark(self) -> None:
        """Take the last line for what it is."""
        with self.file.open("r+b") as log:
            size_bytes = log.seek(0, 2)
            log.seek(max(0, size_bytes - _MARK_BYTES))
            *_, last = log.read().splitlines(keepends=True) or [b""]
            if last.startswith(READ_TO.encode()):
                self.read_to = last[len(READ_TO) :].decode(errors="replace").strip()
                log.truncate(size_bytes - len(last))


class _Signals:
    """SIGINT, SIGTERM and SIGHUP go to the stage that runs; where none does, they are a KeyboardInterrupt."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.asked = False

    def __enter__(self) -> Self:
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        self._before = {number: signal.signal(number, self._on_signal) for number in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if not self._executor.cancel():
            raise KeyboardInterrupt

    def check(self) -> None:
        """Stop before the next stage: the signal came when the last one was all but done."""
        if self.asked:
            raise KeyboardInterrupt


def publish_report(store: Store, run: str, evaluate: Manifest) -> Report:
    """Copy the report of an evaluation, verified, into the run's folder."""
    with tempfile.TemporaryDirectory(prefix="llamarefine-report-") as folder:
        fetched = store.fetch(evaluate, Path(folder, "report"), *STAGES["evaluate"].writes)
        for name in STAGES["evaluate"].writes:
            store.write(run_path(run, "report", name), (fetched / name).read_bytes())
    return read_report(store, run)


def _named(stage: str, text: str) -> str:
    return text if text.startswith((f"{stage} ", f"{stage}: ")) else f"{stage}: {text}"
