"""What `gc` removes and what it keeps: random stores, a crash at every step, a folder and a bucket."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamarefine_jobs.contract.artifact import File, Manifest, Parent, artifact_path, checkpoint_path
from llamarefine_jobs.contract.errors import DataError, IntegrityError
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.stages import SEQUENCE
from llamarefine_jobs.store import Store
from llamarefine_k8s.runs import garbage
from llamarefine_k8s.runs.garbage import GRACE, RetentionPolicy
from llamarefine_k8s.runs.pipeline import Pipeline
from llamarefine_k8s.runs.plan import plan
from llamarefine_k8s.runs.records import RecordWriter, StageRecord, all_runs
from tests.k8s.acting import FakeExecutor, fail
from tests.k8s.conftest import Launcher
from tests.k8s.runs.test_pipeline import RecordingObserver
from tests.k8s.runs.test_records import DEAD_DRIVER, record
from tests.store.samples import draft, key_of
from tests.store.test_crashes import crashed_at

NOW = datetime.now(UTC)
OLD = timedelta(days=9)


@dataclass
class Node:
    """An artifact or a checkpoint of a random store; `made_from` holds indexes in the list of artifacts."""

    stage: str
    made_from: set[int] = field(default_factory=set)
    young: bool = False
    step: int | None = None
    complete: bool = True


@dataclass
class World:
    """A description of a random store."""

    artifacts: list[Node]
    checkpoints: list[tuple[int, Node]]  # index of the training's artifact, which may be in `unmade`
    torn: list[tuple[int, bool]]  # unfinished attempts: index of the artifact, whether the files are young
    unmade: set[int]  # artifacts that were never published
    runs: list[tuple[set[int], int, bool]]  # artifacts it recorded, its age in days, whether it is being driven


@st.composite
def worlds(draw: st.DrawFn) -> World:
    stages = sorted(draw(st.lists(st.sampled_from(SEQUENCE), max_size=9)), key=SEQUENCE.index)
    places = st.sets(st.integers(0, max(len(stages) - 1, 0)), max_size=4)
    artifacts = []
    for place, stage in enumerate(stages):
        earlier = {other for other in draw(places) if other < place and stages[other] != stage}
        artifacts.append(
            Node(stage, {max(each for each in earlier if stages[each] == s) for s in _stages(stages, earlier)})
        )
        artifacts[-1].young = draw(st.integers(0, 5)) == 0
    trainings = [place for place, stage in enumerate(stages) if stage in ("sft", "dpo")]
    checkpoints = []
    steps = st.tuples(st.sampled_from(trainings or [0]), st.integers(1, 3))
    for place, step in sorted(draw(st.sets(steps, max_size=4))) if trainings else []:
        node = Node(stages[place], artifacts[place].made_from, draw(st.booleans()), step)
        node.complete = draw(st.booleans())
        checkpoints.append((place, node))
    unmade = set(draw(st.sets(st.sampled_from(trainings)))) if trainings else set()
    torn = draw(st.lists(st.tuples(st.integers(0, len(stages) - 1), st.booleans()), max_size=3)) if stages else []
    runs = draw(st.lists(st.tuples(places, st.integers(0, 60), st.booleans()), max_size=5))
    return World(
        artifacts, checkpoints, torn, unmade, [({p for p in made if p < len(stages)}, *r) for made, *r in runs]
    )


def _stages(stages: list[str], places: set[int]) -> set[str]:
    return {stages[place] for place in places}


policies = st.builds(
    RetentionPolicy,
    st.none() | st.integers(1, 3),
    st.none() | st.integers(0, 50).map(lambda days: timedelta(days=days)),
)


class Built:
    """A World written to a store, and what gc must keep of it, computed independently of the code under test."""

    def __init__(self, world: World, store: Store) -> None:
        self.world, self.store = world, store
        self.keys = [key_of(f"artifact {place}") for place in range(len(world.artifacts))]
        self.manifests: dict[int, Manifest] = {}
        for place, node in enumerate(world.artifacts):
            manifest = self._manifest(place, node)
            self.manifests[place] = manifest
            if place not in world.unmade:
                self._write(artifact_path(node.stage, self.keys[place]), manifest, node)
        for place, node in world.checkpoints:
            self._write(checkpoint_path(node.stage, self.keys[place], node.step), self._manifest(place, node), node)
        for number, (place, young) in enumerate(world.torn):
            folder = artifact_path(world.artifacts[place].stage, self.keys[place])
            self._object(f"{folder}/torn{number}/weights", b"half", young)
        for number, (made, days, driven) in enumerate(world.runs):
            stages = {world.artifacts[p].stage: StageRecord(key=self.keys[p], state="done") for p in sorted(made)}
            at = NOW if driven else NOW - timedelta(days=days, seconds=number)
            more: dict[str, Any] = {} if driven else {"driver": DEAD_DRIVER, "state": "done"}
            record(store, f"run-{number}", stages=stages, updated_at=at, **more)
            self._date(f"runs/run-{number}/run.json", at)
            self._object(f"runs/run-{number}/logs/sft.log", b"a line", young=days == 0)

    def kept_runs(self, policy: RetentionPolicy) -> set[int]:
        ages = {number: 0 if driven else days for number, (_, days, driven) in enumerate(self.world.runs)}
        if policy == RetentionPolicy():
            return set(ages)
        newest = sorted(ages, key=lambda n: (ages[n], not self.world.runs[n][2], n))[: policy.newest or 0]
        bound = policy.younger_than or timedelta(0)
        return {n for n, days in ages.items() if n in newest or timedelta(days=days) < max(bound, GRACE)}

    def kept_artifacts(self, policy: RetentionPolicy) -> set[int]:
        pending = [place for run in self.kept_runs(policy) for place in self._recorded(run)]
        pending += [
            place for place, node in enumerate(self.world.artifacts) if node.young and self._was_published(place)
        ]
        pending += [place for place, node in self.world.checkpoints if node.young]
        pending += [place for place, young in self.world.torn if young]
        needed: set[int] = set()
        while pending:
            place = pending.pop()
            if place not in needed:
                needed.add(place)
                has_manifest = self._was_published(place) or any(
                    p == place and n.complete for p, n in self.world.checkpoints
                )
                pending += self.world.artifacts[place].made_from if has_manifest else ()
        return {place for place in needed if self._was_published(place)}

    def _recorded(self, run: int) -> list[int]:
        """Return the artifacts that a run's record names: one per stage, the last."""
        by_stage = {self.world.artifacts[place].stage: place for place in sorted(self.world.runs[run][0])}
        return list(by_stage.values())

    def _was_published(self, place: int) -> bool:
        return place not in self.world.unmade

    def existing(self) -> set[int]:
        """Return the artifacts that are in the store."""
        nodes = enumerate(self.world.artifacts)
        return {place for place, node in nodes if self.store.manifest(node.stage, self.keys[place])}

    def _manifest(self, place: int, node: Node) -> Manifest:
        parents = {
            self.world.artifacts[p].stage: Parent(key=self.keys[p], manifest_sha256=self.manifests[p].sha256())
            for p in sorted(node.made_from)
        }
        files = (File(path="weights", size_bytes=3, sha256=key_of("abc")),)
        return draft(self.keys[place], node.stage).model_copy(
            update={"parents": parents, "attempt": "won", "files": files}
        )

    def _write(self, folder: str, manifest: Manifest, node: Node) -> None:
        self._object(f"{folder}/won/weights", b"abc", node.young)
        if node.complete:
            self._object(f"{folder}/manifest.json", manifest.to_bytes(), node.young)

    def _object(self, path: str, data: bytes, young: bool) -> None:
        self.store.write(path, data)
        self._date(path, NOW - (timedelta(hours=1) if young else OLD))

    def _date(self, path: str, at: datetime) -> None:
        os.utime(self.store.objects.local_path(path), (at.timestamp(), at.timestamp()))  # type: ignore[attr-defined]


@pytest.fixture
def without_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of small files are written much faster without fsync."""
    monkeypatch.setattr(os, "fsync", lambda number: None)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(world=worlds(), policy=policies, crash_at=st.integers(0, 12))
def test_gc_interrupted_anywhere_keeps_what_is_needed_complete_and_a_second_gc_finishes(
    without_fsync: None, world: World, policy: RetentionPolicy, crash_at: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        built = Built(world, Store(Path(folder).as_uri()))
        store, before = built.store, built.existing()
        kept = built.kept_artifacts(policy)

        def collect(store: Store) -> None:
            garbage.remove(store, garbage.find(store, policy, NOW))

        assert {entry.path for entry in store.entries("")} >= {
            f"runs/run-{n}/run.json" for n in built.kept_runs(policy)
        }
        crashed_at(store, crash_at, collect)
        assert kept <= built.existing()
        for place in built.existing():  # each is complete, and no parent was removed before its child
            assert store.faults(built.manifests[place]) == []
            assert world.artifacts[place].made_from & before <= built.existing()
        collect(store)
        assert built.existing() == kept
        assert {entry.path.split("/")[1] for entry in store.entries("runs/") if entry.path.endswith("run.json")} == {
            f"run-{number}" for number in built.kept_runs(policy)
        }
        assert garbage.find(store, policy, NOW).items == ()
        for place, node in world.checkpoints:
            if node.young and node.complete:
                assert store.checkpoint_manifest(node.stage, built.keys[place], node.step or 0)


@pytest.fixture(params=["file", "s3"])
def either(request: pytest.FixtureRequest) -> Store:
    """An empty store, in a folder and in a bucket."""
    return Store(request.getfixturevalue(f"{request.param}_uri"))


LATER = NOW + timedelta(days=2)  # everything that a test writes is old by then


def drive(recipe: Recipe, store: Store, executor: FakeExecutor | None = None) -> None:
    Pipeline(recipe, store, executor or FakeExecutor(), RecordingObserver(), retry_after_s=()).drive()


def states(recipe: Recipe, store: Store) -> set[str]:
    """Return the states in the plan of a recipe."""
    return {stage.state for stage in plan(recipe, store)}


def test_removing_a_run_removes_the_artifacts_that_no_kept_run_needs(
    recipe: Callable[..., Recipe], either: Store
) -> None:
    drive(recipe(), either)
    drive(recipe("dpo.beta=0.2"), either)
    found = garbage.find(either, RetentionPolicy(newest=1), LATER)
    assert [item.name.split()[0] for item in found.items if item.kind == "artifact"] == ["evaluate", "merge", "dpo"]
    garbage.remove(either, found)
    assert states(recipe("dpo.beta=0.2"), either) == {"there"}
    assert {stage.kind for stage in garbage.find(either, RetentionPolicy(newest=1), LATER).items} == set()
    assert len({entry.path.split("/")[1] for entry in either.entries("runs/")}) == 1


def test_nothing_younger_than_a_day_is_removed(recipe: Callable[..., Recipe], either: Store) -> None:
    drive(recipe(), either)
    drive(recipe("dpo.beta=0.2"), either)
    assert garbage.find(either, RetentionPolicy(newest=1), datetime.now(UTC)).items == ()


def test_artifacts_that_a_kept_run_would_reuse_are_kept_though_its_record_does_not_name_them(
    recipe: Callable[..., Recipe], store: Store
) -> None:
    drive(recipe(), store)
    run = all_runs(store)[0]
    pending = {name: StageRecord() for name in SEQUENCE}  # submitted again, and not driven further yet
    store.write(f"runs/{run.run}/run.json", run.model_copy(update={"stages": pending}).model_dump_json().encode())
    assert garbage.find(store, RetentionPolicy(), LATER).items == ()


def test_superseded_checkpoints_are_removed_and_the_newest_of_an_unfinished_training_is_kept(
    recipe: Callable[..., Recipe], store: Store, tmp_path: Path
) -> None:
    with pytest.raises(DataError):
        drive(recipe(), store, FakeExecutor(sft=fail(DataError("no"))))
    key = all_runs(store)[0].stages["sft"].key
    assert key
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "weights").write_text("w")
    for step in (10, 20):
        store._publish(checkpoint_path("sft", key, step), tmp_path / "state", draft(key))
    store.write(f"{checkpoint_path('sft', key, 30)}/torn/weights", b"half")
    found = {
        item.name.rpartition("/")[2].rpartition(" ")[2]: item.kind
        for item in garbage.find(store, RetentionPolicy(), LATER).items
    }
    assert found == {"10": "checkpoint", "00000030": "leftover"}
    drive(recipe(), store)
    assert len(garbage.find(store, RetentionPolicy(), LATER).items) == 3


def test_uploaded_files_are_removed_with_the_last_recipe_that_names_them(either: Store) -> None:
    for name in ("aa", "bb", "cc"):
        either.write(f"inputs/{name}/rows.csv", b"question,answer\n")
    source = {"source": f"{either.uri}/inputs/aa/rows.csv"}
    other_version = {"sources": [f"{either.uri}/inputs/cc"]}  # another version may use other keys
    record(either, "one-11111111", recipe={"prepare": {"questions": source}}, driver=DEAD_DRIVER, state="done")
    record(
        either,
        "two-22222222",
        recipe={"compare": other_version},
        driver=DEAD_DRIVER,
        state="done",
        package_version="99",
    )
    assert garbage.find(either, RetentionPolicy(), LATER).items == (), "the run of a young file may wait in a queue"
    found = garbage.find(either, RetentionPolicy(), NOW + timedelta(days=8))
    assert [item.files for item in found.items] == [("inputs/bb/rows.csv",)]


def test_a_run_that_is_driven_again_keeps_the_keys_in_its_record_from_the_start(
    recipe: Callable[..., Recipe], store: Store
) -> None:
    """The gc of another version cannot compute the keys of what the run will reuse."""
    drive(recipe(), store)
    before = _keys(store)
    with RecordWriter(store, recipe(), lambda record: None):
        assert _keys(store) == before


def test_files_of_killed_writers_are_removed_and_foreign_files_are_kept(store: Store) -> None:
    for path in ("check/0011", "models/mine.bin", "artifacts/mine/x/y", "notes.txt"):
        store.write(path, b"x")
    root = store.objects.local_path("check").parent  # type: ignore[attr-defined]
    (root / "artifacts" / ".writing-0123").write_text("half")
    found = garbage.find(store, RetentionPolicy(newest=1), LATER)
    assert {path for item in found.items for path in item.files} == {"check/0011", "artifacts/.writing-0123"}
    garbage.remove(store, found)
    assert {entry.path for entry in store.entries("")} == {"models/mine.bin", "artifacts/mine/x/y", "notes.txt"}
    assert garbage.find(store, RetentionPolicy(newest=1), LATER).items == ()


@pytest.mark.parametrize("what", ["record", "manifest"])
def test_nothing_is_removed_if_a_record_or_manifest_cannot_be_read(
    recipe: Callable[..., Recipe], store: Store, what: str
) -> None:
    drive(recipe(), store)
    name = "run.json" if what == "record" else "manifest.json"
    paths = [entry.path for entry in store.entries("") if entry.path.endswith(name)]
    store.write(paths[0], b"{}")
    with pytest.raises(IntegrityError, match="nothing was removed, because it is unknown what must be kept"):
        garbage.find(store, RetentionPolicy(newest=1), LATER)


def test_a_fetch_during_gc_fails_with_one_line(recipe: Callable[..., Recipe], either: Store, tmp_path: Path) -> None:
    drive(recipe(), either)
    manifest = either.manifest("prepare", _keys(either)["prepare"])
    assert manifest
    for entry in list(either.entries("runs/")):
        either.objects.delete(entry.path)
    garbage.remove(either, garbage.find(either, RetentionPolicy(), LATER))
    with pytest.raises(DataError, match="was removed while it was read, by gc or by hand; run again"):
        either.fetch(manifest, tmp_path / "into")


def _keys(store: Store) -> dict[str, str]:
    return {name: stage.key or "" for name, stage in all_runs(store)[0].stages.items()}


def test_gc_removes_only_with_delete(recipe: Callable[..., Recipe], file_uri: str, launcher: Launcher) -> None:
    store = Store(file_uri)
    drive(recipe(), store)
    for entry in list(store.entries("runs/")):
        store.objects.delete(entry.path)
    _make_old(store)
    code, shown, _ = launcher.run("gc", "--store", file_uri)
    assert code == 0
    assert "would be removed; add --delete to remove it; 0 runs kept" in shown
    assert _manifests(store)
    code, printed, _ = launcher.run("gc", "--store", file_uri, "--delete", "--json")
    assert code == 0
    answer = json.loads(printed)
    assert answer["removed"] is True
    assert len(answer["items"]) == len(SEQUENCE)
    assert list(store.entries("")) == []
    assert "nothing to remove" in launcher.run("gc", "--store", file_uri)[1]


@pytest.mark.parametrize("age", ["30", "d", "-1d", "1y", "1.5d"])
def test_an_invalid_age_is_a_usage_error(launcher: Launcher, file_uri: str, age: str) -> None:
    code, _, err = launcher.run("gc", "--store", file_uri, f"--older-than={age}")
    assert code == 2
    assert "expected an age such as 30d, 12h or 2w" in err


def _manifests(store: Store) -> list[str]:
    return [entry.path for entry in store.entries("artifacts/") if entry.path.endswith("manifest.json")]


def _make_old(store: Store) -> None:
    at_s = (NOW - OLD).timestamp()
    for path in _files(store.objects.local_path("artifacts").parent):  # type: ignore[attr-defined]
        os.utime(path, (at_s, at_s))


def _files(root: Path) -> Iterator[Path]:
    return (path for path in root.rglob("*") if path.is_file())
