"""Objects behave the same in a folder and in a bucket."""

import io
from pathlib import Path
from typing import Any

import pytest

from llamarefine_jobs.contract.errors import IntegrityError, RecipeError
from llamarefine_jobs.store import Store, bucket
from llamarefine_jobs.store.bucket import S3Objects
from llamarefine_jobs.store.uri import open_objects


def test_a_missing_object_reads_as_none_and_may_be_deleted(store: Store) -> None:
    assert store.objects.read("a/b") is None
    assert store.objects.download("a/b", io.BytesIO(), lambda chunk: None) is False
    store.objects.delete("a/b")
    assert list(store.entries("")) == []


def test_a_path_below_an_object_does_not_exist(store: Store) -> None:
    store.write("a", b"a file")
    assert store.objects.read("a/b") is None
    assert store.objects.download("a/b", io.BytesIO(), lambda chunk: None) is False
    store.objects.delete("a/b")
    assert store.read("a") == b"a file"


def test_create_never_replaces_an_object(store: Store) -> None:
    assert store.objects.create("run.json", b"first")
    assert not store.objects.create("run.json", b"second")
    assert store.read("run.json") == b"first"


def test_entries_are_sorted_and_have_sizes(store: Store) -> None:
    for path in ("b/2", "a/10", "a/9", "a.txt", "b/1/x", "ä"):
        store.write(path, path.encode())
    listed = list(store.entries(""))
    assert [entry.path for entry in listed] == sorted(("b/2", "a/10", "a/9", "a.txt", "b/1/x", "ä"))
    assert all(entry.size_bytes == len(entry.path.encode()) for entry in listed)


def test_a_prefix_is_a_text_prefix_and_not_a_folder(store: Store) -> None:
    for path in ("runs/demo/run.json", "runs/demo-2/run.json", "runs/other/run.json"):
        store.write(path, b"{}")
    assert [entry.path for entry in store.entries("runs/demo")] == ["runs/demo-2/run.json", "runs/demo/run.json"]
    assert [entry.path for entry in store.entries("runs/demo/")] == ["runs/demo/run.json"]
    assert list(store.entries("runs/nobody/")) == []


def test_a_listing_of_several_pages_is_complete(s3_uri: str) -> None:
    objects = S3Objects(*s3_uri.removeprefix("s3://").split("/", 1))
    pages = []

    def request_short_pages(params: dict[str, Any], **_: Any) -> None:
        pages.append(params)
        params["MaxKeys"] = 10

    objects.client.meta.events.register("provide-client-params.s3.ListObjectsV2", request_short_pages)
    for number in range(31):
        objects.write(f"many/{number:04d}", b"")
    assert [entry.path for entry in objects.entries("many/")] == [f"many/{number:04d}" for number in range(31)]
    assert len(pages) == 4


TIMES = ["2026-11-24T03:22:51.123Z", "2026-11-24T03:22:51+02:00", "Tue, 24 Nov 2026 03:22:51 GMT", "1795490571", 1.5]


@pytest.mark.parametrize("text", TIMES)
def test_times_are_parsed_like_botocore_does(text: str | float) -> None:
    from botocore.utils import parse_timestamp

    assert bucket._parse_time(text) == parse_timestamp(text)
    assert bucket._parse_time(text).tzinfo


def test_the_chunks_of_an_upload_and_a_download_are_the_object(store: Store, tmp_path: Path) -> None:
    data = bytes(range(256)) * 12_000
    (tmp_path / "file").write_bytes(data)
    sent, received, into = bytearray(), bytearray(), io.BytesIO()
    store.objects.upload("file", tmp_path / "file", sent.extend)
    assert store.objects.download("file", into, received.extend)
    assert bytes(sent) == bytes(received) == into.getvalue() == data


def test_stores_under_two_prefixes_do_not_see_each_other(store: Store) -> None:
    store.write("runs/x", b"x")
    assert list(Store(f"{store.uri}-2").entries("")) == []
    assert Store(f"{store.uri}/runs").read("x") == b"x"


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("gs://bucket/prefix", r"expected file:// or s3://, found gs://"),
        ("s3://", r"expected s3://bucket/prefix, found no bucket"),
        ("s3:///prefix", r"expected s3://bucket/prefix, found no bucket"),
        ("file://host/folder", r"found the host `host`"),
        ("https://bucket.example/x", r"found https://"),
    ],
)
def test_an_unsupported_uri_is_a_recipe_error(uri: str, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        open_objects(uri)


def test_a_folder_may_be_given_as_a_path_or_as_a_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "größer & mehr"
    Store(folder.as_uri()).write("x", b"1")
    assert Store(str(folder)).read("x") == b"1"
    monkeypatch.chdir(tmp_path)
    assert Store("größer & mehr").uri == folder.as_uri()


@pytest.mark.parametrize("path", ["../outside", "/etc/hostname", "a/../../outside", "a\\b", ""])
def test_no_path_leads_out_of_the_folder(file_uri: str, tmp_path: Path, path: str) -> None:
    objects = open_objects(file_uri)
    (tmp_path / "outside").write_text("private")
    (tmp_path / "file").write_text("x")
    for access in (
        lambda: objects.read(path),
        lambda: objects.write(path, b"x"),
        lambda: objects.create(path, b"x"),
        lambda: objects.delete(path),
        lambda: objects.upload(path, tmp_path / "file", lambda chunk: None),
        lambda: objects.download(path, io.BytesIO(), lambda chunk: None),
    ):
        with pytest.raises(IntegrityError, match="not a plain relative path"):
            access()
    assert (tmp_path / "outside").read_text() == "private"


def test_no_link_leads_out_of_the_folder(file_uri: str, tmp_path: Path) -> None:
    objects = open_objects(file_uri)
    objects.write("here/x", b"x")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("private")
    (tmp_path / "store" / "out").symlink_to(outside)
    (tmp_path / "store" / "secret").symlink_to(outside / "secret")
    (tmp_path / "store" / "within").symlink_to(tmp_path / "store" / "here")
    for path in ("out/secret", "secret"):
        with pytest.raises(IntegrityError, match="symbolic link leads out"):
            objects.read(path)
        with pytest.raises(IntegrityError, match="symbolic link leads out"):
            objects.write(path, b"overwritten")
    assert objects.read("within/x") == b"x"
    assert (outside / "secret").read_text() == "private"
