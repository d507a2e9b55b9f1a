"""What the store holds and no kept run refers to: found, and removed.

Kept are the runs that `Keep` names, every run that is driven or changed within GRACE, all that these runs recorded or
would find again when they are submitted again, and the parents of all that, back to the first. Whatever is younger
than GRACE stays too, with its parents: someone may be writing it, or about to read it; an uploaded file stays for
INPUT_GRACE, for its run may wait in a queue and has no record before it begins. What is not of this layout is never
touched.

Removal can be cut off anywhere: records and manifests go first, children before their parents, so nothing is ever
there by half; the files that are then in nobody's manifest go with the next removal.
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

GRACE = timedelta(days=1)  # as long as a stage may take, by the settings' default
INPUT_GRACE = timedelta(days=7)

Ref = tuple[str, str]  # a stage and a key
_NEVER = datetime.min.replace(tzinfo=UTC)
_CHILDREN_FIRST = [*STAGES][::-1]


@dataclass(frozen=True)
class Keep:
    """Which runs stay: those that either bound keeps; all where none is given."""

    newest: int | None = None
    younger_than: timedelta | None = None

    def choose(self, records: Sequence[RunRecord], now: datetime) -> list[RunRecord]:
        """The runs that stay, of `records` in any order."""
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
class Item:
    """One thing that goes. Without its `marker`, a record or a manifest, it is not there."""

    kind: Literal["run", "artifact", "checkpoint", "input", "leftover"]
    name: str
    why: str
    marker: str | None
    files: tuple[str, ...]
    size_bytes: int


@dataclass(frozen=True)
class Garbage:
    """What goes, children before their parents, and how many runs stay."""

    items: tuple[Item, ...]
    kept_runs: int

    @property
    def size_bytes(self) -> int:
        return sum(item.size_bytes for item in self.items)


def find(store: Store, keep: Keep, now: datetime) -> Garbage:
    """What may go, `now` by the store's clock. Reads records and manifests only, and changes nothing.

    Raises IntegrityError where what a kept thing refers to cannot be known.
    """
    inventory = _Inventory(store, now)
    records = list(_records(store))  # read last: a run that began meanwhile is seen, with all that it will find
    kept = keep.choose(records, now)
    reached = inventory.reach(kept)
    goes = {record.run: record for record in records if record not in kept}
    items = [
        *inventory.runs(goes),
        *inventory.artifacts(reached),
        *inventory.checkpoints(reached),
        *inventory.inputs(kept),
        *inventory.unfinished(),
    ]
    return Garbage(tuple(items), len(kept))


def remove(store: Store, garbage: Garbage) -> None:
    """Remove what was found: first what makes it what it is, one by one, then the files."""
    for item in garbage.items:
        if item.marker:
            store.objects.delete(item.marker)
    store.remove(path for item in garbage.items for path in item.files)


class _Inventory:
    """The store's objects by what they belong to."""

    def __init__(self, store: Store, now: datetime) -> None:
        self._store = store
        self._now = now
        self._runs = self._grouped("runs", 2)
        self._artifacts = self._grouped("artifacts", 3)
        self._checkpoints = self._grouped("checkpoints", 4)
        self._inputs = self._grouped("inputs", 2)
        self._manifests: dict[str, Manifest | None] = {}

    def reach(self, kept: Iterable[RunRecord]) -> set[Ref]:
        """Every stage and key that a kept run refers to, that is young, or that one of these was made from."""
        pending = [ref for record in kept for ref in (*_recorded(record), *self._found_again(record))]
        for folder, entries in (*self._artifacts.items(), *self._checkpoints.items()):
            _, stage, key, *_ = folder.split("/")
            pending += [] if self._is_old(entries) else [(stage, key)]
        steps = defaultdict(list)
        for folder in self._checkpoints:
            steps[folder.rpartition("/")[0]].append(folder)
        reached: set[Ref] = set()
        while pending:
            ref = stage, key = pending.pop()
            if ref in reached:
                continue
            reached.add(ref)
            for folder in (artifact_path(stage, key), *steps.get(f"checkpoints/{stage}/{key}", ())):
                manifest = self._manifest(folder)
                pending += [(name, parent.key) for name, parent in (manifest.parents if manifest else {}).items()]
        return reached

    def runs(self, goes: dict[str, RunRecord]) -> Iterator[Item]:
        """Runs that go, and what lies beside no record."""
        for folder, entries in self._runs.items():
            run = folder.split("/")[1]
            marker = f"{folder}/{RECORD}"
            if run in goes:
                yield _item("run", run, f"last changed {goes[run].updated_at:%Y-%m-%d}", entries, marker)
            elif all(entry.path != marker for entry in entries) and self._is_old(entries):
                yield _item("leftover", folder, "a run without its record", entries)

    def artifacts(self, reached: set[Ref]) -> Iterator[Item]:
        """Artifacts that go, and attempts that became none."""
        for folder in sorted(self._artifacts, key=_children_first):
            entries = self._artifacts[folder]
            _, stage, key = folder.split("/")
            marker = f"{folder}/{MANIFEST}"
            is_there = any(entry.path == marker for entry in entries)
            if is_there and (stage, key) not in reached:
                yield _item("artifact", f"{stage} {short(key)}", "no kept run refers to it", entries, marker)
                continue
            manifest = self._manifest(folder) if is_there else None
            for attempt, files in _by_folder(entries, 4).items():
                if attempt != (manifest and manifest.folder) and self._is_old(files):
                    yield _item("leftover", attempt, "its writer never finished, or another one won", files)

    def checkpoints(self, reached: set[Ref]) -> Iterator[Item]:
        """Checkpoints that nothing will go on from."""
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
            elif ref not in reached:
                why = "no kept run refers to it"
                yield _item("checkpoint", f"{stage} {short(key)} at step {step}", why, entries, f"{folder}/{MANIFEST}")
            elif newest[ref] != folder or self._is_published(ref):
                why = "its training is done" if self._is_published(ref) else "there is a later one"
                yield _item("checkpoint", f"{stage} {short(key)} at step {step}", why, entries, f"{folder}/{MANIFEST}")

    def inputs(self, kept: Iterable[RunRecord]) -> Iterator[Item]:
        """Uploaded files that no kept recipe names."""
        named = [text for record in kept for text in _texts(record.recipe)]
        for folder, entries in self._inputs.items():
            if self._is_old(entries, INPUT_GRACE) and not any(f"/{folder}/" in f"{text}/" for text in named):
                name = entries[0].path.split("/")[2]
                yield _item("input", name, "no kept recipe names it", entries)

    def unfinished(self) -> Iterator[Item]:
        """What killed writers and preflights left."""
        for entry in [*self._store.entries("check/"), *self._store.objects.unfinished()]:
            if self._is_old([entry]):
                yield _item("leftover", entry.path, "its writer never finished", [entry])

    def _found_again(self, record: RunRecord) -> Iterator[Ref]:
        """What the same submit would find, and go on from: it may be under way now."""
        try:
            recipe = Recipe.model_validate(record.recipe)
        except ValidationError:
            return  # of another version, which keys everything otherwise
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
        """The manifest in a folder of the listing; IntegrityError where it cannot be read."""
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
            raise IntegrityError(f"nothing was removed, for what is kept cannot be known: {error}") from None

    def _is_published(self, ref: Ref) -> bool:
        return _has_manifest(artifact_path(*ref), self._artifacts.get(artifact_path(*ref), []))

    def _is_old(self, entries: Iterable[Entry], grace: timedelta = GRACE) -> bool:
        return all(entry.modified_at is not None and self._now - entry.modified_at > grace for entry in entries)

    def _grouped(self, top: str, depth: int) -> dict[str, list[Entry]]:
        """The objects below `top`, by the folder of `depth` parts that they lie in; what lies elsewhere is not ours."""
        groups = _by_folder(self._store.entries(f"{top}/"), depth)
        if top in ("artifacts", "checkpoints"):
            groups = {folder: entries for folder, entries in groups.items() if folder.split("/")[1] in STAGES}
        if top == "checkpoints":
            groups = {folder: entries for folder, entries in groups.items() if folder.rpartition("/")[2].isdecimal()}
        return groups


def _records(store: Store) -> Iterator[RunRecord]:
    for entry in store.entries("runs/"):
        if entry.path.count("/") == 2 and entry.path.endswith(f"/{RECORD}"):
            try:
                record = records.load(store, entry.path.split("/")[1])
            except IntegrityError as error:
                raise IntegrityError(
                    f"nothing was removed, for what is kept cannot be known: {error}; remove that record, or use the "
                    "version that wrote it"
                ) from None
            if record:  # its own time is that of its driver's clock
                yield record.model_copy(update={"updated_at": max(record.updated_at, entry.modified_at or _NEVER)})


def _recorded(record: RunRecord) -> Iterator[Ref]:
    return ((stage, about.key) for stage, about in record.stages.items() if about.key)


def _texts(value: object) -> Iterator[str]:
    """All texts of a recipe: where one of another version names its sources is not known."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


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
) -> Item:
    files = tuple(entry.path for entry in entries if entry.path != marker)
    return Item(kind, name, why, marker, files, sum(entry.size_bytes for entry in entries))


def _has_manifest(folder: str, entries: Iterable[Entry]) -> bool:
    return any(entry.path == f"{folder}/{MANIFEST}" for entry in entries)


def _ref(folder: str) -> Ref:
    _, stage, key, *_ = folder.split("/")
    return stage, key


def _children_first(folder: str) -> tuple[int, str]:
    return _CHILDREN_FIRST.index(folder.split("/")[1]), folder
