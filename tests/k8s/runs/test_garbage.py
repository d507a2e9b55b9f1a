"""What `gc` may remove and what it never does: random stores, crashes at every step, a folder and a bucket."""

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
from llamarefine_k8s.runs.garbage import GRACE, Keep
from llamarefine_k8s.runs.pipeline import Pipeline
from llamarefine_k8s.runs.plan import plan
from llamarefine_k8s.runs.records import Journal, StageRecord, all_runs
from tests.k8s.acting import Acting, fail
from tests.k8s.conftest import Launcher
from tests.k8s.runs.test_pipeline import Seen
from tests.k8s.runs.test_records import NOBODY, record
from tests.store.samples import draft, key_of
from tests.store.test_crashes import crashed_at

NOW = datetime.now(UTC)
OLD = timedelta(days=9)


@dataclass
class Node:
    """An artifact or a checkpoint of a random store; `made_from` are places in the list of artifacts."""

    stage: str
    made_from: set[int] = field(default_factory=set)
    young: bool = False
    step: int | None = None
    complete: bool = True


@dataclass
class World:
    """A random store, in words."""

    artifacts: list[Node]
    checkpoints: list[tuple[int, Node]]  # of the training whose artifact stands, or was never made, at that place
    torn: list[tuple[int, bool]]
    unmade: set[int]
    runs: list[tuple[set[int], int, bool]]  # what it recorded, its age in days, whether it is being driven


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


keeps = st.builds(
    Keep, st.none() | st.integers(1, 3), st.none() | st.integers(0, 50).map(lambda days: timedelta(days=days))
)


class Built:
    """The world as a store, and what must be left of it, worked out apart from the code under test."""

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
            more: dict[str, Any] = {} if driven else {"driver": NOBODY, "state": "done"}
            record(store, f"run-{number}", stages=stages, updated_at=at, **more)
            self._date(f"runs/run-{number}/run.json", at)
            self._object(f"runs/run-{number}/logs/sft.log", b"a line", young=days == 0)

    def kept_runs(self, keep: Keep) -> set[int]:
        ages = {number: 0 if driven else days for number, (_, days, driven) in enumerate(self.world.runs)}
        if keep == Keep():
            return set(ages)
        newest = sorted(ages, key=lambda n: (ages[n], not self.world.runs[n][2], n))[: keep.newest or 0]
        bound = keep.younger_than or timedelta(0)
        return {n for n, days in ages.items() if n in newest or timedelta(days=days) < max(bound, GRACE)}

    def kept_artifacts(self, keep: Keep) -> set[int]:
        pending = [place for run in self.kept_runs(keep) for place in self._recorded(run)]
        pending += [place for place, node in enumerate(self.world.artifacts) if node.young and self._stands(place)]
        pending += [place for place, node in self.world.checkpoints if node.young]
        pending += [place for place, young in self.world.torn if young]
        reached: set[int] = set()
        while pending:
            place = pending.pop()
            if place not in reached:
                reached.add(place)
                has_manifest = self._stands(place) or any(p == place and n.complete for p, n in self.world.checkpoints)
                pending += self.world.artifacts[place].made_from if has_manifest else ()
        return {place for place in reached if self._stands(place)}

    def _recorded(self, run: int) -> list[int]:
        """Of two artifacts of one stage a record names the last."""
        by_stage = {self.world.artifacts[place].stage: place for place in sorted(self.world.runs[run][0])}
        return list(by_stage.values())

    def _stands(self, place: int) -> bool:
        return place not in self.world.unmade

    def standing(self) -> set[int]:
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
def seldom_flushed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of small files need not outlive a power cut."""
    monkeypatch.setattr(os, "fsync", lambda number: None)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(world=worlds(), keep=keeps, crash_at=st.integers(0, 12))
def test_whatever_the_store_and_wherever_it_is_cut_off_what_is_kept_is_whole_and_a_second_gc_ends_the_work(
    seldom_flushed: None, world: World, keep: Keep, crash_at: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        built = Built(world, Store(Path(folder).as_uri()))
        store, before = built.store, built.standing()
        kept = built.kept_artifacts(keep)

        def collect(store: Store) -> None:
            garbage.remove(store, garbage.find(store, keep, NOW))

        assert {entry.path for entry in store.entries("")} >= {f"runs/run-{n}/run.json" for n in built.kept_runs(keep)}
        crashed_at(store, crash_at, collect)
        assert kept <= built.standing()
        for place in built.standing():  # nothing is there by half, and nobody's parent went first
            assert store.faults(built.manifests[place]) == []
            assert world.artifacts[place].made_from & before <= built.standing()
        collect(store)
        assert built.standing() == kept
        assert {entry.path.split("/")[1] for entry in store.entries("runs/") if entry.path.endswith("run.json")} == {
            f"run-{number}" for number in built.kept_runs(keep)
        }
        assert garbage.find(store, keep, NOW).items == ()
        for place, node in world.checkpoints:
            if node.young and node.complete:
                assert store.checkpoint_manifest(node.stage, built.keys[place], node.step or 0)


@pytest.fixture(params=["file", "s3"])
def either(request: pytest.FixtureRequest) -> Store:
    """An empty store, in a folder and in a bucket."""
    return Store(request.getfixturevalue(f"{request.param}_uri"))


LATER = NOW + timedelta(days=2)  # when all that a test makes is old


def drive(recipe: Recipe, store: Store, executor: Acting | None = None) -> None:
    Pipeline(recipe, store, executor or Acting(), Seen(), retry_after_s=()).drive()


def states(recipe: Recipe, store: Store) -> set[str]:
    return {stage.state for stage in plan(recipe, store)}


def test_a_run_takes_along_what_no_other_was_made_from(recipe: Callable[..., Recipe], either: Store) -> None:
    drive(recipe(), either)
    drive(recipe("dpo.beta=0.2"), either)
    found = garbage.find(either, Keep(newest=1), LATER)
    assert [item.name.split()[0] for item in found.items if item.kind == "artifact"] == ["evaluate", "merge", "dpo"]
    garbage.remove(either, found)
    assert states(recipe("dpo.beta=0.2"), either) == {"there"}
    assert {stage.kind for stage in garbage.find(either, Keep(newest=1), LATER).items} == set()
    assert len({entry.path.split("/")[1] for entry in either.entries("runs/")}) == 1


def test_within_a_day_nothing_goes(recipe: Callable[..., Recipe], either: Store) -> None:
    drive(recipe(), either)
    drive(recipe("dpo.beta=0.2"), either)
    assert garbage.find(either, Keep(newest=1), datetime.now(UTC)).items == ()


def test_what_a_kept_run_would_find_again_stays_though_its_record_does_not_say_so(
    recipe: Callable[..., Recipe], store: Store
) -> None:
    drive(recipe(), store)
    run = all_runs(store)[0]
    begun = {name: StageRecord() for name in SEQUENCE}  # submitted again, and driven no further than this
    store.write(f"runs/{run.run}/run.json", run.model_copy(update={"stages": begun}).model_dump_json().encode())
    assert garbage.find(store, Keep(), LATER).items == ()


def test_checkpoints_that_are_over_go_and_the_newest_of_an_unfinished_training_stays(
    recipe: Callable[..., Recipe], store: Store, tmp_path: Path
) -> None:
    with pytest.raises(DataError):
        drive(recipe(), store, Acting(sft=fail(DataError("no"))))
    key = all_runs(store)[0].stages["sft"].key
    assert key
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "weights").write_text("w")
    for step in (10, 20):
        store._publish(checkpoint_path("sft", key, step), tmp_path / "state", draft(key))
    store.write(f"{checkpoint_path('sft', key, 30)}/torn/weights", b"half")
    found = {
        item.name.rpartition("/")[2].rpartition(" ")[2]: item.kind for item in garbage.find(store, Keep(), LATER).items
    }
    assert found == {"10": "checkpoint", "00000030": "leftover"}
    drive(recipe(), store)
    assert len(garbage.find(store, Keep(), LATER).items) == 3


def test_uploaded_files_go_with_the_last_recipe_that_names_them(either: Store) -> None:
    for name in ("aa", "bb", "cc"):
        either.write(f"inputs/{name}/rows.csv", b"question,answer\n")
    source = {"source": f"{either.uri}/inputs/aa/rows.csv"}
    later = {"sources": [f"{either.uri}/inputs/cc"]}  # as a later version may write it down
    record(either, "one-11111111", recipe={"prepare": {"questions": source}}, driver=NOBODY, state="done")
    record(either, "two-22222222", recipe={"compare": later}, driver=NOBODY, state="done", package_version="99")
    assert garbage.find(either, Keep(), LATER).items == (), "its run may wait in a queue"
    found = garbage.find(either, Keep(), NOW + timedelta(days=8))
    assert [item.files for item in found.items] == [("inputs/bb/rows.csv",)]


def test_a_run_that_is_driven_again_names_what_it_has_from_the_first_moment(
    recipe: Callable[..., Recipe], store: Store
) -> None:
    """Another version's gc cannot work out what it will find."""
    drive(recipe(), store)
    before = _keys(store)
    with Journal(store, recipe(), lambda record: None):
        assert _keys(store) == before


def test_what_killed_writers_left_goes_and_what_is_not_ours_stays(store: Store) -> None:
    for path in ("check/0011", "models/mine.bin", "artifacts/mine/x/y", "notes.txt"):
        store.write(path, b"x")
    root = store.objects.local_path("check").parent  # type: ignore[attr-defined]
    (root / "artifacts" / ".writing-0123").write_text("half")
    found = garbage.find(store, Keep(newest=1), LATER)
    assert {path for item in found.items for path in item.files} == {"check/0011", "artifacts/.writing-0123"}
    garbage.remove(store, found)
    assert {entry.path for entry in store.entries("")} == {"models/mine.bin", "artifacts/mine/x/y", "notes.txt"}
    assert garbage.find(store, Keep(newest=1), LATER).items == ()


@pytest.mark.parametrize("what", ["record", "manifest"])
def test_where_what_is_kept_cannot_be_known_nothing_goes(
    recipe: Callable[..., Recipe], store: Store, what: str
) -> None:
    drive(recipe(), store)
    name = "run.json" if what == "record" else "manifest.json"
    paths = [entry.path for entry in store.entries("") if entry.path.endswith(name)]
    store.write(paths[0], b"{}")
    with pytest.raises(IntegrityError, match="nothing was removed, for what is kept cannot be known"):
        garbage.find(store, Keep(newest=1), LATER)


def test_a_fetch_that_meets_gc_says_so_in_one_line(
    recipe: Callable[..., Recipe], either: Store, tmp_path: Path
) -> None:
    drive(recipe(), either)
    manifest = either.manifest("prepare", _keys(either)["prepare"])
    assert manifest
    for entry in list(either.entries("runs/")):
        either.objects.delete(entry.path)
    garbage.remove(either, garbage.find(either, Keep(), LATER))
    with pytest.raises(DataError, match="was removed while it was read, by gc or by hand; run again"):
        either.fetch(manifest, tmp_path / "into")


def _keys(store: Store) -> dict[str, str]:
    return {name: stage.key or "" for name, stage in all_runs(store)[0].stages.items()}


def test_gc_shows_and_only_delete_removes(recipe: Callable[..., Recipe], file_uri: str, launcher: Launcher) -> None:
    store = Store(file_uri)
    drive(recipe(), store)
    for entry in list(store.entries("runs/")):
        store.objects.delete(entry.path)
    _age(store)
    code, shown, _ = launcher.run("gc", "--store", file_uri)
    assert code == 0
    assert "would go, and --delete removes it; 0 runs stay" in shown
    assert _manifests(store)
    code, told, _ = launcher.run("gc", "--store", file_uri, "--delete", "--json")
    assert code == 0
    answer = json.loads(told)
    assert answer["removed"] is True
    assert len(answer["items"]) == len(SEQUENCE)
    assert list(store.entries("")) == []
    assert "nothing to remove" in launcher.run("gc", "--store", file_uri)[1]


@pytest.mark.parametrize("age", ["30", "d", "-1d", "1y", "1.5d"])
def test_an_age_that_is_none_is_told(launcher: Launcher, file_uri: str, age: str) -> None:
    code, _, said = launcher.run("gc", "--store", file_uri, f"--older-than={age}")
    assert code == 2
    assert "expected an age such as 30d, 12h or 2w" in said


def _manifests(store: Store) -> list[str]:
    return [entry.path for entry in store.entries("artifacts/") if entry.path.endswith("manifest.json")]


def _age(store: Store) -> None:
    at_s = (NOW - OLD).timestamp()
    for path in _files(store.objects.local_path("artifacts").parent):  # type: ignore[attr-defined]
        os.utime(path, (at_s, at_s))


def _files(root: Path) -> Iterator[Path]:
    return (path for path in root.rglob("*") if path.is_file())
