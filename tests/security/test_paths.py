"""No path in a manifest, a run record, a data set's card or a folder leads out of its folder."""

import hashlib
import json
import zipfile
from pathlib import Path

import pytest

from llamarefine_jobs.contract.artifact import File, Manifest, safe_relative_path
from llamarefine_jobs.contract.errors import DataError, IntegrityError
from llamarefine_jobs.contract.recipe import Rows
from llamarefine_jobs.data.reading import read_table
from llamarefine_jobs.sources.fingerprints import content_sha256
from llamarefine_jobs.store import Store
from llamarefine_k8s.runs import records
from llamarefine_k8s.runs.results import report_page

from ..store import samples

OUTSIDE = [
    "../a", "a/../../b", "/etc/passwd", "a//b", "./a", "a/.", "a/", "", "..", ".", "a\\..\\..\\b", "C:a",
    "a\x00b", "a\nb", "a\x1bb", "\x9ba", "\ud800", "a\u202efig.json", "a\u2028b", "\ufeffa", "a.", "a /b", "a./b",
    "CON", "nul.json", "a/Aux .txt", "lpt1", "COM¹.json", "a" * 256, "ä" * 128, "a/" + "🦙" * 64,
]  # fmt: skip


@pytest.mark.parametrize("path", OUTSIDE)
def test_an_unsafe_path_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="not a plain relative path"):
        safe_relative_path(path)


@pytest.mark.parametrize(
    "paths",
    [("a", "a"), ("A", "a"), ("a", "a/b"), ("Model/x", "model"), ("ﬁ", "fi"), ("ä", "a\u0308"), ("Å", "\u212b")],
)
def test_two_files_of_a_manifest_never_share_a_path(paths: tuple[str, str]) -> None:
    """Also on a file system that ignores case and Unicode normalization."""
    files = tuple(File(path=path, size_bytes=0, sha256="0" * 64) for path in paths)
    with pytest.raises(ValueError, match=r"a file is listed twice|a path is listed as a file and as a folder"):
        Manifest.model_validate(samples.draft().model_dump() | {"files": [file.model_dump() for file in files]})


@pytest.mark.parametrize(
    "path", ["größer/更好 🦙.json", "a" * 255, "console.json", "a.b..c", ".hidden", "nullable/com10"]
)
def test_a_safe_path_is_accepted(path: str) -> None:
    assert safe_relative_path(path) == path


def test_a_manifest_of_too_many_files_is_refused() -> None:
    files = [{"path": f"f{number}", "size_bytes": 0, "sha256": "0" * 64} for number in range(10_001)]
    with pytest.raises(ValueError, match="at most 10000"):
        Manifest.model_validate(samples.draft().model_dump() | {"files": files})


def write_record(store: Store, run: str, recipe: dict[str, str]) -> None:
    """Write the record of small-00000000 with the run's name `run` in it."""
    times = dict.fromkeys(("created_at", "updated_at"), "2026-11-24T02:00:00Z")
    values = {"run": run, "state": "done", "driver": {"pid": 1, "host": "a"}, "recipe": recipe} | times
    store.write("runs/small-00000000/run.json", json.dumps(values).encode())


@pytest.mark.parametrize("run", ["../../../outside", "/outside", "other-00000000", "a b", "a\n"])
def test_a_record_that_names_another_run_is_not_read(run: str, store: Store) -> None:
    """The name becomes part of a file name when a report is opened."""
    write_record(store, run, {})
    with pytest.raises(IntegrityError):
        records.load(store, "small-00000000")
    assert records.all_runs(store) == []


def test_a_report_page_from_a_bucket_is_downloaded_to_a_new_folder(
    s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    store = Store(s3_uri)
    store.write("runs/small-00000000/report/report.html", b"<title>t</title>")
    assert report_page(store, "small-00000000").parent.parent == tmp_path


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """A data set's folder, and beside it a file that must not be read."""
    (tmp_path / "secret.csv").write_text("prompt,chosen,rejected\nSECRET,b,c\n")
    folder = tmp_path / "dataset"
    folder.mkdir()
    (folder / "train.csv").write_text("prompt,chosen,rejected\na,b,c\n")
    return folder


def read(folder: Path) -> list[object]:
    columns = ("prompt", "chosen", "rejected")
    return list(read_table(Rows(source=str(folder)), "prepare.preferences", folder.parent / "work", columns).rows)


def test_a_data_sets_folder_is_read(dataset: Path) -> None:
    assert read(dataset) == [("a", "b", "c")]


@pytest.mark.parametrize("place", ["{outer}/secret.csv", "../secret.csv", "/proc/self/environ", "../*.csv"])
def test_a_data_sets_card_cannot_name_files_outside_its_folder(place: str, dataset: Path, tmp_path: Path) -> None:
    named = json.dumps(place.format(outer=tmp_path))
    (dataset / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {named}\n---\n")
    with pytest.raises(DataError) as caught:
        read(dataset)
    assert "\n" not in str(caught.value)


def test_an_archive_is_refused(dataset: Path) -> None:
    with zipfile.ZipFile(dataset / "train.csv", "w") as archive:
        archive.writestr("../../owned.csv", "prompt,chosen,rejected\na,b,c\n")
    with pytest.raises(DataError, match="archive"):
        read(dataset)


def test_a_script_in_a_data_set_is_not_executed(dataset: Path, tmp_path: Path) -> None:
    (dataset / "dataset.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')\n")
    with pytest.raises(DataError):
        read(dataset)
    assert not (tmp_path / "owned").exists()


def test_a_link_out_of_a_folder_is_not_followed(dataset: Path, tmp_path: Path) -> None:
    (dataset / "more.csv").symlink_to(tmp_path / "secret.csv")
    with pytest.raises(DataError, match="link to a file outside"):
        content_sha256(dataset)
    with pytest.raises(DataError, match="link to a file outside"):
        read(dataset)


def test_links_inside_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b/snapshots/0123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--a--b/blobs").mkdir()
    (tmp_path / "models--a--b/blobs/abc").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/abc")
    assert content_sha256(snapshot).startswith("tree-sha256:")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def test_a_record_with_an_invalid_recipe_is_an_integrity_error(store: Store) -> None:
    write_record(store, "small-00000000", {"name": "$(id)"})
    record = records.load(store, "small-00000000")
    assert record
    with pytest.raises(IntegrityError, match="its recorded recipe"):
        record.own_recipe()


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-1e999"])
def test_a_manifest_with_nan_or_infinity_is_refused(number: str) -> None:
    """Whoever may write to the bucket can give it a valid digest, but it could not be signed or compared."""
    body = samples.draft().model_dump_json(indent=2).replace('"recipe": {', f'"recipe": {{"x": [{number}], ', 1)
    body = body.replace(", }", "}")
    assert json.loads(body), "except for that number it is a valid manifest"
    sealed = f'{body[:-2]},\n  "manifest_sha256": "{hashlib.sha256(body.encode()).hexdigest()}"\n}}\n'
    with pytest.raises(ValueError, match="cannot read"):
        Manifest.from_bytes(sealed.encode())
    assert Manifest.from_bytes(samples.draft().to_bytes())
