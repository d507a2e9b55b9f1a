"""Verification of a finished or unfinished run: read everything it left in the store and compare all digests."""

import hashlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import ValidationError

from llamarefine_jobs.contract.artifact import Manifest, artifact_key, run_path, short
from llamarefine_jobs.contract.errors import IntegrityError, LlamaRefineError
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.stages import SEQUENCE, STAGES
from llamarefine_jobs.contract.version import __version__
from llamarefine_jobs.store import Store
from llamarefine_k8s.runs import provenance, records
from llamarefine_k8s.runs.checks import Check, fail, ok, warning
from llamarefine_k8s.runs.records import RunRecord

if TYPE_CHECKING:
    from llamarefine_k8s.runs.signing import PublicKey

_RERUN = "run the recipe again: it rewrites this without training anything again"


def verify(store: Store, record: RunRecord, key: "PublicKey | None" = None) -> Iterator[Check]:
    """Yield each check as soon as it is done, and continue after a failed one. Raises what the store raises.

    With a `key`, a run fails unless its statement is signed by that key.
    """
    made: dict[str, Manifest] = {}
    if not records.has_valid_digest(store, record.run):
        yield fail("record", "was changed after it was written, or was written by another version", _RERUN)
    for stage in SEQUENCE:
        yield from _artifact(store, record, stage, made)
    for stage in SEQUENCE:
        if stage in made:
            yield from _lineage(store, record, made[stage], made)
        if STAGES[stage].has_checkpoints:
            yield from _checkpoints(store, record, stage)
    yield from _logs(store, record)
    yield from _report(store, record, made.get("evaluate"))
    yield from provenance.check(store, record, made, key)


def _artifact(store: Store, record: RunRecord, stage: str, made: dict[str, Manifest]) -> Iterator[Check]:
    """Check a manifest's own digest and its files' sizes and digests. Adds a manifest that can be read to `made`."""
    recorded = record.stages.get(stage)
    is_made = record.state == "done" or (recorded is not None and recorded.state in ("done", "reused"))
    if is_made and (recorded is None or recorded.key is None):
        yield fail(stage, "the record does not name its artifact", _RERUN)
        return
    if recorded is None or recorded.key is None or not is_made:
        yield warning(stage, f"does not exist yet: the run is {record.state}")
        return
    try:
        manifest = store.manifest(stage, recorded.key)
    except IntegrityError as error:
        yield fail(stage, str(error))
        return
    if manifest is None:
        yield fail(stage, f"the store has no artifact {short(recorded.key)}", "run the recipe again to make it again")
        return
    made[stage] = manifest
    faults = store.faults(manifest)
    yield from (fail(stage, fault) for fault in faults)
    listed = {f"{manifest.folder}/{file.path}" for file in manifest.files}
    added = [entry.path for entry in store.entries(f"{manifest.folder}/") if entry.path not in listed]
    if added:
        yield warning(
            f"{stage} folder",
            f"{len(added)} files that its manifest does not list, such as {added[0]}: nothing reads them",
        )
    if not faults:
        size_mb = sum(file.size_bytes for file in manifest.files) / 1e6
        yield ok(stage, f"{short(manifest.key)}: {len(manifest.files)} files, {size_mb:.1f} MB, as its manifest says")


def _lineage(store: Store, record: RunRecord, manifest: Manifest, made: dict[str, Manifest]) -> Iterator[Check]:
    """Check that the manifest's parents are this run's: the same manifests, or the same bytes in the files it reads."""
    name, reads = f"{manifest.stage} parents", STAGES[manifest.stage].reads
    missing = [parent for parent in reads if parent not in made]
    if missing:
        yield fail(name, f"{' and '.join(missing)} cannot be read", "see above")
        return
    parents = {parent: made[parent] for parent in reads}
    recorded = {parent: manifest.parents.get(parent) for parent in reads}
    if all(known and known.manifest_sha256 == parents[parent].sha256() for parent, known in recorded.items()):
        if parents:
            yield ok(name, f"made from this run's {', '.join(parents)}")
    elif _key(record, manifest.stage, parents) == manifest.key:
        yield ok(name, f"made from the same bytes as this run's {', '.join(parents)}, which have been made again since")
    else:
        yield fail(
            name,
            f"{short(manifest.key)} was not made from this run's {', '.join(parents)}",
            f"remove {store.uri}/{manifest.folder.rpartition('/')[0]} and run the recipe again",
        )


def _key(record: RunRecord, stage: str, parents: dict[str, Manifest]) -> str | None:
    """Return the key that this version computes for the stage; None for a run of another version."""
    if record.package_version != __version__:
        return None
    try:
        return artifact_key(stage, Recipe.model_validate(record.recipe), parents)
    except ValidationError:
        return None


def _checkpoints(store: Store, record: RunRecord, stage: str) -> Iterator[Check]:
    """Check the files of each checkpoint of a training."""
    recorded = record.stages.get(stage)
    for step in store.checkpoint_steps(stage, recorded.key) if recorded and recorded.key else ():
        name = f"{stage} checkpoint at step {step}"
        try:
            manifest = store.checkpoint_manifest(stage, str(recorded and recorded.key), step)
            faults = store.faults(manifest, step) if manifest else []
        except IntegrityError as error:
            yield fail(name, str(error))
            continue
        if manifest is None:
            yield warning(name, "is incomplete, so it is never used", "gc removes it when it is a day old")
        elif faults:
            yield from (fail(name, fault) for fault in faults)
        else:
            yield ok(name, f"{len(manifest.files)} files, as its manifest says")


def _logs(store: Store, record: RunRecord) -> Iterator[Check]:
    """Check that the log of each ended stage has the digest that was recorded at its end."""
    ended = {name: stage for name, stage in record.stages.items() if stage.log and stage.state != "running"}
    wrong = []
    for name, stage in ended.items():
        digest = hashlib.sha256()
        with open(os.devnull, "wb") as nowhere:
            is_there = store.objects.download(str(stage.log), nowhere, digest.update)
        if not is_there:
            wrong.append(f"{stage.log} is missing")
        elif stage.log_sha256 and digest.hexdigest() != stage.log_sha256:
            wrong.append(f"{stage.log} was changed after {name} ended")
    if wrong:
        yield fail("logs", "; ".join(wrong), "no artifact depends on logs, but their text is lost")
    elif ended:
        yield ok("logs", f"of {', '.join(ended)}: unchanged since each stage ended")


def _report(store: Store, record: RunRecord, evaluate: Manifest | None) -> Iterator[Check]:
    """Check that the run's copy of the report equals the report in the artifact of evaluate."""
    if evaluate is None:
        return
    wrong = []
    for file in evaluate.part(*STAGES["evaluate"].writes):
        try:
            data = store.read(run_path(record.run, "report", file.path))
        except LlamaRefineError as error:
            wrong.append(str(error))
            continue
        if data is None or hashlib.sha256(data).hexdigest() != file.sha256:
            wrong.append(f"{file.path} {'is missing' if data is None else 'differs from the artifact of evaluate'}")
    if wrong:
        yield fail("report", "; ".join(wrong), _RERUN)
    else:
        yield ok("report", "equals the report of evaluate")
