"""Pinning a recipe for a cluster: its files are uploaded to the bucket, and its keys are those of a local run."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from llamarefine_jobs.contract.artifact import artifact_key
from llamarefine_jobs.contract.errors import DataError, RecipeError
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.recipe_file import load_recipe
from llamarefine_jobs.sources import fingerprints, pinning
from llamarefine_jobs.sources.s3 import download_s3
from llamarefine_jobs.store import Store
from llamarefine_k8s.cluster.submission import check_gpus, objects_of, pin_for_cluster
from llamarefine_k8s.runs.records import run_id
from llamarefine_k8s.settings import Resources, Settings


@pytest.fixture
def own_files(recipe_file: Path, tmp_path: Path) -> Path:
    """A recipe whose questions and preferences are local files."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    recipe_file.write_text(recipe_file.read_text().replace("python-docstrings", str(pairs)))
    return recipe_file


def pin(file: Path, store: str, reported: list[str] | None = None, *, upload: bool = True) -> Recipe:
    report = (reported if reported is not None else []).append
    return pin_for_cluster(load_recipe(file), Settings(store=store), report, upload=upload)


def test_uploaded_files_keep_the_key_they_have_on_one_machine(own_files: Path, s3_uri: str) -> None:
    local = pinning.pin(load_recipe(own_files))
    uploaded = pin(own_files, s3_uri)
    assert uploaded.prepare.questions.source.startswith(f"{s3_uri}/inputs/")
    assert uploaded.prepare.questions.source.endswith("/questions.csv")
    assert artifact_key("prepare", uploaded, {}) == artifact_key("prepare", local, {})


def test_a_file_is_uploaded_once(own_files: Path, s3_uri: str) -> None:
    first: list[str] = []
    second: list[str] = []
    assert run_id(pin(own_files, s3_uri, first)) == run_id(pin(own_files, s3_uri, second))
    assert len(first) == 2
    assert second == []


def test_a_file_that_gc_may_soon_delete_is_uploaded_again(
    own_files: Path, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file's run may wait in a queue for days, and has no record before it begins."""
    pin(own_files, s3_uri)
    monkeypatch.setattr(Store, "now", lambda store: datetime.now(UTC) + timedelta(days=4))
    reported: list[str] = []
    pin(own_files, s3_uri, reported)
    assert reported


def test_nothing_is_uploaded_for_a_dry_run(own_files: Path, s3_uri: str) -> None:
    dry = pin(own_files, s3_uri, upload=False)
    assert list(Store(s3_uri).entries("inputs/")) == []
    assert dry == pin(own_files, s3_uri)


def test_pinning_a_pinned_recipe_again_changes_nothing(recipe_file: Path, s3_uri: str, tmp_path: Path) -> None:
    from llamarefine_jobs.recipe_file import to_yaml

    pinned = pin(recipe_file, s3_uri)
    (tmp_path / "pinned.yaml").write_text(to_yaml(pinned))
    assert pin(tmp_path / "pinned.yaml", s3_uri) == pinned
    assert pinning.pin(pinned) == pinned


def test_python_docstrings_are_pinned_to_the_prepare_image(recipe_file: Path, s3_uri: str) -> None:
    assert pin(recipe_file, s3_uri).prepare.preferences.fingerprint == f"image:{Settings().image('prepare')}"


def test_changed_bytes_of_an_uploaded_file_are_refused(own_files: Path, s3_uri: str, tmp_path: Path) -> None:
    rows = pin(own_files, s3_uri).prepare.questions
    path = download_s3(rows.source, tmp_path / "right", rows.fingerprint)
    assert path.read_bytes() == (tmp_path / "questions.csv").read_bytes()
    name = rows.source.removeprefix(f"{s3_uri}/")
    Store(s3_uri).write(name, b"question,answer\nother,bytes\n")
    with pytest.raises(DataError, match="expected the bytes that were uploaded"):
        download_s3(rows.source, tmp_path / "wrong", rows.fingerprint)


def test_every_file_of_a_folder_is_uploaded(recipe: Callable[..., Recipe], s3_uri: str, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    (folder / "deep").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "deep" / "weights").write_bytes(b"\0" * 9)
    given = Settings(store=s3_uri)
    base = pin_for_cluster(recipe(f"prepare.base.source={folder}"), given, lambda text: None).prepare.base
    fetched = download_s3(base.source, tmp_path / "fetched", base.fingerprint)
    assert fingerprints.content_sha256(fetched) == fingerprints.content_sha256(folder) == base.fingerprint


def test_objects_of_lists_every_object_of_a_run(recipe_file: Path, s3_uri: str) -> None:
    pinned = pin(recipe_file, s3_uri)
    listed = [(each["kind"], each["metadata"]["name"]) for each in objects_of(pinned, Settings(store=s3_uri))]
    run = run_id(pinned)
    assert listed[:2] == [("ConfigMap", run), ("Job", run)]
    assert [name for _, name in listed[2:]] == [
        f"{run}-{stage}" for stage in ("prepare", "sft", "dpo", "merge", "evaluate")
    ]


def test_the_service_of_a_training_on_two_nodes_is_listed_before_its_job(recipe_file: Path, s3_uri: str) -> None:
    overrides = ["dpo.nodes=2", "dpo.micro_batch_rows=1"]
    pinned = pin_for_cluster(load_recipe(recipe_file, overrides), Settings(store=s3_uri), lambda text: None)
    listed = [(each["kind"], each["metadata"]["name"]) for each in objects_of(pinned, Settings(store=s3_uri))]
    index = listed.index(("Job", f"{run_id(pinned)}-dpo"))
    assert listed[index - 1] == ("Service", f"nodes-{run_id(pinned)}-dpo")
    assert [kind for kind, _ in listed].count("Service") == 1


def test_different_gpu_counts_in_settings_and_recipe_are_refused(recipe_file: Path, s3_uri: str) -> None:
    pinned = load_recipe(recipe_file, ["sft.gpus=4", "sft.batch_rows=16", "sft.micro_batch_rows=1"])
    given = Settings(store=s3_uri, resources={"sft": Resources(gpus=2)})
    with pytest.raises(RecipeError, match=r"sft\.gpus is 4 in the recipe, resources\.sft\.gpus is 2 in the settings"):
        check_gpus(pinned, given)
