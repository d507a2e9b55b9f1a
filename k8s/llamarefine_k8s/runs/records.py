"""The record of a run, ``runs/<run>/run.json``: written by whoever drives the run, read by anybody.

A record says how a run went, never what is there: that is the artifacts' own business. So a lost or
stale record costs nothing but its story.
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
_SEAL = "record_sha256"
PROGRESS_S = 2.0  # progress is written so often at most
HEARTBEAT_S = 15.0  # and something so often at least, which proves that the driver lives
STALE_S = 90.0
_NAME = re.compile(r"[a-z0-9-]+")
_READERS = 8
DRIVER_JOB = "LLAMAREFINE_DRIVER_JOB"  # the Job that this process is a pod of, where it drives inside a cluster


class StageRecord(BaseModel):
    """How one stage of a run went."""

    state: Literal["pending", "running", "reused", "done", "failed", "interrupted"] = "pending"
    key: Sha256 | None = None
    attempts: int = 0
    started_at: datetime | None = None
    finished_at: datetime | None = None
    progress: Progress | None = None
    error: str | None = None
    log: str | None = None
    log_sha256: Sha256 | None = None  # once the stage is over


class Driver(BaseModel):
    """The process that drives a run."""

    pid: int
    host: str

    @classmethod
    def this_process(cls) -> Self:
        """The one that asks. A pod of a driver Job is the same driver as the pod before it."""
        job = os.environ.get(DRIVER_JOB)
        return cls(pid=1, host=job) if job else cls(pid=os.getpid(), host=platform.node())


class RunRecord(BaseModel):
    """How a run went, or goes."""

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
        """Whether its driver is alive: it wrote lately, and where it ran here its process is there."""
        if self.state != "running" or (datetime.now(UTC) - self.updated_at).total_seconds() > STALE_S:
            return False
        return self.driver.host != platform.node() or _is_alive(self.driver.pid)

    def to_bytes(self) -> bytes:
        """The record as it lies in the store, its own digest as the last key."""
        return add_self_digest(self.model_dump_json(indent=2), _SEAL)

    def own_recipe(self) -> Recipe:
        """The recipe as it was pinned; IntegrityError where it is none of this version's."""
        try:
            return Recipe.model_validate(self.recipe)
        except ValidationError as error:
            raise IntegrityError(
                f"{self.run}: its recorded recipe is none of this version: {error.errors()[0]['msg']}"
            ) from None

    def settled(self) -> "RunRecord":
        """This record, its state `interrupted` where it says `running` and nobody drives it any more."""
        if self.state != "running" or self.is_driven:
            return self
        stages = {
            name: stage.model_copy(update={"state": "interrupted"}) if stage.state == "running" else stage
            for name, stage in self.stages.items()
        }
        return self.model_copy(update={"state": "interrupted", "stages": stages})


def run_id(recipe: Recipe) -> str:
    """The run of a pinned recipe: the same recipe on the same version is the same run."""
    payload = json.dumps({"recipe": recipe.model_dump(mode="json"), "package_version": __version__}, sort_keys=True)
    return f"{recipe.name}-{hashlib.sha256(payload.encode()).hexdigest()[:8]}"


def find(store: Store, name: str | None) -> RunRecord:
    """The run that `name` begins, the newest without a name. RecipeError where there is none or more than one."""
    if name and _NAME.fullmatch(name) and (exact := load(store, name)):
        return exact
    found = newest_names(store, name or "")
    if name and len(found) > 1:
        raise RecipeError(f"`{name}` begins {len(found)} runs: {', '.join(found[:5])}; give more of the name")
    for run in found:
        with contextlib.suppress(*([] if name else [IntegrityError])):  # of one that is asked for it is to be told
            if record := load(store, run):
                return record
    names = newest_names(store) if name else found
    if not names:
        raise RecipeError(f"{store.uri} holds no runs yet; `llamarefine run RECIPE` makes one (another store: --store)")
    raise RecipeError(f"{store.uri} holds no run{f' `{name}`' if name else ''}; its newest are {', '.join(names[:5])}")


def find_first(store: Store, words: Sequence[str]) -> tuple[RunRecord, tuple[str, ...]]:
    """The run that the first word names, and the other words; the newest run and all words where it names none."""
    if words and _NAME.fullmatch(words[0]):
        names_one = len(newest_names(store, words[0])) == 1
        if names_one or re.search(r"-[0-9a-f]{8}$", words[0]):
            return find(store, words[0]), tuple(words[1:])
    return find(store, None), tuple(words)


def newest_names(store: Store, beginning: str = "") -> list[str]:
    """The names of all runs that begin so, the one last driven first. One listing; no record is read."""
    if beginning and not _NAME.fullmatch(beginning):
        return []
    written = {
        parts[1]: entry.modified_at or datetime.min.replace(tzinfo=UTC)
        for entry in store.entries(f"runs/{beginning}")
        if len(parts := entry.path.split("/")) == 3 and parts[2] == RECORD
    }
    return sorted(written, key=lambda run: written[run], reverse=True)


def all_runs(store: Store, *, beginning: str = "", limit: int | None = None) -> list[RunRecord]:
    """Every run whose record can be read, as it stands now, the one last driven first; the newest `limit` of them."""

    def load_readable(run: str) -> RunRecord | None:
        with contextlib.suppress(IntegrityError):
            return load(store, run)
        return None

    with ThreadPoolExecutor(_READERS) as pool:
        records = [record for record in pool.map(load_readable, newest_names(store, beginning)[:limit]) if record]
    return sorted(records, key=lambda record: record.updated_at, reverse=True)


def load(store: Store, run: str) -> RunRecord | None:
    """The record of a run as it stands now, or None; IntegrityError where it cannot be read, or a byte was changed."""
    data = store.read(run_path(run, RECORD))
    if data is None:
        return None
    place = where(store, run_path(run, RECORD))
    try:
        record = RunRecord.model_validate_json(read_self_digest(data, _SEAL) or data)
    except ValidationError:
        raise IntegrityError(f"{place}: is no run record of this version") from None
    except ValueError as error:
        raise IntegrityError(f"{place}: {error}; run the recipe again: the record is written anew") from None
    if record.run != run:
        raise IntegrityError(f"{place}: is the record of another run, {record.run}")
    return record.settled()


def has_valid_digest(store: Store, run: str) -> bool:
    """Whether the record says by itself that no byte of it was changed."""
    with contextlib.suppress(ValueError):
        return read_self_digest(store.read(run_path(run, RECORD)) or b"", _SEAL) is not None
    return False


def where(store: Store, path: str) -> str:
    """Where an object lies, as a person types it: a path, from here where it is below, or the bucket's URI.

    The path "." is the store itself.
    """
    if not store.objects.root:
        return store.uri if path == "." else f"{store.uri}/{path}"
    place = store.objects.root / path
    return os.path.relpath(place) if place.is_relative_to(os.getcwd()) else str(place)


class Journal:
    """The writer of a run's record while it is driven.

    Each change is written at once, progress within PROGRESS_S, and every HEARTBEAT_S a sign of life.
    `on_change` is called with the record after each change, in the caller's thread.
    """

    def __init__(self, store: Store, recipe: Recipe, on_change: Callable[[RunRecord], None]) -> None:
        now = datetime.now(UTC)
        run = run_id(recipe)
        self._store = store
        self._before = self._earlier(run)
        self.record = RunRecord(
            run=run,
            created_at=self._before.created_at if self._before else now,
            updated_at=now,
            driver=Driver.this_process(),
            # What an earlier driver left stays in sight: this one may be killed before it comes so far.
            stages={name: self._left(name) or self._known(name) for name in SEQUENCE},
            recipe=recipe.model_dump(mode="json"),
        )
        self._on_change = on_change
        self._changing = threading.RLock()
        self._writing = threading.Lock()  # apart: an outage shall not keep the run from going on
        self._closed = threading.Event()
        self._unwritten = False
        self._written_at_s = 0.0
        self._heart = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Self:
        if self._before is None and not self._store.objects.create(self._path, self._data()):
            self._before = self._earlier(self.record.run)  # another driver was a moment earlier
        self.run()
        self._heart.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._closed.set()
        self._heart.join()

    def was_left(self, stage: str, key: str) -> bool:
        """Whether an earlier driver began this very stage and did not live to write down its end."""
        there = self._left(stage)
        return there is not None and there.key == key

    def run(self, *, retry: bool = True, **changes: Any) -> None:
        """Change and write the run's own fields; where not `retry`, StoreError at once in an outage."""
        with self._changing:
            self.record = self.record.model_copy(update=changes)
        self._write(retry=retry)
        self._on_change(self.record)

    def stage(self, name: str, *, retry: bool = True, **changes: Any) -> None:
        """Change and write a stage's fields; where not `retry`, StoreError at once in an outage."""
        with self._changing:
            self._update(name, changes)
        self._write(retry=retry)
        self._on_change(self.record)

    def log_ends(self, name: str, sha256: str | None) -> None:
        """Take note of the log of a stage that is over; it is written with how the stage ended."""
        with self._changing:
            self._update(name, {"log_sha256": sha256})
            self._unwritten = True

    def progress(self, name: str, progress: Progress) -> None:
        """Take note of a stage's progress; it is written soon."""
        with self._changing:
            self._update(name, {"progress": progress})
            self._unwritten = True
        self._on_change(self.record)

    @property
    def _path(self) -> str:
        return run_path(self.record.run, RECORD)

    def _left(self, stage: str) -> StageRecord | None:
        """The record of a stage that an earlier driver did not see end."""
        there = self._before.stages.get(stage) if self._before else None
        if there is None or there.state not in ("running", "interrupted"):
            return None
        return there.model_copy(update={"state": "interrupted"})

    def _known(self, stage: str) -> StageRecord:
        """What an earlier driver made or found: gc shall not miss it before this one has found it again."""
        there = self._before.stages.get(stage) if self._before else None
        return StageRecord(key=there.key, log=there.log, log_sha256=there.log_sha256) if there else StageRecord()

    def _earlier(self, run: str) -> RunRecord | None:
        """What an earlier driver wrote; LlamaRefineError where it still drives."""
        before = None
        with contextlib.suppress(IntegrityError):
            before = load(self._store, run)
        if before and before.is_driven and before.driver != Driver.this_process():
            raise LlamaRefineError(
                f"{run} is being driven already, by process {before.driver.pid} on {before.driver.host}; "
                f"`llamarefine status {run}` shows how far it is"
            )
        return before

    def _update(self, name: str, changes: dict[str, Any]) -> None:
        stages = self.record.stages | {name: self.record.stages[name].model_copy(update=changes)}
        self.record = self.record.model_copy(update={"stages": stages})

    def _data(self) -> bytes:
        """The record as it now stands, with the time of now."""
        with self._changing:
            self._unwritten = False
            self.record = self.record.model_copy(update={"updated_at": datetime.now(UTC)})
            return self.record.to_bytes()

    def _write(self, *, retry: bool) -> None:
        with self._writing:
            self._store.write(self._path, self._data(), retry=retry)
            self._written_at_s = time.monotonic()

    def _beat(self) -> None:
        while not self._closed.wait(PROGRESS_S):
            if self._writing.locked():
                continue
            if self._unwritten or time.monotonic() - self._written_at_s > HEARTBEAT_S:
                with contextlib.suppress(LlamaRefineError):  # the next change meets the same trouble and says so
                    self._write(retry=False)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
