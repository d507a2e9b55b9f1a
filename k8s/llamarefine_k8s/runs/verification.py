"""What a run left in the store, read again: every byte against its digest, every digest against what names it."""

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

_AGAIN = "run the recipe again: nothing is trained anew, and it is written anew"


def verify(store: Store, record: RunRecord, key: "PublicKey | None" = None) -> Iterator[Check]:
    """One check after the other, each as soon as it is done. Goes on after what is wrong; raises where the store does.

    With a `key`, a run without a statement that it signed is wrong.
    """
    made: dict[str, Manifest] = {}
    if not records.has_valid_digest(store, record.run):
        yield fail("record", "was changed after it was written, or another version wrote it", _AGAIN)
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
    """The manifest's own digest, and every file's size and sha256; a good manifest is added to `made`."""
    about = record.stages.get(stage)
    is_made = record.state == "done" or (about is not None and about.state in ("done", "reused"))
    if is_made and (about is None or about.key is None):
        yield fail(stage, "the record does not name its artifact", _AGAIN)
        return
    if about is None or about.key is None or not is_made:
        yield warning(stage, f"not made yet: the run is {record.state}")
        return
    try:
        manifest = store.manifest(stage, about.key)
    except IntegrityError as error:
        yield fail(stage, str(error))
        return
    if manifest is None:
        yield fail(stage, f"the store has no artifact {short(about.key)}", "run the recipe again: it is made anew")
        return
    made[stage] = manifest
    faults = store.faults(manifest)
    yield from (fail(stage, fault) for fault in faults)
    listed = {f"{manifest.folder}/{file.path}" for file in manifest.files}
    added = [entry.path for entry in store.entries(f"{manifest.folder}/") if entry.path not in listed]
    if added:
        yield warning(
            f"{stage} folder", f"{len(added)} files that its manifest does not list, as {added[0]}: nothing reads them"
        )
    if not faults:
        size_mb = sum(file.size_bytes for file in manifest.files) / 1e6
        yield ok(stage, f"{short(manifest.key)}: {len(manifest.files)} files, {size_mb:.1f} MB, as its manifest says")


def _lineage(store: Store, record: RunRecord, manifest: Manifest, made: dict[str, Manifest]) -> Iterator[Check]:
    """The parents that the manifest names are those of this run, byte for byte where the stage reads them."""
    name, reads = f"{manifest.stage} parents", STAGES[manifest.stage].reads
    missing = [parent for parent in reads if parent not in made]
    if missing:
        yield fail(name, f"{' and '.join(missing)} cannot be read", "see above")
        return
    parents = {parent: made[parent] for parent in reads}
    named = {parent: manifest.parents.get(parent) for parent in reads}
    if all(known and known.manifest_sha256 == parents[parent].sha256() for parent, known in named.items()):
        if parents:
            yield ok(name, f"made from this run's {', '.join(parents)}")
    elif _key(record, manifest.stage, parents) == manifest.key:
        yield ok(name, f"made from the same bytes as this run's {', '.join(parents)}, which were made again since")
    else:
        yield fail(
            name,
            f"{short(manifest.key)} was not made from this run's {', '.join(parents)}",
            f"remove {store.uri}/{manifest.folder.rpartition('/')[0]} and run the recipe again",
        )


def _key(record: RunRecord, stage: str, parents: dict[str, Manifest]) -> str | None:
    """The key that this version gives the stage; None for a run of another version."""
    if record.package_version != __version__:
        return None
    try:
        return artifact_key(stage, Recipe.model_validate(record.recipe), parents)
    except ValidationError:
        return None


def _checkpoints(store: Store, record: RunRecord, stage: str) -> Iterator[Check]:
    """Each checkpoint of a training: complete and right, or named."""
    about = record.stages.get(stage)
    for step in store.checkpoint_steps(stage, about.key) if about and about.key else ():
        name = f"{stage} checkpoint at step {step}"
        try:
            manifest = store.checkpoint_manifest(stage, str(about and about.key), step)
            faults = store.faults(manifest, step) if manifest else []
        except IntegrityError as error:
            yield fail(name, str(error))
            continue
        if manifest is None:
            yield warning(name, "is not complete, so it is never used", "gc removes it when it is a day old")
        elif faults:
            yield from (fail(name, fault) for fault in faults)
        else:
            yield ok(name, f"{len(manifest.files)} files, as its manifest says")


def _logs(store: Store, record: RunRecord) -> Iterator[Check]:
    """The logs of stages that are over are as they were when each ended."""
    told = {name: about for name, about in record.stages.items() if about.log and about.state != "running"}
    wrong = []
    for name, about in told.items():
        digest = hashlib.sha256()
        with open(os.devnull, "wb") as nowhere:
            is_there = store.objects.download(str(about.log), nowhere, digest.update)
        if not is_there:
            wrong.append(f"{about.log} is missing")
        elif about.log_sha256 and digest.hexdigest() != about.log_sha256:
            wrong.append(f"{about.log} is not as {name} left it")
    if wrong:
        yield fail("logs", "; ".join(wrong), "nothing is made of them; what a stage said is lost")
    elif told:
        yield ok("logs", f"of {', '.join(told)}, as they were when each ended")


def _report(store: Store, record: RunRecord, evaluate: Manifest | None) -> Iterator[Check]:
    """The run's copy of the report is evaluate's."""
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
            wrong.append(f"{file.path} {'is missing' if data is None else 'is not that of evaluate'}")
    if wrong:
        yield fail("report", "; ".join(wrong), _AGAIN)
    else:
        yield ok("report", "the run's report is that of evaluate")
