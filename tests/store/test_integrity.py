"""Wrong bytes are never used: the error names the file, and nothing partially fetched is left."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from llamarefine_jobs.contract.artifact import MANIFEST, File, Manifest, artifact_path
from llamarefine_jobs.contract.errors import IntegrityError
from llamarefine_jobs.store import Store
from llamarefine_jobs.store.objects import READ_LIMIT_BYTES

from . import samples
from .samples import KEY, STAGE

MANIFEST_PATH = f"{artifact_path(STAGE, KEY)}/{MANIFEST}"


def flip(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]


def replace(store: Store, path: str, damage: Callable[[bytes], bytes]) -> None:
    data = store.objects.read(path)
    assert data is not None
    store.objects.write(path, damage(data))


def assert_refused(store: Store, manifest: Manifest, name: str, tmp_path: Path) -> None:
    """Assert that fetch and verify fail, that the one-line error names the file, and that no file is left."""
    target = tmp_path / "target" / "fetched"
    with pytest.raises(IntegrityError) as error:
        store.fetch(manifest, target)
    assert name in str(error.value)
    assert "\n" not in str(error.value)
    assert list(target.parent.iterdir()) == []
    with pytest.raises(IntegrityError):
        store.verify(manifest)


def test_a_flipped_byte_in_any_file_is_named(store: Store, folder: Path, tmp_path: Path) -> None:
    manifest = store.publish(folder, samples.draft())
    places = random.Random(7)
    for file in manifest.files:
        path = f"{manifest.folder}/{file.path}"
        whole = store.objects.read(path)
        assert whole is not None
        for place in {0, len(whole) - 1, places.randrange(max(1, len(whole)))} if whole else ():
            store.objects.write(path, flip(whole, place))
            assert_refused(store, manifest, file.path, tmp_path)
        store.objects.write(path, whole)
    store.verify(manifest)


def test_a_flipped_byte_anywhere_in_the_manifest_is_an_integrity_error(store: Store, folder: Path) -> None:
    store.publish(folder, samples.draft())
    whole = store.objects.read(MANIFEST_PATH)
    assert whole is not None
    for place in random.Random(3).sample(range(len(whole)), 60):
        store.objects.write(MANIFEST_PATH, flip(whole, place))
        with pytest.raises(IntegrityError, match=r"manifest\.json"):
            store.manifest(STAGE, KEY)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: data[:-1], "expected 200000 bytes, found 199999"),
        (lambda data: data[:0], "expected 200000 bytes, found 0"),
        (lambda data: data + b"x", "expected 200000 bytes, found more"),
        (lambda data: data * 30, "expected 200000 bytes, found more"),
    ],
    ids=["truncated", "emptied", "longer", "much longer"],
)
def test_a_file_of_another_length_is_named(
    store: Store, folder: Path, tmp_path: Path, damage: Callable[[bytes], bytes], words: str
) -> None:
    manifest = store.publish(folder, samples.draft())
    replace(store, f"{manifest.folder}/adapter/adapter_model.safetensors", damage)
    assert_refused(store, manifest, "adapter/adapter_model.safetensors: " + words, tmp_path)


def test_a_missing_file_is_named(store: Store, folder: Path, tmp_path: Path) -> None:
    manifest = store.publish(folder, samples.draft())
    store.objects.delete(f"{manifest.folder}/empty.txt")
    assert_refused(store, manifest, "empty.txt: is missing", tmp_path)


def test_part_of_an_artifact_is_fetched_though_another_part_is_damaged(
    store: Store, folder: Path, tmp_path: Path
) -> None:
    manifest = store.publish(folder, samples.draft())
    store.objects.delete(f"{manifest.folder}/one.byte")
    store.fetch(manifest, tmp_path / "fetched", "adapter/")
    assert len(samples.content(tmp_path / "fetched")) == 2


def test_the_error_says_what_to_remove(store: Store, folder: Path) -> None:
    manifest = store.publish(folder, samples.draft())
    store.objects.delete(f"{manifest.folder}/one.byte")
    place = store.uri.removeprefix("file://")
    with pytest.raises(IntegrityError, match=rf"remove {place}/artifacts/{STAGE}/{KEY} and run again"):
        store.verify(manifest)


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b"not JSON"])
def test_an_invalid_manifest_is_an_integrity_error(store: Store, data: bytes) -> None:
    store.objects.write(MANIFEST_PATH, data)
    with pytest.raises(IntegrityError, match="is not a manifest"):
        store.manifest(STAGE, KEY)


def test_a_manifest_of_another_artifact_is_refused(store: Store, folder: Path) -> None:
    other = store.publish(folder, samples.draft(key=samples.key_of("another")))
    store.objects.write(MANIFEST_PATH, other.to_bytes())
    with pytest.raises(IntegrityError, match="belongs to sft"):
        store.manifest(STAGE, KEY)


def test_an_oversized_manifest_is_not_read_into_memory(store: Store, tmp_path: Path) -> None:
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(READ_LIMIT_BYTES + 1)
    store.objects.upload(MANIFEST_PATH, large, lambda chunk: None)
    with pytest.raises(IntegrityError, match="read at once"):
        store.manifest(STAGE, KEY)


@pytest.mark.parametrize(
    "path", ["../escaped", "/etc/passwd", "a/../../b", "..", ".", "", "a//b", "a/", "a\\..\\b", "C:b", "a\x00b", "./a"]
)
def test_a_manifest_cannot_name_a_path_outside_its_folder(store: Store, path: str) -> None:
    body = samples.draft().model_dump()
    body["files"] = [{"path": path, "size_bytes": 1, "sha256": "0" * 64}]
    with pytest.raises(ValueError, match="not a plain relative path"):
        Manifest.model_validate(body)
    forged = samples.draft().model_copy(
        update={"files": (File.model_construct(path=path, size_bytes=1, sha256="0" * 64),)}
    )
    store.objects.write(MANIFEST_PATH, forged.to_bytes())
    with pytest.raises(IntegrityError):
        store.manifest(STAGE, KEY)
