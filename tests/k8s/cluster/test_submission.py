"""What of a recipe comes to a cluster: files in the bucket, keys as on one machine."""

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
from llamarefine_k8s.cluster.submission import bring_sources, check_gpus, objects_of
from llamarefine_k8s.runs.records import run_id
from llamarefine_k8s.settings import Resources, Settings


@pytest.fixture
def own_files(recipe_file: Path, tmp_path: Path) -> Path:
    """A recipe whose rows are files."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    recipe_file.write_text(recipe_file.read_text().replace("python-docstrings", str(pairs)))
    return recipe_file


def bring(file: Path, store: str, said: list[str] | None = None, *, upload: bool = True) -> Recipe:
    return bring_sources(
        load_recipe(file), Settings(store=store), (said if said is not None else []).append, upload=upload
    )


def test_uploaded_files_keep_the_key_they_have_on_one_machine(own_files: Path, s3_uri: str) -> None:
    here = pinning.pin(load_recipe(own_files))
    there = bring(own_files, s3_uri)
    assert there.prepare.questions.source.startswith(f"{s3_uri}/inputs/")
    assert there.prepare.questions.source.endswith("/questions.csv")
    assert artifact_key("prepare", there, {}) == artifact_key("prepare", here, {})


def test_a_file_is_uploaded_once(own_files: Path, s3_uri: str) -> None:
    first: list[str] = []
    second: list[str] = []
    assert run_id(bring(own_files, s3_uri, first)) == run_id(bring(own_files, s3_uri, second))
    assert len(first) == 2
    assert second == []


def test_a_file_that_gc_may_soon_take_for_left_is_uploaded_again(
    own_files: Path, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its run has no record before it begins, and may wait in a queue for days."""
    bring(own_files, s3_uri)
    monkeypatch.setattr(Store, "now", lambda store: datetime.now(UTC) + timedelta(days=4))
    said: list[str] = []
    bring(own_files, s3_uri, said)
    assert said


def test_nothing_is_uploaded_for_a_dry_run(own_files: Path, s3_uri: str) -> None:
    dry = bring(own_files, s3_uri, upload=False)
    assert list(Store(s3_uri).entries("inputs/")) == []
    assert dry == bring(own_files, s3_uri)


def test_the_driver_pins_what_is_pinned_to_the_same_recipe(recipe_file: Path, s3_uri: str, tmp_path: Path) -> None:
    from llamarefine_jobs.recipe_file import to_yaml

    pinned = bring(recipe_file, s3_uri)
    (tmp_path / "pinned.yaml").write_text(to_yaml(pinned))
    assert bring(tmp_path / "pinned.yaml", s3_uri) == pinned
    assert pinning.pin(pinned) == pinned


def test_the_docstrings_are_those_of_the_image(recipe_file: Path, s3_uri: str) -> None:
    assert bring(recipe_file, s3_uri).prepare.preferences.fingerprint == f"image:{Settings().image('prepare')}"


def test_other_bytes_under_an_uploaded_name_are_refused(own_files: Path, s3_uri: str, tmp_path: Path) -> None:
    rows = bring(own_files, s3_uri).prepare.questions
    path = download_s3(rows.source, tmp_path / "right", rows.fingerprint)
    assert path.read_bytes() == (tmp_path / "questions.csv").read_bytes()
    name = rows.source.removeprefix(f"{s3_uri}/")
    Store(s3_uri).write(name, b"question,answer\nother,bytes\n")
    with pytest.raises(DataError, match="expected the bytes that were uploaded"):
        download_s3(rows.source, tmp_path / "wrong", rows.fingerprint)


def test_a_folder_is_uploaded_whole(recipe: Callable[..., Recipe], s3_uri: str, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    (folder / "deep").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "deep" / "weights").write_bytes(b"\0" * 9)
    given = Settings(store=s3_uri)
    base = bring_sources(recipe(f"prepare.base.source={folder}"), given, lambda text: None).prepare.base
    fetched = download_s3(base.source, tmp_path / "fetched", base.fingerprint)
    assert fingerprints.content_sha256(fetched) == fingerprints.content_sha256(folder) == base.fingerprint


def test_everything_of_a_run_is_listed(recipe_file: Path, s3_uri: str) -> None:
    pinned = bring(recipe_file, s3_uri)
    made = [(each["kind"], each["metadata"]["name"]) for each in objects_of(pinned, Settings(store=s3_uri))]
    run = run_id(pinned)
    assert made[:2] == [("ConfigMap", run), ("Job", run)]
    assert [name for _, name in made[2:]] == [
        f"{run}-{stage}" for stage in ("prepare", "sft", "dpo", "merge", "evaluate")
    ]


def test_a_training_on_two_nodes_has_its_service_listed_before_it(recipe_file: Path, s3_uri: str) -> None:
    more = ["dpo.nodes=2", "dpo.micro_batch_rows=1"]
    pinned = bring_sources(load_recipe(recipe_file, more), Settings(store=s3_uri), lambda text: None)
    made = [(each["kind"], each["metadata"]["name"]) for each in objects_of(pinned, Settings(store=s3_uri))]
    place = made.index(("Job", f"{run_id(pinned)}-dpo"))
    assert made[place - 1] == ("Service", f"nodes-{run_id(pinned)}-dpo")
    assert [kind for kind, _ in made].count("Service") == 1


def test_settings_and_recipe_that_name_different_gpus_are_refused_before_anything_is_made(
    recipe_file: Path, s3_uri: str
) -> None:
    pinned = load_recipe(recipe_file, ["sft.gpus=4", "sft.batch_rows=16", "sft.micro_batch_rows=1"])
    given = Settings(store=s3_uri, resources={"sft": Resources(gpus=2)})
    with pytest.raises(RecipeError, match=r"sft\.gpus is 4 in the recipe, resources\.sft\.gpus is 2 in the settings"):
        check_gpus(pinned, given)
