"""Sources are recognized by their form, fingerprinted by their content, and refused if they changed."""

from pathlib import Path

import pytest

from llamarefine_jobs.contract.artifact import artifact_key
from llamarefine_jobs.contract.errors import DataError
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.sources import locations, pinning
from llamarefine_jobs.sources.locations import Kind
from llamarefine_jobs.sources.s3 import download_s3
from llamarefine_jobs.store.uri import open_objects


def recipe_on(questions: str) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "sources",
            "prepare": {
                "base": {"source": "tiny-llama"},
                "questions": {"source": questions},
                "preferences": {"source": "python-docstrings"},
            },
        }
    )


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    file = tmp_path / "rows.csv"
    file.write_text("question,answer\nWhat?,That.\n")
    return file


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("python-docstrings", Kind.BUILT_IN),
        ("tiny-llama", Kind.BUILT_IN),
        ("s3://bucket/rows.csv", Kind.S3),
        ("https://example.org/rows.csv", Kind.HTTPS),
        ("hf://datasets/owner/name", Kind.HUB),
        ("rows.csv", Kind.PATH),
        ("/data/rows.csv", Kind.PATH),
        ("file:///data/rows.csv", Kind.PATH),
        ("~/rows.csv", Kind.PATH),
    ],
)
def test_a_source_is_recognized_by_its_form(source: str, expected: Kind) -> None:
    assert locations.kind(source) is expected


def test_owner_slash_name_is_a_hub_id_only_for_the_base_and_without_such_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert locations.kind("owner/name", hub_id_allowed=True) is Kind.HUB
    assert locations.kind("owner/name") is Kind.PATH
    (tmp_path / "owner/name").mkdir(parents=True)
    assert locations.kind("owner/name", hub_id_allowed=True) is Kind.PATH


def test_a_moved_file_keeps_the_artifact_key(csv: Path, tmp_path: Path) -> None:
    before = artifact_key("prepare", pinning.pin(recipe_on(str(csv))), {})
    moved = csv.rename(tmp_path / "elsewhere.csv")
    assert artifact_key("prepare", pinning.pin(recipe_on(str(moved))), {}) == before
    moved.write_text(moved.read_text() + "Why?,So.\n")
    assert artifact_key("prepare", pinning.pin(recipe_on(str(moved))), {}) != before


def test_a_pinned_source_that_changed_is_refused(csv: Path) -> None:
    pinned = pinning.pin(recipe_on(str(csv)))
    assert pinning.pin(pinned) == pinned
    csv.write_text("question,answer\nAnother?,Yes.\n")
    with pytest.raises(DataError, match=r"prepare\.questions\.source: .* changed since the run was planned"):
        pinning.pin(pinned)


def test_without_check_a_pinned_source_may_be_missing(csv: Path) -> None:
    pinned = pinning.pin(recipe_on(str(csv)))
    csv.unlink()
    assert pinning.pin(pinned, check=False) == pinned


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"prepare\.questions\.source: there is no {tmp_path}/missing\.csv"):
        pinning.pin(recipe_on(str(tmp_path / "missing.csv")))


def test_a_folders_fingerprint_depends_on_the_names_and_bytes_of_its_files(tmp_path: Path) -> None:
    found = set()
    for number, files in enumerate([{"a": "1", "b": "2"}, {"a": "2", "b": "1"}, {"a": "1", "c": "2"}, {"a": "1"}]):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
        found.add(pinning.fingerprint(str(folder), Kind.PATH, "prepare.base.source"))
    assert len(found) == 4


def test_objects_of_a_bucket_are_downloaded_and_fingerprinted(s3_uri: str, tmp_path: Path) -> None:
    objects = open_objects(s3_uri)
    for path, data in {"rows.csv": b"q,a", "rows.csv.bak": b"old", "base/config.json": b"{}", "base/x/y": b"z"}.items():
        objects.write(path, data)
    single, folder = f"{s3_uri}/rows.csv", f"{s3_uri}/base/"
    assert download_s3(single, tmp_path / "one").read_bytes() == b"q,a"
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["rows.csv"]
    base = download_s3(folder, tmp_path / "base")
    assert (base / "config.json").read_bytes() == b"{}"
    assert (base / "x/y").read_bytes() == b"z"

    before = [pinning.fingerprint(uri, Kind.S3, "key") for uri in (single, folder)]
    objects.write("rows.csv.bak", b"newer")
    assert [pinning.fingerprint(uri, Kind.S3, "key") for uri in (single, folder)] == before
    objects.write("rows.csv", b"q,b")
    objects.write("base/x/y", b"Z")
    after = [pinning.fingerprint(uri, Kind.S3, "key") for uri in (single, folder)]
    assert set(after).isdisjoint(before)


def test_a_missing_object_is_named(s3_uri: str) -> None:
    with pytest.raises(DataError, match=r"prepare\.questions\.source: there is nothing at s3://.*/missing\.csv"):
        pinning.pin(recipe_on(f"{s3_uri}/missing.csv"))


def test_an_object_cannot_be_written_outside_the_folder(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects = open_objects(s3_uri)
    objects.write("base/a:b", b"a name that some systems read as a drive")
    with pytest.raises(DataError, match="rename that object"):
        download_s3(f"{s3_uri}/base", tmp_path / "into")
    assert not (tmp_path / "into").exists()
