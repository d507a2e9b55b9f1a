"""What a run leaves: its report read, its model and adapters brought to a folder of this machine."""

import contextlib
import errno
import fcntl
import html
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field, ValidationError

from llamarefine_jobs.contract.artifact import MANIFEST, Manifest, run_path
from llamarefine_jobs.contract.errors import DataError, GateError, IntegrityError, from_os_error
from llamarefine_jobs.contract.stages import STAGES
from llamarefine_jobs.sources.fingerprints import file_sha256
from llamarefine_jobs.store import Store
from llamarefine_jobs.untrusted.remote_code import refuse_programs
from llamarefine_k8s.runs.records import RunRecord, where

# What `pull` brings: the stage that made it, and its folder there ("" is the artifact itself).
PARTS = {
    "model": ("merge", "model/"),
    "sft": ("sft", "adapter/"),
    "dpo": ("dpo", "adapter/"),
    "report": ("evaluate", ""),
}
_OLD = "old"
REPORTS = STAGES["evaluate"].writes

Model = Literal["base", "sft", "merged"]


class Interval(BaseModel):
    """A measured value and where it may truly lie; no `low` and `high` where too few test rows allow no interval."""

    value: float
    low: float | None = None
    high: float | None = None


class Change(Interval):
    """From one model to another."""

    source: Model = Field(alias="from")
    target: Model = Field(alias="to")
    verdict: str


class Metric(BaseModel):
    """One line of the comparison."""

    name: str
    title: str
    better: Literal["lower", "higher"] | None = None
    digits: int = 3
    n: int
    values: dict[Model, Interval | None]
    changes: list[Change] = []
    note: str | None = None


class Example(BaseModel):
    """A held-out question, and what each model answers."""

    question: str
    reference: str
    answers: dict[Model, str]


class GateResult(BaseModel):
    """A quality gate of the recipe, measured."""

    metric: str
    model: Model
    bound: str
    value: float
    passed: bool


class Report(BaseModel):
    """As much of report.json as the launcher shows."""

    models: list[Model]
    metrics: list[Metric]
    examples: list[Example] = []
    gates: list[GateResult] = []
    confidence: float
    caveats: list[str] = []


def read_report(store: Store, run: str) -> Report:
    """The comparison that a finished run ended with."""
    path = run_path(run, "report", "report.json")
    data = store.read(path)
    if data is None:
        raise DataError(f"{run} has no report yet; `llamarefine status {run}` shows how far it is")
    try:
        return Report.model_validate_json(data)
    except ValidationError as error:
        raise IntegrityError(
            f"{where(store, path)}: is no report of this version: {error.errors()[0]['msg']}"
        ) from None


def check_gates(report: Report) -> None:
    """Raise GateError where a quality gate of the recipe does not hold."""
    failed = [
        f"{gate.metric} of {gate.model} is {gate.value:.4g}, not {_words(gate)}"
        for gate in report.gates
        if not gate.passed
    ]
    if failed:
        raise GateError(f"quality gate: {'; '.join(failed)}; model and report are kept")


def _words(gate: GateResult) -> str:
    return gate.bound.replace("_", " ")


def report_text(store: Store, run: str) -> str:
    """The report as Markdown."""
    data = store.read(run_path(run, "report", "report.md"))
    if data is None:
        raise DataError(f"{run} has no report yet; `llamarefine status {run}` shows how far it is")
    return data.decode(errors="replace")


def report_page(store: Store, run: str) -> Path:
    """The report as a page on this machine.

    From a bucket it comes into a temporary folder, inside a frame that runs no script, opens no window and asks for
    nothing: the page asks for none of that, but whoever may write the bucket may have put another one there.
    """
    path = run_path(run, "report", "report.html")
    place = Path(where(store, path))
    if place.exists():
        return place
    data = store.read(path)
    if data is None:
        raise DataError(f"{run} has no report yet; `llamarefine status {run}` shows how far it is")
    page = Path(tempfile.mkdtemp(prefix="llamarefine-"), f"{run}.html")
    page.write_text(_FRAME.format(run=run, page=html.escape(data.decode(errors="replace"))), encoding="utf-8")
    return page


_FRAME = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{run} – LlamaRefine report</title>
<style>body {{ margin: 0 }} iframe {{ border: 0; width: 100vw; height: 100vh; display: block }}</style></head>
<body><iframe sandbox title="report" srcdoc="{page}"></iframe></body></html>
"""


def part_of(store: Store, record: RunRecord, what: str) -> Manifest:
    """The manifest of the artifact that holds `what` of a run."""
    stage = PARTS[what][0]
    key = record.stages[stage].key if stage in record.stages else None
    manifest = store.manifest(stage, key) if key else None
    if manifest is None:
        raise DataError(
            f"{record.run} has no {what} yet: {stage} is not done; `llamarefine status {record.run}` shows more"
        )
    return manifest


def part_place(store: Store, manifest: Manifest, what: str) -> str:
    """Where `what` lies in the store."""
    return where(store, f"{manifest.folder}/{PARTS[what][1]}".rstrip("/"))


def pull(store: Store, manifest: Manifest, what: str, into: Path, *, force: bool = False) -> None:
    """Bring `what` of an artifact to the folder `into`, each byte verified, all at once or not at all.

    A folder that is there is replaced only where nothing is lost: it is empty, or holds exactly an artifact of
    this store, or `force` says so. DataError otherwise, IntegrityError where it is one but for some bytes; then
    nothing is changed. A pull that was killed is made good by the next one: what it had moved away is put back.
    """
    into = into.absolute()
    with _os_errors(), _work_folder(into) as folder:
        here = check_replaceable(store, what, into, force=force)
        if here is not None and here == _listing(manifest, what):
            return
        fetched = store.fetch(manifest, folder / "new", *([PARTS[what][1]] if PARTS[what][1] else []))
        if what != "report":
            refuse_programs(fetched / PARTS[what][1])
        if into.exists():
            into.rename(folder / _OLD)
        (fetched / PARTS[what][1]).rename(into)


@contextlib.contextmanager
def _work_folder(into: Path) -> Iterator[Path]:
    """A folder beside `into` that one pull has at a time, always of the same name: what a killed one left is found."""
    folder = into.with_name(f".{into.name}.pulling")
    lock = _locked(folder, into)
    try:
        _tidy(folder, into)
        yield folder
    finally:
        _tidy(folder, into)
        folder.rmdir()
        os.close(lock)


def _locked(folder: Path, into: Path) -> int:
    """The folder, made where it is missing, opened and locked until it is closed or this process ends."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            return lock  # of a file system that has no locks
        os.close(lock)
        raise DataError(f"{into}: another pull is bringing something there; wait until it is done") from None
    return lock


def _tidy(folder: Path, into: Path) -> None:
    """Put back what was moved away and not replaced, and remove the rest."""
    old = folder / _OLD
    if old.exists() and not into.exists():
        old.rename(into)
    for left in folder.iterdir():
        shutil.rmtree(left)


def pull_report(store: Store, manifest: Manifest, into: Path) -> None:
    """Bring the three files of a report into a folder that may hold other things, each verified, then renamed."""
    with _os_errors():
        into.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".report-", dir=into) as folder:
            fetched = store.fetch(manifest, Path(folder, secrets.token_hex(4)), *REPORTS)
            for name in REPORTS:
                os.replace(fetched / name, into / name)


def check_replaceable(store: Store, what: str, into: Path, *, force: bool = False) -> "dict[str, str] | None":
    """Refuse a folder that `pull` would not replace; what it holds, sha256 by path, where there is one."""
    with _os_errors():
        if not into.exists():
            return None
        if not into.is_dir():
            raise DataError(f"{into}: expected a folder, found a file; choose another place")
        holds = {
            path.relative_to(into).as_posix(): file_sha256(path) for path in sorted(into.rglob("*")) if path.is_file()
        }
    if force or not holds:
        return holds
    others = []
    for manifest in _artifacts(store, PARTS[what][0]):
        listing = _listing(manifest, what)
        if holds == listing:
            return holds
        if holds.keys() == listing.keys():
            others.append([path for path in holds if holds[path] != listing[path]])
    changed = min(others, key=len, default=[])
    if 0 < len(changed) < len(holds):
        raise IntegrityError(
            f"{into}: {', '.join(changed[:3])} changed since it was brought there, or was damaged; choose another "
            "folder, or replace it by --force"
        )
    raise DataError(
        f"{into}: holds files that are not from this store; choose another folder, or replace it by --force"
    )


def _artifacts(store: Store, stage: str) -> Iterator[Manifest]:
    for entry in store.entries(f"artifacts/{stage}/"):
        _, _, key, *rest = entry.path.split("/")
        if rest == [MANIFEST]:
            with contextlib.suppress(IntegrityError):  # of one that nobody asked for
                if manifest := store.manifest(stage, key):
                    yield manifest


def _listing(manifest: Manifest, what: str) -> dict[str, str]:
    """sha256 by path, as `what` of the artifact lies in a folder of its own."""
    folder = PARTS[what][1]
    return {file.path[len(folder) :]: file.sha256 for file in manifest.part(*([folder] if folder else []))}


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise from_os_error(error) from None
