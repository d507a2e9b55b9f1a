"""Garbage collection: find and remove the objects in a store that no kept run needs.

Kept are:

- the runs that the RetentionPolicy keeps, and every run that is being driven or changed within GRACE;
- every artifact and checkpoint that a kept run recorded, or would find again if its recipe were submitted again;
- everything younger than GRACE, because a stage may be writing it or about to read it;
- the parents of all these, back to the first stage;
- uploaded files that a kept recipe names, or that are younger than INPUT_GRACE: their run may wait in a queue, and it
  has no record before it starts.

Objects outside the store's layout are never touched.

A removal may be interrupted at any point. Records and manifests are deleted first, children before their parents, so an
artifact with a manifest is always complete; the next removal deletes the files that no manifest lists any more.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from pydantic import ValidationError

from llamarefine_jobs.contract.artifact import MANIFEST, Manifest, artifact_key, artifact_path, short
from llamarefine_jobs.contract.errors import IntegrityError
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.stages import SEQUENCE, STAGES
from llamarefine_jobs.store import Store
from llamarefine_jobs.store.objects import Entry
from llamarefine_k8s.runs import records
from llamarefine_k8s.runs.records import RECORD, RunRecord

GRACE = timedelta(days=1)  # the default of the setting deadline_s, the longest that a stage may take
INPUT_GRACE = timedelta(days=7)

Ref = tuple[str, str]  # names an artifact: stage and key
_NEVER = datetime.min.replace(tzinfo=UTC)
_CHILDREN_FIRST = [*STAGES][::-1]


@dataclass(frozen=True)
class RetentionPolicy:
    """Which runs to keep: the `newest` N, and those `younger_than` an age; all runs if neither is given."""

    newest: int | None = None
    younger_than: timedelta | None = None

    def select(self, records: Sequence[RunRecord], now: datetime) -> list[RunRecord]:
        """Return the runs to keep. `records` may be in any order."""
        if self.newest is None and self.younger_than is None:
            return list(records)
        ordered = sorted(records, key=lambda record: record.updated_at, reverse=True)
        age = max(self.younger_than or GRACE, GRACE)
        return [
            record
            for place, record in enumerate(ordered)
            if place < (self.newest or 0) or record.is_driven or now - record.updated_at < age
        ]


@dataclass(frozen=True)
class GarbageItem:
    """A run, artifact, checkpoint or other file to remove: its files and, if it has one, its `marker`.

    The marker is the record of a run or the manifest of an artifact or checkpoint. Without it the files are garbage.
    """

    kind: Literal["run", "artifact", "checkpoint", "input", "leftover"]
    name: str
    why: str
    marker: str | None
    files: tuple[str, ...]
    size_bytes: int


@dataclass(frozen=True)
class Garbage:
    """All items to remove, children before their parents, and the number of runs that are kept."""

    items: tuple[GarbageItem, ...]
    kept_runs: int

    @property
    def size_bytes(self) -> int:
        return sum(item.size_bytes for item in self.items)


def find(store: Store, policy: RetentionPolicy, now: datetime) -> Garbage:
    """Return what can be removed. `now` is the time by the store's clock. Reads records and manifests; changes nothing.

    Raises IntegrityError if a record or manifest cannot be read: what it refers to is unknown.
    """
    inventory = _Inventory(store, now)
    records = list(_records(store))  # read after the listing, so that runs that started meanwhile are seen
    kept = policy.select(records, now)
    needed = inventory.needed_by(kept)
    removable = {record.run: record for record in records if record not in kept}
    items = [
        *inventory.runs(removable),
        *inventory.artifacts(needed),
        *inventory.checkpoints(needed),
        *inventory.inputs(kept),
        *inventory.unfinished(),
    ]
    return Garbage(tuple(items), len(kept))


def remove(store: Store, garbage: Garbage) -> None:
    """Remove what was found: first the markers, one by one in order, then the files."""
    for item in garbage.items:
        if item.marker:
            store.objects.delete(item.marker)
    store.remove(path for item in garbage.items for path in item.files)


class _Inventory:
    """The objects of a store, grouped by the run, artifact, checkpoint or uploaded file that they belong to."""

    def __init__(self, store: Store, now: datetime) -> None:
        self._store = store
        self._now = now
        self._runs = self._grouped("runs", 2)
        self._artifacts = self._grouped("artifacts", 3)
        self._checkpoints = self._grouped("checkpoints", 4)
        self._inputs = self._grouped("inputs", 2)
        self._manifests: dict[str, Manifest | None] = {}

    def needed_by(self, kept: Iterable[RunRecord]) -> set[Ref]:
        """Return every artifact that kept runs refer to or that is young, with all their parents."""
        pending = [ref for record in kept for ref in (*_recorded(record), *self._reusable(record))]
        for folder, entries in (*self._artifacts.items(), *self._checkpoints.items()):
            _, stage, key, *_ = folder.split("/")
            pending += [] if self._is_old(entries) else [(stage, key)]
        steps = defaultdict(list)
        for folder in self._checkpoints:
            steps[folder.rpartition("/")[0]].append(folder)
        needed: set[Ref] = set()
        while pending:
            ref = stage, key = pending.pop()
            if ref in needed:
                continue
            needed.add(ref)
            for folder in (artifact_path(stage, key), *steps.get(f"checkpoints/{stage}/{key}", ())):
                manifest = self._manifest(folder)
                pending += [(name, parent.key) for name, parent in (manifest.parents if manifest else {}).items()]
        return needed

    def runs(self, removable: dict[str, RunRecord]) -> Iterator[GarbageItem]:
        """Yield the runs to remove, and old files in the folder of a run that has no record."""
        for folder, entries in self._runs.items():
            run = folder.split("/")[1]
            marker = f"{folder}/{RECORD}"
            if run in removable:
                yield _item("run", run, f"last changed {removable[run].updated_at:%Y-%m-%d}", entries, marker)
            elif all(entry.path != marker for entry in entries) and self._is_old(entries):
                yield _item("leftover", folder, "a run without its record", entries)

    def artifacts(self, needed: set[Ref]) -> Iterator[GarbageItem]:
        """Yield the artifacts to remove, and old attempts that never became the artifact."""
        for folder in sorted(self._artifacts, key=_children_first):
            entries = self._artifacts[folder]
            _, stage, key = folder.split("/")
            marker = f"{folder}/{MANIFEST}"
            has_manifest = any(entry.path == marker for entry in entries)
            if has_manifest and (stage, key) not in needed:
                yield _item("artifact", f"{stage} {short(key)}", "no kept run refers to it", entries, marker)
                continue
            manifest = self._manifest(folder) if has_manifest else None
            for attempt, files in _by_folder(entries, 4).items():
                if attempt != (manifest and manifest.folder) and self._is_old(files):
                    yield _item("leftover", attempt, "its writer never finished, or another one won", files)

    def checkpoints(self, needed: set[Ref]) -> Iterator[GarbageItem]:
        """Yield the old checkpoints from which no training will resume."""
        newest: dict[Ref, str] = {}
        complete = {folder for folder, entries in self._checkpoints.items() if _has_manifest(folder, entries)}
        for folder in sorted(complete, key=lambda folder: int(folder.rpartition("/")[2])):
            newest[_ref(folder)] = folder
        for folder in sorted(self._checkpoints, key=_children_first):
            entries, ref = self._checkpoints[folder], _ref(folder)
            if not self._is_old(entries):
                continue
            stage, key, step = *ref, int(folder.rpartition("/")[2])
            if folder not in complete:
                yield _item("leftover", folder, "its writer never finished", entries)
            elif ref not in needed:
                why = "no kept run refers to it"
                yield _item("checkpoint", f"{stage} {short(key)} at step {step}", why, entries, f"{folder}/{MANIFEST}")
            elif newest[ref] != folder or self._is_published(ref):
                why = "its training is done" if self._is_published(ref) else "there is a later one"
                yield _item("checkpoint", f"{stage} {short(key)} at step {step}", why, entries, f"{folder}/{MANIFEST}")

    def inputs(self, kept: Iterable[RunRecord]) -> Iterator[GarbageItem]:
        """Yield old uploaded files that no kept recipe names."""
        named = [text for record in kept for text in _all_strings(record.recipe)]
        for folder, entries in self._inputs.items():
            if self._is_old(entries, INPUT_GRACE) and not any(f"/{folder}/" in f"{text}/" for text in named):
                name = entries[0].path.split("/")[2]
                yield _item("input", name, "no kept recipe names it", entries)

    def unfinished(self) -> Iterator[GarbageItem]:
        """Yield the old files that killed writers and preflights left behind."""
        for entry in [*self._store.entries("check/"), *self._store.objects.unfinished()]:
            if self._is_old([entry]):
                yield _item("leftover", entry.path, "its writer never finished", [entry])

    def _reusable(self, record: RunRecord) -> Iterator[Ref]:
        """Yield the artifacts that the same submit would reuse or resume: it may be in progress now."""
        try:
            recipe = Recipe.model_validate(record.recipe)
        except ValidationError:
            return  # a recipe of another version: this version would compute other keys
        found: dict[str, Manifest] = {}
        for stage in SEQUENCE:
            if not STAGES[stage].reads.keys() <= found.keys():
                continue
            key = artifact_key(stage, recipe, found)
            yield stage, key
            manifest = self._manifest(artifact_path(stage, key))
            if manifest:
                found[stage] = manifest

    def _manifest(self, folder: str) -> Manifest | None:
        """Return the manifest in a listed folder, None if it has none; IntegrityError if it cannot be read."""
        entries = self._artifacts.get(folder) or self._checkpoints.get(folder) or []
        if folder not in self._manifests:
            self._manifests[folder] = self._read(folder) if _has_manifest(folder, entries) else None
        return self._manifests[folder]

    def _read(self, folder: str) -> Manifest | None:
        try:
            _, stage, key, *step = folder.split("/")
            if step:
                return self._store.checkpoint_manifest(stage, key, int(step[0]))
            return self._store.manifest(stage, key)
        except IntegrityError as error:
            raise IntegrityError(f"nothing was removed, because it is unknown what must be kept: {error}") from None

    def _is_published(self, ref: Ref) -> bool:
        return _has_manifest(artifact_path(*ref), self._artifacts.get(artifact_path(*ref), []))

    def _is_old(self, entries: Iterable[Entry], grace: timedelta = GRACE) -> bool:
        return all(entry.modified_at is not None and self._now - entry.modified_at > grace for entry in entries)

    def _grouped(self, top: str, depth: int) -> dict[str, list[Entry]]:
        """Return the objects below `top` by their folder of `depth` parts; others are left out."""
        groups = _by_folder(self._store.entries(f"{top}/"), depth)
        if top in ("artifacts", "checkpoints"):
            groups = {folder: entries for folder, entries in groups.items() if folder.split("/")[1] in STAGES}
        if top == "checkpoints":
            groups = {folder: entries for folder, entries in groups.items() if folder.rpartition("/")[2].isdecimal()}
        return groups


def _records(store: Store) -> Iterator[RunRecord]:
    """Yield all run records, each with the later of its own time and the store's; IntegrityError if one is damaged."""
    for entry in store.entries("runs/"):
        if entry.path.count("/") == 2 and entry.path.endswith(f"/{RECORD}"):
            try:
                record = records.load(store, entry.path.split("/")[1])
            except IntegrityError as error:
                raise IntegrityError(
                    f"nothing was removed, because it is unknown what must be kept: {error}; remove that record, or "
                    "use the version that wrote it"
                ) from None
            if record:  # its own time is by its driver's clock, which may be behind the store's
                yield record.model_copy(update={"updated_at": max(record.updated_at, entry.modified_at or _NEVER)})


def _recorded(record: RunRecord) -> Iterator[Ref]:
    """Return the artifacts that a run's record names."""
    return ((stage, about.key) for stage, about in record.stages.items() if about.key)


def _all_strings(value: object) -> Iterator[str]:
    """Yield every string in a recipe: a recipe of another version may name its sources under any key."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _all_strings(part)


def _by_folder(entries: Iterable[Entry], depth: int) -> dict[str, list[Entry]]:
    groups: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        parts = entry.path.split("/")
        if len(parts) > depth:
            groups["/".join(parts[:depth])].append(entry)
    return dict(groups)


def _item(
    kind: Literal["run", "artifact", "checkpoint", "input", "leftover"],
    name: str,
    why: str,
    entries: Sequence[Entry],
    marker: str | None = None,
) -> GarbageItem:
    files = tuple(entry.path for entry in entries if entry.path != marker)
    return GarbageItem(kind, name, why, marker, files, sum(entry.size_bytes for entry in entries))


def _has_manifest(folder: str, entries: Iterable[Entry]) -> bool:
    return any(entry.path == f"{folder}/{MANIFEST}" for entry in entries)


def _ref(folder: str) -> Ref:
    """Return the stage and key in the path of an artifact's or a checkpoint's folder."""
    _, stage, key, *_ = folder.split("/")
    return stage, key


def _children_first(folder: str) -> tuple[int, str]:
    """Sort key of a folder: later stages come first, so that no child outlives its parents."""
    return _CHILDREN_FIRST.index(folder.split("/")[1]), folder
