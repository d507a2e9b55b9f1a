"""The record of a run, ``runs/<run>/run.json``: written by the process that drives the run, read by all commands.

A record describes how a run went. Whether an artifact exists is decided by its manifest alone, so a lost or stale
record loses only that description.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Literal, Self

from pydantic import BaseModel, Field, ValidationError

from llamarefine_jobs.contract.artifact import Sha256, run_path
from llamarefine_jobs.contract.errors import IntegrityError, LlamaRefineError, RecipeError
from llamarefine_jobs.contract.progress import Progress
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.self_digest import add_self_digest, read_self_digest
from llamarefine_jobs.contract.stages import SEQUENCE
from llamarefine_jobs.contract.version import __version__
from llamarefine_jobs.store import Store

RECORD = "run.json"
_DIGEST = "record_sha256"
PROGRESS_S = 2.0  # the shortest time between two writes of progress
HEARTBEAT_S = 15.0  # the longest time without a write while the driver is alive
STALE_S = 90.0  # a running record that is older has no living driver
_NAME = re.compile(r"[a-z0-9-]+")
_READERS = 8
# Name and uid of the driver Job, and the run that it was created for, set in its pods.
DRIVER_JOB, DRIVER_UID = "LLAMAREFINE_DRIVER_JOB", "LLAMAREFINE_DRIVER_UID"
DRIVER_RUN = "LLAMAREFINE_DRIVER_RUN"


class StageRecord(BaseModel):
    """State and outcome of one stage of a run."""

    state: Literal["pending", "running", "reused", "done", "failed", "interrupted"] = "pending"
    key: Sha256 | None = None
    attempts: int = 0
    started_at: datetime | None = None
    finished_at: datetime | None = None
    progress: Progress | None = None
    error: str | None = None
    log: str | None = None
    log_sha256: Sha256 | None = None  # set when the stage has ended


class Driver(BaseModel):
    """The process that drives a run."""

    pid: int
    host: str

    @classmethod
    def this_process(cls) -> Self:
        """Return this process as a driver. All pods of one driver Job count as the same driver."""
        job = os.environ.get(DRIVER_JOB)
        return cls(pid=1, host=job) if job else cls(pid=os.getpid(), host=platform.node())


class RunRecord(BaseModel):
    """State of a run and of its stages, with the pinned recipe that it runs."""

    format: Literal[1] = 1
    run: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    state: Literal["running", "done", "failed", "interrupted"] = "running"
    error: str | None = None
    gates_passed: bool | None = None
    package_version: str = __version__
    created_at: datetime
    updated_at: datetime
    driver: Driver
    stages: dict[str, StageRecord] = {}
    recipe: dict[str, Any]

    @property
    def is_driven(self) -> bool:
        """Whether its driver is alive: it wrote within STALE_S and, if it is on this machine, its process exists."""
        if self.state != "running" or (datetime.now(UTC) - self.updated_at).total_seconds() > STALE_S:
            return False
        return self.driver.host != platform.node() or _is_alive(self.driver.pid)

    def to_bytes(self) -> bytes:
        """Return the record as JSON with its own digest as the last key, as it is stored."""
        return add_self_digest(self.model_dump_json(indent=2), _DIGEST)

    def own_recipe(self) -> Recipe:
        """Return the recipe that the run was started with; IntegrityError if this version cannot read it."""
        try:
            return Recipe.model_validate(self.recipe)
        except ValidationError as error:
            raise IntegrityError(
                f"{self.run}: this version cannot read its recorded recipe: {error.errors()[0]['msg']}"
            ) from None

    def without_dead_driver(self) -> "RunRecord":
        """Return this record, with `interrupted` in place of `running` if its driver is no longer alive."""
        if self.state != "running" or self.is_driven:
            return self
        stages = {
            name: stage.model_copy(update={"state": "interrupted"}) if stage.state == "running" else stage
            for name, stage in self.stages.items()
        }
        return self.model_copy(update={"state": "interrupted", "stages": stages})


def run_id(recipe: Recipe) -> str:
    """Return the run's name for a pinned recipe. The same recipe and package version give the same name."""
    payload = json.dumps({"recipe": recipe.model_dump(mode="json"), "package_version": __version__}, sort_keys=True)
    return f"{recipe.name}-{hashlib.sha256(payload.encode()).hexdigest()[:8]}"


def find(store: Store, name: str | None) -> RunRecord:
    """Return the run whose name begins with `name`, or the newest run without a name.

    Raises RecipeError if no run or more than one matches, IntegrityError if the record of the named run is damaged.
    Without a name, damaged records are skipped.
    """
    if name and _NAME.fullmatch(name) and (exact := load(store, name)):
        return exact
    found = newest_names(store, name or "")
    if name and len(found) > 1:
        raise RecipeError(f"`{name}` begins {len(found)} runs: {', '.join(found[:5])}; give more of the name")
    for run in found:
        with contextlib.suppress(*([] if name else [IntegrityError])):  # a run that was named must report its damage
            if record := load(store, run):
                return record
    names = newest_names(store) if name else found
    if not names:
        raise RecipeError(f"{store.uri} holds no runs yet; `llamarefine run RECIPE` makes one (another store: --store)")
    raise RecipeError(f"{store.uri} holds no run{f' `{name}`' if name else ''}; its newest are {', '.join(names[:5])}")


def find_first(store: Store, words: Sequence[str]) -> tuple[RunRecord, tuple[str, ...]]:
    """Return the run that the first word names and the other words; if it names none, the newest run and all words."""
    if words and _NAME.fullmatch(words[0]):
        names_one = len(newest_names(store, words[0])) == 1
        if names_one or re.search(r"-[0-9a-f]{8}$", words[0]):
            return find(store, words[0]), tuple(words[1:])
    return find(store, None), tuple(words)


def newest_names(store: Store, beginning: str = "") -> list[str]:
    """Return the names of all runs with this beginning, the last written first. Lists once; reads no record."""
    if beginning and not _NAME.fullmatch(beginning):
        return []
    written = {
        parts[1]: entry.modified_at or datetime.min.replace(tzinfo=UTC)
        for entry in store.entries(f"runs/{beginning}")
        if len(parts := entry.path.split("/")) == 3 and parts[2] == RECORD
    }
    return sorted(written, key=lambda run: written[run], reverse=True)


def all_runs(store: Store, *, beginning: str = "", limit: int | None = None) -> list[RunRecord]:
    """Return the records of the newest `limit` runs (all without a limit), the last written first.

    Records that cannot be read are left out.
    """

    def load_readable(run: str) -> RunRecord | None:
        with contextlib.suppress(IntegrityError):
            return load(store, run)
        return None

    with ThreadPoolExecutor(_READERS) as pool:
        records = [record for record in pool.map(load_readable, newest_names(store, beginning)[:limit]) if record]
    return sorted(records, key=lambda record: record.updated_at, reverse=True)


def load(store: Store, run: str) -> RunRecord | None:
    """Return the record of a run, `interrupted` if its driver died; None if there is none.

    Raises IntegrityError if it cannot be read, or if it does not match its own digest.
    """
    data = store.read(run_path(run, RECORD))
    if data is None:
        return None
    place = where(store, run_path(run, RECORD))
    try:
        record = RunRecord.model_validate_json(read_self_digest(data, _DIGEST) or data)
    except ValidationError:
        raise IntegrityError(f"{place}: is not a run record of this version") from None
    except ValueError as error:
        raise IntegrityError(f"{place}: {error}; run the recipe again to rewrite the record") from None
    if record.run != run:
        raise IntegrityError(f"{place}: is the record of another run, {record.run}")
    return record.without_dead_driver()


def has_valid_digest(store: Store, run: str) -> bool:
    """Whether the stored record has a digest of its own and matches it."""
    with contextlib.suppress(ValueError):
        return read_self_digest(store.read(run_path(run, RECORD)) or b"", _DIGEST) is not None
    return False


def where(store: Store, path: str) -> str:
    """Return where an object is, for a user to open: its URI in a bucket, or its path in a folder.

    The path is relative to the working directory if it is below it. The path "." stands for the store itself.
    """
    if not store.objects.root:
        return store.uri if path == "." else f"{store.uri}/{path}"
    place = store.objects.root / path
    return os.path.relpath(place) if place.is_relative_to(os.getcwd()) else str(place)


class RecordWriter:
    """Writes the record of a run while it is driven.

    Each change is written at once, progress within PROGRESS_S. Every HEARTBEAT_S the record is written even if nothing
    changed. `on_change` is called with the record after each change, in the caller's thread.
    """

    def __init__(self, store: Store, recipe: Recipe, on_change: Callable[[RunRecord], None]) -> None:
        now = datetime.now(UTC)
        run = run_id(recipe)
        self._store = store
        self._before = self._read_earlier(run)
        self.record = RunRecord(
            run=run,
            created_at=self._before.created_at if self._before else now,
            updated_at=now,
            driver=Driver.this_process(),
            # Keep what an earlier driver recorded: this one may be killed before it reaches that stage.
            stages={name: self._unfinished(name) or self._with_known_key(name) for name in SEQUENCE},
            recipe=recipe.model_dump(mode="json"),
        )
        self._on_change = on_change
        self._changing = threading.RLock()
        self._writing = threading.Lock()  # separate: a write that is retried during an outage must not block the run
        self._closed = threading.Event()
        self._unwritten = False
        self._written_at_s = 0.0
        self._heartbeat = threading.Thread(target=self._write_regularly, daemon=True)

    def __enter__(self) -> Self:
        if self._before is None and not self._store.objects.create(self._path, self._data()):
            self._before = self._read_earlier(self.record.run)  # another driver was faster
        self.run()
        self._heartbeat.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._closed.set()
        self._heartbeat.join()

    def was_left_running(self, stage: str, key: str) -> bool:
        """Whether an earlier driver started this stage with this key and died before it recorded the end."""
        left = self._unfinished(stage)
        return left is not None and left.key == key

    def run(self, *, retry: bool = True, **changes: Any) -> None:
        """Change the run's own fields and write the record. Without `retry`, an outage raises StoreError at once."""
        with self._changing:
            self.record = self.record.model_copy(update=changes)
        self._write(retry=retry)
        self._on_change(self.record)

    def stage(self, name: str, *, retry: bool = True, **changes: Any) -> None:
        """Change a stage's fields and write the record. Without `retry`, an outage raises StoreError at once."""
        with self._changing:
            self._update(name, changes)
        self._write(retry=retry)
        self._on_change(self.record)

    def log_digest(self, name: str, sha256: str | None) -> None:
        """Record the digest of an ended stage's log; the write of the stage's final state includes it."""
        with self._changing:
            self._update(name, {"log_sha256": sha256})
            self._unwritten = True

    def progress(self, name: str, progress: Progress) -> None:
        """Record a stage's progress; it is written within PROGRESS_S."""
        with self._changing:
            self._update(name, {"progress": progress})
            self._unwritten = True
        self._on_change(self.record)

    @property
    def _path(self) -> str:
        return run_path(self.record.run, RECORD)

    def _unfinished(self, stage: str) -> StageRecord | None:
        """Return the record of a stage that an earlier driver started but did not see end."""
        earlier = self._before.stages.get(stage) if self._before else None
        if earlier is None or earlier.state not in ("running", "interrupted"):
            return None
        return earlier.model_copy(update={"state": "interrupted"})

    def _with_known_key(self, stage: str) -> StageRecord:
        """Return a pending stage with the key and log of an earlier driver, so that gc keeps its artifact meanwhile."""
        earlier = self._before.stages.get(stage) if self._before else None
        if earlier is None:
            return StageRecord()
        return StageRecord(key=earlier.key, log=earlier.log, log_sha256=earlier.log_sha256)

    def _read_earlier(self, run: str) -> RunRecord | None:
        """Return the record of an earlier driver; LlamaRefineError if that driver is still alive."""
        before = None
        with contextlib.suppress(IntegrityError):
            before = load(self._store, run)
        if before and before.is_driven and before.driver != Driver.this_process():
            raise LlamaRefineError(
                f"{run} is already being driven by process {before.driver.pid} on {before.driver.host}; "
                f"`llamarefine status {run}` shows its progress"
            )
        return before

    def _update(self, name: str, changes: dict[str, Any]) -> None:
        stages = self.record.stages | {name: self.record.stages[name].model_copy(update=changes)}
        self.record = self.record.model_copy(update={"stages": stages})

    def _data(self) -> bytes:
        """Return the current record as bytes, with updated_at set to now."""
        with self._changing:
            self._unwritten = False
            self.record = self.record.model_copy(update={"updated_at": datetime.now(UTC)})
            return self.record.to_bytes()

    def _write(self, *, retry: bool) -> None:
        with self._writing:
            self._store.write(self._path, self._data(), retry=retry)
            self._written_at_s = time.monotonic()

    def _write_regularly(self) -> None:
        while not self._closed.wait(PROGRESS_S):
            if self._writing.locked():
                continue
            if self._unwritten or time.monotonic() - self._written_at_s > HEARTBEAT_S:
                with contextlib.suppress(LlamaRefineError):  # the next change retries, and reports the error
                    self._write(retry=False)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
