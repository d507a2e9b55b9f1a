"""An artifact exists completely, with its manifest, or not at all."""

from pathlib import Path

import pytest

from llamarefine_jobs.contract.artifact import MANIFEST, artifact_path
from llamarefine_jobs.contract.errors import DataError
from llamarefine_jobs.store import Store

from . import samples
from .samples import KEY, STAGE


def test_a_published_folder_is_fetched_byte_for_byte(store: Store, folder: Path, tmp_path: Path) -> None:
    published = store.publish(folder, samples.draft())
    assert store.manifest(STAGE, KEY) == published
    store.fetch(published, tmp_path / "fetched")
    assert samples.content(tmp_path / "fetched") == samples.content(folder)
    samples.assert_only(store, published)


def test_the_manifest_lists_every_file_and_keeps_the_draft(store: Store, folder: Path) -> None:
    published = store.publish(folder, samples.draft())
    assert [file.path for file in published.files] == sorted(samples.content(folder))
    assert sum(file.size_bytes for file in published.files) == sum(map(len, samples.content(folder).values()))
    assert published.metrics == samples.draft().metrics


def test_without_a_manifest_there_is_no_artifact(store: Store, folder: Path) -> None:
    assert store.manifest(STAGE, KEY) is None
    published = store.publish(folder, samples.draft())
    store.objects.delete(f"{artifact_path(STAGE, KEY)}/{MANIFEST}")
    assert samples.objects_of(store), "the files still exist"
    assert store.manifest(STAGE, KEY) is None
    again = store.publish(folder, samples.draft())
    assert again.attempt != published.attempt
    store.verify(again)


def test_a_second_publish_of_a_key_changes_nothing(store: Store, folder: Path, tmp_path: Path) -> None:
    first = store.publish(folder, samples.draft())
    second = store.publish(samples.make_folder(tmp_path / "other", seed=2), samples.draft())
    assert second == first
    samples.assert_only(store, first)


def test_only_the_requested_files_are_fetched(store: Store, folder: Path, tmp_path: Path) -> None:
    published = store.publish(folder, samples.draft())
    store.fetch(published, tmp_path / "fetched", "adapter/", "one.byte")
    assert sorted(samples.content(tmp_path / "fetched")) == [
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "one.byte",
    ]


def test_a_file_of_several_upload_parts_is_fetched_unchanged(store: Store, tmp_path: Path) -> None:
    large = samples.make_folder(tmp_path / "large", size_bytes=20 * 2**20 + 13)  # boto3 splits from 8 MiB on
    published = store.publish(large, samples.draft())
    store.fetch(published, tmp_path / "fetched")
    assert samples.content(tmp_path / "fetched") == samples.content(large)


def test_many_small_files_are_fetched_unchanged(store: Store, tmp_path: Path) -> None:
    many = tmp_path / "many"
    for number in range(150):
        file = many / f"{number % 7}" / f"{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(str(number))
    published = store.publish(many, samples.draft())
    store.fetch(published, tmp_path / "fetched")
    assert samples.content(tmp_path / "fetched") == samples.content(many)


def test_an_empty_folder_can_be_published(store: Store, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    published = store.publish(tmp_path / "nothing", samples.draft())
    assert store.fetch(published, tmp_path / "fetched").is_dir()
    assert store.manifest(STAGE, KEY) == published


def test_links_are_published_as_the_files_they_point_to(store: Store, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("a blob of the Hub cache")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    published = store.publish(folder, samples.draft())
    store.fetch(published, tmp_path / "fetched")
    fetched = tmp_path / "fetched" / "model.safetensors"
    assert fetched.read_text() == "a blob of the Hub cache"
    assert not fetched.is_symlink()


@pytest.mark.parametrize("name", ["back\\slash.txt", "colon:.txt", "line\nend.txt", "not-utf8-\udcff.txt"])
def test_an_unsafe_file_name_is_refused_and_nothing_is_published(store: Store, folder: Path, name: str) -> None:
    (folder / name).write_text("x")
    with pytest.raises(DataError, match="rename it") as error:
        store.publish(folder, samples.draft())
    assert "\n" not in str(error.value)
    assert samples.objects_of(store) == []


def test_artifacts_of_other_stages_and_keys_are_separate(store: Store, folder: Path, tmp_path: Path) -> None:
    other = samples.make_folder(tmp_path / "other", seed=2)
    sft = store.publish(folder, samples.draft(stage="sft"))
    dpo = store.publish(other, samples.draft(stage="dpo"))
    later = store.publish(other, samples.draft(key=samples.key_of("later")))
    for manifest in (sft, dpo, later):
        samples.assert_only(store, manifest)


def test_a_file_of_a_run_is_replaced_completely(store: Store) -> None:
    assert store.read("runs/demo/run.json") is None
    store.write("runs/demo/run.json", b"first and longer")
    store.write("runs/demo/run.json", b"second")
    assert store.read("runs/demo/run.json") == b"second"
    assert [entry.path for entry in store.entries("runs/")] == ["runs/demo/run.json"]
