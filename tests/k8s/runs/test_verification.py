"""`verify`: a whole run is right, or what is wrong with it is named."""

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
from tests.k8s.acting import Acting, publish
from tests.k8s.conftest import Launcher
from tests.k8s.runs.test_pipeline import Seen
from tests.store.samples import draft, make_folder


@pytest.fixture(params=["file", "s3"])
def store(request: pytest.FixtureRequest) -> Store:
    """In a folder and in a bucket."""
    return Store(request.getfixturevalue(f"{request.param}_uri"))


@pytest.fixture
def done(store: Store, recipe: Callable[..., Recipe]) -> Recipe:
    Pipeline(recipe(), store, Acting(), Seen(), retry_after_s=()).drive()
    return recipe()


def told(store: Store) -> dict[str, str]:
    """State and text of each check, by name."""
    return {check.name: f"{check.state} {check}" for check in verify(store, all_runs(store)[0])}


def wrong(store: Store) -> dict[str, str]:
    return {name: text for name, text in told(store).items() if not text.startswith("ok")}


def manifest_of(store: Store, stage: str) -> Manifest:
    manifest = store.manifest(stage, all_runs(store)[0].stages[stage].key or "")
    assert manifest
    return manifest


def test_a_run_as_it_was_made_is_right(store: Store, done: Recipe) -> None:
    assert set(told(store)) == {
        *SEQUENCE,
        *(f"{stage} parents" for stage in SEQUENCE[1:]),
        "logs",
        "report",
        "statement",
        "statement signature",
    }
    assert wrong(store) == {}


def test_a_changed_a_shortened_and_a_missing_file_are_each_named(store: Store, done: Recipe) -> None:
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


def test_a_changed_manifest_is_named_and_so_are_its_children(store: Store, done: Recipe) -> None:
    dpo = manifest_of(store, "dpo")
    path = f"{dpo.folder.rpartition('/')[0]}/manifest.json"
    data = store.read(path)
    assert data
    store.write(path, data.replace(b'"seed": 42', b'"seed": 43'))
    found = wrong(store)
    assert set(found) == {"dpo", "merge parents", "evaluate parents", "statement"}
    assert "was changed after it was written" in found["dpo"]


def test_an_artifact_that_is_gone_is_named(store: Store, done: Recipe) -> None:
    store.objects.delete(f"{manifest_of(store, 'merge').folder.rpartition('/')[0]}/manifest.json")
    assert "the store has no artifact" in wrong(store)["merge"]


def test_a_parent_that_was_made_again_with_the_same_bytes_is_right(store: Store, done: Recipe) -> None:
    sft = manifest_of(store, "sft")
    store.objects.delete(f"{sft.folder.rpartition('/')[0]}/manifest.json")
    publish("sft", done, store)
    assert [name for name, text in wrong(store).items() if text.startswith("FAIL")] == []
    assert "which were made again since" in told(store)["dpo parents"]


def test_a_child_of_other_bytes_is_named(store: Store, done: Recipe) -> None:
    """A manifest whose digest is right, in the place of a parent: only the child's own record tells."""
    sft = manifest_of(store, "sft")
    forged = sft.model_copy(update={"files": manifest_of(store, "dpo").files, "attempt": "forged"})
    for file in manifest_of(store, "dpo").files:
        data = store.read(f"{manifest_of(store, 'dpo').folder}/{file.path}")
        store.write(f"{forged.folder}/{file.path}", data or b"")
    store.write(f"{sft.folder.rpartition('/')[0]}/manifest.json", forged.to_bytes())
    assert set(wrong(store)) == {"dpo parents", "merge parents", "evaluate parents", "statement"}


def test_a_report_that_is_not_evaluates_is_named(store: Store, done: Recipe) -> None:
    run = all_runs(store)[0].run
    store.write(f"runs/{run}/report/report.md", b"all is well")
    store.objects.delete(f"runs/{run}/report/report.html")
    found = wrong(store)
    assert set(found) == {"report"}
    assert "report.md is not that of evaluate" in found["report"]
    assert "report.html is missing" in found["report"]


def is_sealed_no_more(store: Store, run: str) -> bool:
    """Whether the record itself is refused, by its name."""
    try:
        find(store, run)
    except IntegrityError as error:
        return "run.json" in str(error)
    return False


def test_a_flipped_bit_anywhere_in_what_a_run_has_of_its_own_is_found(store: Store, done: Recipe) -> None:
    run, chance, files = all_runs(store)[0], random.Random(2), set()
    for entry in list(store.entries(f"runs/{run.run}/")):
        files.add(entry.path.split("/", 2)[2])
        whole = store.read(entry.path) or b""
        for place in [0, len(whole) - 1, *(chance.randrange(len(whole)) for _ in range(6))]:
            flipped = whole[place] ^ 1 << chance.randrange(8)
            store.write(entry.path, whole[:place] + bytes([flipped]) + whole[place + 1 :])
            if entry.path.endswith("run.json") and is_sealed_no_more(store, run.run):
                continue
            named = [check for check in verify(store, find(store, run.run)) if check.state != "ok"]
            assert named, (entry.path, place, flipped)
        store.write(entry.path, whole)
    assert files >= {"run.json", "model.intoto.jsonl", "logs/sft.log", "report/report.md"}
    assert wrong(store) == {}


def test_a_log_that_is_gone_is_named_and_one_that_is_gone_on_with_is_right(store: Store, done: Recipe) -> None:
    run = all_runs(store)[0].run
    store.objects.delete(f"artifacts/sft/{manifest_of(store, 'sft').key}/manifest.json")
    Pipeline(done, store, Acting(), Seen(), retry_after_s=()).drive()
    assert told(store)["logs"].startswith("ok")
    store.objects.delete(f"runs/{run}/logs/merge.log")
    assert "logs/merge.log is missing" in wrong(store)["logs"]


def test_a_finished_run_whose_record_names_no_artifact_is_wrong(store: Store, done: Recipe) -> None:
    run = all_runs(store)[0]
    stages = {name: about for name, about in run.stages.items() if name != "merge"}
    store.write(f"runs/{run.run}/run.json", run.model_copy(update={"stages": stages}).to_bytes())
    assert wrong(store)["merge"].startswith("FAIL the record does not name its artifact")


def test_a_file_that_the_manifest_does_not_list_is_told(store: Store, done: Recipe) -> None:
    store.write(f"{manifest_of(store, 'dpo').folder}/added.bin", b"?")
    assert "added.bin: nothing reads them" in wrong(store)["dpo folder"]


def test_checkpoints_are_read_too(store: Store, done: Recipe, tmp_path: Path) -> None:
    key = manifest_of(store, "sft").key
    for step in (10, 20):
        store._publish(checkpoint_path("sft", key, step), make_folder(tmp_path / str(step)), draft(key))
    store.write(f"{checkpoint_path('sft', key, 30)}/torn/weights", b"half")
    manifest = store.checkpoint_manifest("sft", key, 20)
    assert manifest
    store.write(f"{checkpoint_path('sft', key, 20)}/{manifest.attempt}/one.byte", b"\x00\x00")
    found = told(store)
    assert found["sft checkpoint at step 10"].startswith("ok")
    assert found["sft checkpoint at step 20"].startswith("FAIL")
    assert found["sft checkpoint at step 30"].startswith("warning is not complete")


def test_the_command_says_it_line_by_line_and_ends_with_the_code(
    file_uri: str, recipe: Callable[..., Recipe], launcher: Launcher
) -> None:
    store = Store(file_uri)
    Pipeline(recipe(), store, Acting(), Seen(), retry_after_s=()).drive()
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
