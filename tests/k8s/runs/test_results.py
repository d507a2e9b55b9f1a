"""Copying a model, an adapter or a report to a folder."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamarefine_jobs.contract.artifact import Manifest
from llamarefine_jobs.contract.errors import DataError, GateError, IntegrityError
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.store import Store
from llamarefine_k8s.runs.pipeline import Pipeline
from llamarefine_k8s.runs.records import RunRecord
from llamarefine_k8s.runs.results import PARTS, _work_folder, check_gates, part_of, pull, pull_report, read_report
from tests.k8s.acting import FakeExecutor
from tests.k8s.runs.test_pipeline import RecordingObserver

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["llamarefine_k8s.runs.results", __name__])


@pytest.fixture
def record(recipe: Callable[..., Recipe], store: Store) -> RunRecord:
    return Pipeline(recipe(), store, FakeExecutor(), RecordingObserver()).drive()


@pytest.fixture
def model(record: RunRecord, store: Store) -> Manifest:
    return part_of(store, record, "model")


@pytest.fixture
def newer(record: RunRecord, store: Store, recipe: Callable[..., Recipe]) -> Manifest:
    """Another model in the same store."""
    return part_of(
        store, Pipeline(recipe("merge.dtype=float32"), store, FakeExecutor(), RecordingObserver()).drive(), "model"
    )


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("what", PARTS)
def test_each_part_is_copied_to_a_folder_of_its_own(record: RunRecord, store: Store, tmp_path: Path, what: str) -> None:
    pull(store, part_of(store, record, what), what, tmp_path / "deep" / "here")
    expected = ["report.html", "report.json", "report.md"] if what == "report" else ["content.txt"]
    assert files_in(tmp_path / "deep" / "here") == expected
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["here"], "no temporary file is left"


def test_a_folder_with_the_same_content_is_not_touched(model: Manifest, store: Store, tmp_path: Path) -> None:
    pull(store, model, "model", tmp_path / "model")
    before = (tmp_path / "model" / "content.txt").stat()
    pull(store, model, "model", tmp_path / "model")
    assert (tmp_path / "model" / "content.txt").stat() == before


def test_another_model_of_the_store_is_replaced(model: Manifest, newer: Manifest, store: Store, tmp_path: Path) -> None:
    pull(store, model, "model", tmp_path / "model")
    pull(store, newer, "model", tmp_path / "model")
    assert "float32" in (tmp_path / "model" / "content.txt").read_text()


def test_foreign_files_are_not_replaced_without_force(model: Manifest, store: Store, tmp_path: Path) -> None:
    pull(store, model, "model", tmp_path / "model")
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"holds files that are not from this store; .* --force"):
        pull(store, model, "model", tmp_path / "model")
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"
    pull(store, model, "model", tmp_path / "model", force=True)
    assert files_in(tmp_path / "model") == ["content.txt"]


def test_an_empty_folder_is_filled(model: Manifest, store: Store, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    pull(store, model, "model", tmp_path / "model")
    assert files_in(tmp_path / "model") == ["content.txt"]


def test_a_file_in_place_of_the_folder_is_an_error(model: Manifest, store: Store, tmp_path: Path) -> None:
    (tmp_path / "model").write_text("")
    with pytest.raises(DataError, match="expected a folder, found a file"):
        pull(store, model, "model", tmp_path / "model")


def test_a_damaged_artifact_leaves_the_old_folder_unchanged(
    model: Manifest, newer: Manifest, store: Store, tmp_path: Path
) -> None:
    pull(store, model, "model", tmp_path / "model")
    before = (tmp_path / "model" / "content.txt").read_bytes()
    Path(store.objects.root, newer.folder, "model", "content.txt").write_text("wrong")
    with pytest.raises(IntegrityError, match=r"model/content\.txt"):
        pull(store, newer, "model", tmp_path / "model")
    assert (tmp_path / "model" / "content.txt").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".model")] == []


def test_a_report_is_copied_beside_other_files(record: RunRecord, store: Store, tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "mine.txt").write_text("mine")
    for _ in range(2):
        pull_report(store, part_of(store, record, "report"), tmp_path / "demo")
    assert files_in(tmp_path / "demo") == ["mine.txt", "report.html", "report.json", "report.md"]


def test_a_missing_model_or_report_is_an_error(store: Store, record: RunRecord) -> None:
    stages = record.stages | {"merge": record.stages["merge"].model_copy(update={"key": None})}
    with pytest.raises(DataError, match="has no model yet: merge is not done"):
        part_of(store, record.model_copy(update={"stages": stages}), "model")
    with pytest.raises(DataError, match="nowhere-12345678 has no report yet"):
        read_report(store, "nowhere-12345678")


def test_the_error_of_a_failed_gate_names_metric_bound_and_value(recipe: Callable[..., Recipe], store: Store) -> None:
    gates = "evaluate.gates=[{metric: loss, at_most: 1.0}, {metric: loss, at_most: 3.0}]"
    record = Pipeline(recipe(gates), store, FakeExecutor(), RecordingObserver()).drive()
    with pytest.raises(GateError) as caught:
        check_gates(read_report(store, record.run))
    assert str(caught.value) == "quality gate: loss of merged is 2, not at most 1.0; model and report are kept"


def pull_and_die(uri: str, manifest: Manifest, place: Path, steps: int) -> None:
    """Pull, and kill this process before it has changed the file system `steps` times."""

    def count(event: str, arguments: Any) -> None:
        nonlocal steps
        if event in ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree"):
            steps -= 1
            if steps < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    pull(Store(uri), manifest, "model", place)


def test_a_pull_killed_at_any_step_loses_nothing_and_the_next_one_finishes(
    model: Manifest, newer: Manifest, store: Store, tmp_path: Path
) -> None:
    place = tmp_path / "here" / "model"
    pull(store, newer, "model", place)
    new = (place / "content.txt").read_bytes()
    pull(store, model, "model", place)
    old = (place / "content.txt").read_bytes()
    moved_away = 0
    for steps in range(100):
        process = PROCESSES.Process(target=pull_and_die, args=(store.uri, newer, place, steps))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        if not place.exists():
            moved_away += 1
            with pytest.raises(IntegrityError):  # the next pull fails, and still restores the folder
                pull(store, newer.model_copy(update={"attempt": "nowhere"}), "model", place)
            assert (place / "content.txt").read_bytes() == old
        assert (place / "content.txt").read_bytes() in (old, new)
        for manifest, content in ((newer, new), (model, old)):
            pull(store, manifest, "model", place)
            assert (place / "content.txt").read_bytes() == content
        assert [path.name for path in place.parent.iterdir()] == ["model"]
    assert moved_away
    assert steps < 99


def test_a_second_pull_to_the_same_folder_is_refused(model: Manifest, store: Store, tmp_path: Path) -> None:
    with _work_folder(tmp_path / "model"), pytest.raises(DataError, match="another pull is writing there"):
        pull(store, model, "model", tmp_path / "model")
    pull(store, model, "model", tmp_path / "model")


def test_a_failed_rename_leaves_the_old_model(model: Manifest, newer: Manifest, store: Store, tmp_path: Path) -> None:
    """The fetched folder is missing, as if someone had deleted it."""
    pull(store, model, "model", tmp_path / "model")
    before = (tmp_path / "model" / "content.txt").read_bytes()
    without_files = newer.model_copy(update={"files": ()})
    with pytest.raises(DataError, match="cannot read"):
        pull(store, without_files, "model", tmp_path / "model")
    assert (tmp_path / "model" / "content.txt").read_bytes() == before


def test_a_file_that_changed_after_a_pull_is_named(record: RunRecord, store: Store, tmp_path: Path) -> None:
    manifest = part_of(store, record, "report")
    pull(store, manifest, "report", tmp_path / "report")
    page = tmp_path / "report" / "report.html"
    data = page.read_bytes()
    page.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(IntegrityError, match=r"report\.html changed since the pull"):
        pull(store, manifest, "report", tmp_path / "report")
    pull(store, manifest, "report", tmp_path / "report", force=True)
    assert page.read_bytes() == data


def test_a_damaged_manifest_of_another_model_does_not_prevent_a_pull(
    model: Manifest, newer: Manifest, store: Store, tmp_path: Path
) -> None:
    first, second = sorted((model, newer), key=lambda manifest: manifest.key)  # in the order in which pull reads them
    pull(store, second, "model", tmp_path / "model")
    store.write(f"{first.folder.rpartition('/')[0]}/manifest.json", b"{}")
    pull(store, second, "model", tmp_path / "model")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("modeling_own.py", "import os"),
        ("pytorch_model.bin", "a pickle"),
        ("nested/run.sh", "id"),
        (".bashrc", "id"),
        ("config.json", '{"auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}'),
    ],
)
def test_a_model_with_code_or_pickles_is_not_pulled(
    model: Manifest, store: Store, tmp_path: Path, name: str, text: str
) -> None:
    folder = tmp_path / "evil"
    (folder / "model" / name).parent.mkdir(parents=True)
    (folder / "model" / name).write_text(text)
    evil = store.publish(folder, model.model_copy(update={"key": "e" * 64, "files": ()}))
    with pytest.raises(IntegrityError):
        pull(store, evil, "model", tmp_path / "out/here")
    assert not any((tmp_path / "out").iterdir())
