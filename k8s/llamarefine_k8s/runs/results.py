"""Results of a run: read its report, and copy its model, adapters and report to folders on this machine."""

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
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, Field, ValidationError

from llamarefine_jobs.contract.artifact import MANIFEST, Manifest, run_path
from llamarefine_jobs.contract.errors import DataError, GateError, IntegrityError, from_os_error
from llamarefine_jobs.contract.stages import STAGES
from llamarefine_jobs.sources.fingerprints import file_sha256
from llamarefine_jobs.store import Store
from llamarefine_jobs.untrusted.remote_code import refuse_programs
from llamarefine_k8s.runs import provenance
from llamarefine_k8s.runs.records import RunRecord, where

if TYPE_CHECKING:
    from llamarefine_k8s.runs.signing import PublicKey

# What `pull` copies: the stage whose artifact holds it, and its folder there ("" is the whole artifact).
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
    """A measured value and its confidence interval; without `low` and `high` if there are too few test rows."""

    value: float
    low: float | None = None
    high: float | None = None


class Change(Interval):
    """The change of a metric from one model to another, with the verdict."""

    source: Model = Field(alias="from")
    target: Model = Field(alias="to")
    verdict: str


class Metric(BaseModel):
    """One metric of the comparison: its value for each model, and the changes between models."""

    name: str
    title: str
    better: Literal["lower", "higher"] | None = None
    digits: int = 3
    n: int
    values: dict[Model, Interval | None]
    changes: list[Change] = []
    note: str | None = None


class Example(BaseModel):
    """A held-out question, its reference answer, and each model's answer."""

    question: str
    reference: str
    answers: dict[Model, str]


class GateResult(BaseModel):
    """A quality gate of the recipe, with the measured value."""

    metric: str
    model: Model
    bound: str
    value: float
    passed: bool


class Report(BaseModel):
    """The part of report.json that the launcher shows."""

    models: list[Model]
    metrics: list[Metric]
    examples: list[Example] = []
    gates: list[GateResult] = []
    confidence: float
    caveats: list[str] = []


def read_report(store: Store, run: str) -> Report:
    """Read the report of a finished run.

    Raises DataError if the run has no report yet, IntegrityError if this version cannot read it.
    """
    path = run_path(run, "report", "report.json")
    data = store.read(path)
    if data is None:
        raise DataError(f"{run} has no report yet; `llamarefine status {run}` shows its progress")
    try:
        return Report.model_validate_json(data)
    except ValidationError as error:
        raise IntegrityError(
            f"{where(store, path)}: is not a report of this version: {error.errors()[0]['msg']}"
        ) from None


def check_gates(report: Report) -> None:
    """Raise GateError if a quality gate of the recipe failed."""
    failed = [
        f"{gate.metric} of {gate.model} is {gate.value:.4g}, not {gate.bound.replace('_', ' ')}"
        for gate in report.gates
        if not gate.passed
    ]
    if failed:
        raise GateError(f"quality gate: {'; '.join(failed)}; model and report are kept")


def report_text(store: Store, run: str) -> str:
    """Return the report as Markdown; DataError if the run has none yet."""
    data = store.read(run_path(run, "report", "report.md"))
    if data is None:
        raise DataError(f"{run} has no report yet; `llamarefine status {run}` shows its progress")
    return data.decode(errors="replace")


def report_page(store: Store, run: str) -> Path:
    """Return the path of the report as an HTML page on this machine; DataError if the run has none yet.

    The page of a bucket is downloaded to a temporary folder, inside a frame that runs no scripts, opens no windows and
    loads nothing. Our own page needs none of that, but anyone who can write to the bucket may have replaced it.
    """
    path = run_path(run, "report", "report.html")
    place = Path(where(store, path))
    if place.exists():
        return place
    data = store.read(path)
    if data is None:
        raise DataError(f"{run} has no report yet; `llamarefine status {run}` shows its progress")
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
    """Return the manifest of the artifact that holds `what` (of PARTS) of a run; DataError if none exists yet."""
    stage = PARTS[what][0]
    key = record.stages[stage].key if stage in record.stages else None
    manifest = store.manifest(stage, key) if key else None
    if manifest is None:
        raise DataError(
            f"{record.run} has no {what} yet: {stage} is not done; `llamarefine status {record.run}` shows its progress"
        )
    return manifest


def part_place(store: Store, manifest: Manifest, what: str) -> str:
    """Return where `what` is in the store, as a path or URI for a user to open."""
    return where(store, f"{manifest.folder}/{PARTS[what][1]}".rstrip("/"))


def pull(store: Store, manifest: Manifest, what: str, into: Path, *, force: bool = False) -> None:
    """Copy `what` of an artifact to the folder `into`, every byte verified, completely or not at all.

    An existing folder is replaced only if nothing is lost: if it is empty, or holds exactly an artifact of this store,
    or with `force`. Otherwise nothing is changed, and DataError is raised, or IntegrityError if the folder holds an
    artifact of this store of which some bytes changed. After a pull that was killed, the next one restores the folder
    that the killed one had moved away.
    """
    into = into.absolute()
    with _os_errors(), _work_folder(into) as folder:
        existing = check_replaceable(store, what, into, force=force)
        if existing is not None and existing == _listing(manifest, what):
            return
        fetched = store.fetch(manifest, folder / "new", *([PARTS[what][1]] if PARTS[what][1] else []))
        if what != "report":
            refuse_programs(fetched / PARTS[what][1])
        if into.exists():
            into.rename(folder / _OLD)
        (fetched / PARTS[what][1]).rename(into)


@contextlib.contextmanager
def _work_folder(into: Path) -> Iterator[Path]:
    """Yield a folder beside `into`, locked so that only one pull at a time uses it; remove it at the end.

    Its name is always the same, so that a pull finds and cleans up what a killed one left.
    """
    folder = into.with_name(f".{into.name}.pulling")
    lock = _lock(folder, into)
    try:
        _clean_up(folder, into)
        yield folder
    finally:
        _clean_up(folder, into)
        folder.rmdir()
        os.close(lock)


def _lock(folder: Path, into: Path) -> int:
    """Create the folder if it is missing and lock it; return the file descriptor, whose closing releases the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            return lock  # the file system has no locks
        os.close(lock)
        raise DataError(f"{into}: another pull is writing there; wait until it has finished") from None
    return lock


def _clean_up(folder: Path, into: Path) -> None:
    """Restore the old folder if it was moved away but not replaced, then empty the work folder."""
    old = folder / _OLD
    if old.exists() and not into.exists():
        old.rename(into)
    for left in folder.iterdir():
        shutil.rmtree(left)


def pull_verified(
    store: Store, record: RunRecord, what: str, into: Path, key: "PublicKey | None", *, force: bool = False
) -> tuple[Manifest, Path | None]:
    """Copy `what` of a run to the folder `into`, and the run's statement beside a model.

    With a `key`, raises IntegrityError before anything is copied unless the key signed the run's statement and the
    statement matches the artifact. Returns the artifact's manifest and the statement's path, if there is one.
    """
    manifest = part_of(store, record, what)
    signed = provenance.require(store, record.run, manifest, key) if key else None
    pull(store, manifest, what, into, force=force)
    statement = provenance.pull(store, record.run, into, signed) if what == "model" else None
    return manifest, statement


def pull_model_and_report(store: Store, record: RunRecord, into: Path) -> None:
    """Copy a run's model to ``into/model``, its statement beside that, and its report into `into`."""
    pull(store, part_of(store, record, "model"), "model", into / "model")
    provenance.pull(store, record.run, into / "model")
    pull_report(store, part_of(store, record, "report"), into)


def pull_report(store: Store, manifest: Manifest, into: Path) -> None:
    """Copy the three files of a report, verified, into a folder that may hold others; each is replaced atomically."""
    with _os_errors():
        into.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".report-", dir=into) as folder:
            fetched = store.fetch(manifest, Path(folder, secrets.token_hex(4)), *REPORTS)
            for name in REPORTS:
                os.replace(fetched / name, into / name)


def check_replaceable(store: Store, what: str, into: Path, *, force: bool = False) -> dict[str, str] | None:
    """Return the sha256 by path of the files in `into`, None if it does not exist.

    Raises the errors of `pull` if it must not replace the folder.
    """
    with _os_errors():
        if not into.exists():
            return None
        if not into.is_dir():
            raise DataError(f"{into}: expected a folder, found a file; choose another place")
        digests = {
            path.relative_to(into).as_posix(): file_sha256(path) for path in sorted(into.rglob("*")) if path.is_file()
        }
    if force or not digests:
        return digests
    differences = []
    for manifest in _artifacts(store, PARTS[what][0]):
        listing = _listing(manifest, what)
        if digests == listing:
            return digests
        if digests.keys() == listing.keys():
            differences.append([path for path in digests if digests[path] != listing[path]])
    changed = min(differences, key=len, default=[])
    if 0 < len(changed) < len(digests):
        raise IntegrityError(
            f"{into}: {', '.join(changed[:3])} changed since the pull; choose another folder, or replace it by --force"
        )
    raise DataError(
        f"{into}: holds files that are not from this store; choose another folder, or replace it by --force"
    )


def _artifacts(store: Store, stage: str) -> Iterator[Manifest]:
    for entry in store.entries(f"artifacts/{stage}/"):
        _, _, key, *rest = entry.path.split("/")
        if rest == [MANIFEST]:
            with contextlib.suppress(IntegrityError):  # a damaged manifest of another artifact is no reason to fail
                if manifest := store.manifest(stage, key):
                    yield manifest


def _listing(manifest: Manifest, what: str) -> dict[str, str]:
    """Return the sha256 by path of the files that `pull` copies for `what`."""
    folder = PARTS[what][1]
    return {file.path[len(folder) :]: file.sha256 for file in manifest.part(*([folder] if folder else []))}


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise from_os_error(error) from None
