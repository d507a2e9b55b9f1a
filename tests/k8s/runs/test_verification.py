"""`verify`: an intact run passes, and each kind of damage fails the check that names it."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from llamarefine_jobs.contract.artifact import Manifest, checkpoint_path
from llamarefine_jobs.contract.errors import IntegrityError
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.stages import SEQUENCE
from llamarefine_jobs.store import Store
from llamarefine_k8s.runs.pipeline import Pipeline
from llamarefine_k8s.runs.records import all_runs, find
from llamarefine_k8s.runs.verification import verify
from tests.k8s.acting import FakeExecutor, publish
from tests.k8s.conftest import Launcher
from tests.k8s.runs.test_pipeline import RecordingObserver
from tests.store.samples import draft, make_folder


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest) -> Store:
    """An empty store, in a folder and in a bucket."""
    return Store(request.getfixturevalue(f"{request.param}_uri"))


@pytest.fixture
def done(store: Store, recipe: Callable[..., Recipe]) -> Recipe:
    """The recipe of a finished run."""
    Pipeline(recipe(), store, FakeExecutor(), RecordingObserver(), retry_after_s=()).drive()
    return recipe()


def outcomes(store: Store) -> dict[str, str]:
    """Return state and text of each check, by name."""
    return {check.name: f"{check.state} {check}" for check in verify(store, all_runs(store)[0])}


def wrong(store: Store) -> dict[str, str]:
    """Return the checks that did not pass."""
    return {name: text for name, text in outcomes(store).items() if not text.startswith("ok")}


def manifest_of(store: Store, stage: str) -> Manifest:
    manifest = store.manifest(stage, all_runs(store)[0].stages[stage].key or "")
    assert manifest
    return manifest


def test_an_intact_run_passes_every_check(store: Store, done: Recipe) -> None:
    assert set(outcomes(store)) == {
        *SEQUENCE,
        *(f"{stage} parents" for stage in SEQUENCE[1:]),
        "logs",
        "report",
        "statement",
        "statement signature",
    }
    assert wrong(store) == {}


def test_a_changed_a_truncated_and_a_missing_file_are_each_named(store: Store, done: Recipe) -> None:
    prepare = manifest_of(store, "prepare")
    paths = [f"{prepare.folder}/{file.path}" for file in prepare.files]
    data = store.read(paths[0])
    assert data
    store.write(paths[0], data[:-1] + b"x")
    store.write(paths[1], b"short")
    store.objects.delete(paths[2])
    found = [str(check) for check in verify(store, all_runs(store)[0]) if check.state == "FAIL"]
    assert len(found) == 3
    assert "expected sha256" in found[0]
    assert "bytes, found 5" in found[1]
    assert "is missing, though the manifest lists it" in found[2]
    assert all(path in text for path, text in zip(paths, found, strict=False))


def test_a_changed_manifest_fails_its_artifact_and_its_children(store: Store, done: Recipe) -> None:
    dpo = manifest_of(store, "dpo")
    path = f"{dpo.folder.rpartition('/')[0]}/manifest.json"
    data = store.read(path)
    assert data
    store.write(path, data.replace(b'"seed": 42', b'"seed": 43'))
    found = wrong(store)
    assert set(found) == {"dpo", "merge parents", "evaluate parents", "statement"}
    assert "was changed after it was written" in found["dpo"]


def test_a_missing_artifact_is_named(store: Store, done: Recipe) -> None:
    store.objects.delete(f"{manifest_of(store, 'merge').folder.rpartition('/')[0]}/manifest.json")
    assert "the store has no artifact" in wrong(store)["merge"]


def test_a_parent_made_again_with_the_same_bytes_passes(store: Store, done: Recipe) -> None:
    sft = manifest_of(store, "sft")
    store.objects.delete(f"{sft.folder.rpartition('/')[0]}/manifest.json")
    publish("sft", done, store)
    assert [name for name, text in wrong(store).items() if text.startswith("FAIL")] == []
    assert "which have been made again since" in outcomes(store)["dpo parents"]


def test_a_forged_parent_fails_its_children(store: Store, done: Recipe) -> None:
    """The forged manifest has a valid digest, so only the child's manifest shows that the parent was replaced."""
    sft = manifest_of(store, "sft")
    forged = sft.model_copy(update={"files": manifest_of(store, "dpo").files, "attempt": "forged"})
    for file in manifest_of(store, "dpo").files:
        data = store.read(f"{manifest_of(store, 'dpo').folder}/{file.path}")
        store.write(f"{forged.folder}/{file.path}", data or b"")
    store.write(f"{sft.folder.rpartition('/')[0]}/manifest.json", forged.to_bytes())
    assert set(wrong(store)) == {"dpo parents", "merge parents", "evaluate parents", "statement"}


def test_a_changed_or_missing_report_file_is_named(store: Store, done: Recipe) -> None:
    run = all_runs(store)[0].run
    store.write(f"runs/{run}/report/report.md", b"all is well")
    store.objects.delete(f"runs/{run}/report/report.html")
    found = wrong(store)
    assert set(found) == {"report"}
    assert "report.md differs from the artifact of evaluate" in found["report"]
    assert "report.html is missing" in found["report"]


def is_record_refused(store: Store, run: str) -> bool:
    """Whether reading the run's record fails with an error that names its file."""
    try:
        find(store, run)
    except IntegrityError as error:
        return "run.json" in str(error)
    return False


def test_a_flipped_bit_in_any_file_of_a_run_is_found(store: Store, done: Recipe) -> None:
    run, random_numbers, files = all_runs(store)[0], random.Random(2), set()
    for entry in list(store.entries(f"runs/{run.run}/")):
        files.add(entry.path.split("/", 2)[2])
        whole = store.read(entry.path) or b""
        for place in [0, len(whole) - 1, *(random_numbers.randrange(len(whole)) for _ in range(6))]:
            flipped = whole[place] ^ 1 << random_numbers.randrange(8)
            store.write(entry.path, whole[:place] + bytes([flipped]) + whole[place + 1 :])
            if entry.path.endswith("run.json") and is_record_refused(store, run.run):
                continue
            failed = [check for check in verify(store, find(store, run.run)) if check.state != "ok"]
            assert failed, (entry.path, place, flipped)
        store.write(entry.path, whole)
    assert files >= {"run.json", "model.intoto.jsonl", "logs/sft.log", "report/report.md"}
    assert wrong(store) == {}


def test_a_missing_log_is_named_and_a_log_continued_by_a_second_drive_passes(store: Store, done: Recipe) -> None:
    run = all_runs(store)[0].run
    store.objects.delete(f"artifacts/sft/{manifest_of(store, 'sft').key}/manifest.json")
    Pipeline(done, store, FakeExecutor(), RecordingObserver(), retry_after_s=()).drive()
    assert outcomes(store)["logs"].startswith("ok")
    store.objects.delete(f"runs/{run}/logs/merge.log")
    assert "logs/merge.log is missing" in wrong(store)["logs"]


def test_a_finished_run_whose_record_names_no_artifact_fails(store: Store, done: Recipe) -> None:
    run = all_runs(store)[0]
    stages = {name: stage for name, stage in run.stages.items() if name != "merge"}
    store.write(f"runs/{run.run}/run.json", run.model_copy(update={"stages": stages}).to_bytes())
    assert wrong(store)["merge"].startswith("FAIL the record does not name its artifact")


def test_a_file_that_no_manifest_lists_is_a_warning(store: Store, done: Recipe) -> None:
    store.write(f"{manifest_of(store, 'dpo').folder}/added.bin", b"?")
    assert "added.bin: nothing reads them" in wrong(store)["dpo folder"]


def test_checkpoints_are_verified(store: Store, done: Recipe, tmp_path: Path) -> None:
    key = manifest_of(store, "sft").key
    for step in (10, 20):
        store._publish(checkpoint_path("sft", key, step), make_folder(tmp_path / str(step)), draft(key))
    store.write(f"{checkpoint_path('sft', key, 30)}/torn/weights", b"half")
    manifest = store.checkpoint_manifest("sft", key, 20)
    assert manifest
    store.write(f"{checkpoint_path('sft', key, 20)}/{manifest.attempt}/one.byte", b"\x00\x00")
    found = outcomes(store)
    assert found["sft checkpoint at step 10"].startswith("ok")
    assert found["sft checkpoint at step 20"].startswith("FAIL")
    assert found["sft checkpoint at step 30"].startswith("warning is incomplete")


def test_the_command_prints_one_line_per_check_and_exits_with_16_for_damage(
    file_uri: str, recipe: Callable[..., Recipe], launcher: Launcher
) -> None:
    store = Store(file_uri)
    Pipeline(recipe(), store, FakeExecutor(), RecordingObserver(), retry_after_s=()).drive()
    code, out, _ = launcher.run("verify", "--store", file_uri)
    assert code == 0
    assert out.splitlines()[0].startswith("ok      prepare: ")
    merge = manifest_of(store, "merge")
    store.write(f"{merge.folder}/{merge.files[0].path}", b"!")
    code, out, err = launcher.run("verify", "--store", file_uri, "--json")
    assert code == 16
    assert err.strip().endswith("1 of 13 checks failed")
    checks = json.loads(out)["checks"]
    assert [check["name"] for check in checks if check["state"] == "FAIL"] == ["merge"]
