"""A manifest can be read back, and any changed byte in it is detected."""

import hashlib
import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from llamarefine_jobs.contract.artifact import File, Manifest, Parent, comparable_path, safe_relative_path

SHA256 = st.text("0123456789abcdef", min_size=64, max_size=64)


def is_plain(name: str) -> bool:
    try:
        return bool(safe_relative_path(name))
    except ValueError:
        return False


NAMES = st.text(
    st.characters(exclude_characters="/\\:.", exclude_categories=("Cc", "Cs")), min_size=1, max_size=8
).filter(is_plain)
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text(max_size=4), below, max_size=3),
    max_leaves=6,
)
TIMES = st.datetimes(timezones=st.just(UTC))
MANIFESTS = st.builds(
    Manifest,
    stage=st.sampled_from(["prepare", "sft"]),
    key=SHA256,
    attempt=NAMES,
    files=st.lists(
        st.builds(File, path=PATHS, size_bytes=st.integers(0, 2**50), sha256=SHA256),
        max_size=4,
        unique_by=lambda file: comparable_path(file.path.split("/")[0]),
    ).map(tuple),
    parents=st.dictionaries(NAMES, st.builds(Parent, key=SHA256, manifest_sha256=SHA256), max_size=2),
    recipe=st.dictionaries(st.text(max_size=4), VALUES, max_size=3),
    seed=st.integers(0, 2**32 - 1),
    prompt_template_sha256=SHA256,
    package_version=st.text(max_size=8),
    libraries=st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3),
    backend=st.none() | st.text(max_size=8),
    started_at=TIMES,
    finished_at=TIMES,
    metrics=st.dictionaries(st.text(max_size=4), VALUES, max_size=3),
)


@settings(max_examples=100, deadline=None)
@given(MANIFESTS)
def test_a_stored_manifest_is_read_back_unchanged(manifest: Manifest) -> None:
    data = manifest.to_bytes()
    read = Manifest.from_bytes(data)
    assert read == manifest
    assert read.to_bytes() == data
    assert read.sha256() == manifest.sha256()
    assert json.loads(data)["key"] == manifest.key, "a plain JSON parser can read it"


@settings(max_examples=200, deadline=None)
@given(MANIFESTS, st.data())
def test_every_changed_byte_is_detected(manifest: Manifest, draw: Any) -> None:
    data = manifest.to_bytes()
    offset = draw.draw(st.integers(0, len(data) - 1))
    new = draw.draw(st.binary(max_size=2).filter(lambda found: found != data[offset : offset + 1]))
    with pytest.raises(ValueError, match="manifest"):
        Manifest.from_bytes(data[:offset] + new + data[offset + 1 :])


def test_a_manifest_with_other_whitespace_is_accepted() -> None:
    """The digest covers the bytes as stored, not as this version would write them."""
    values = json.loads(sample().to_bytes())
    del values["manifest_sha256"]
    body = json.dumps(values, indent=2)
    digest = hashlib.sha256(body.encode()).hexdigest()
    data = f'{body[:-2]},\n  "manifest_sha256": "{digest}"\n}}\n'.encode()
    assert data != sample().to_bytes()
    assert Manifest.from_bytes(data) == sample()


def sample(**changes: Any) -> Manifest:
    time = datetime(2026, 11, 1, tzinfo=UTC)
    values: dict[str, Any] = {
        "stage": "sft",
        "key": "a" * 64,
        "recipe": {},
        "seed": 1,
        "prompt_template_sha256": "b" * 64,
        "package_version": "0.1.0",
        "started_at": time,
        "finished_at": time,
        "metrics": {"loss": 1e-05, "rows": 7},
    }
    return Manifest.model_validate(values | changes)


def file(path: str, text: str = "x") -> File:
    return File(path=path, size_bytes=len(text), sha256=hashlib.sha256(text.encode()).hexdigest())


def test_a_manifest_of_a_later_format_is_refused() -> None:
    data = sample().to_bytes().replace(b'"format": 1', b'"format": 2')
    body = data[: data.index(b',\n  "manifest_sha256"')] + b"\n}"
    digest = hashlib.sha256(body).hexdigest()
    with pytest.raises(ValueError, match="this version cannot read"):
        Manifest.from_bytes(body[:-2] + f',\n  "manifest_sha256": "{digest}"\n}}\n'.encode())


def test_a_file_is_listed_once() -> None:
    with pytest.raises(ValidationError, match="listed twice"):
        sample(files=(file("a"), file("a", "y")))


def test_a_part_is_a_folder_or_a_file() -> None:
    manifest = sample(
        files=(file("base/config.json"), file("base2/x"), file("data_card.json"), file("data_card.json.bak"))
    )
    assert [found.path for found in manifest.part("base/")] == ["base/config.json"]
    assert [found.path for found in manifest.part("data_card.json")] == ["data_card.json"]
    assert manifest.part() == manifest.files


def test_the_content_digest_covers_path_size_and_bytes_only() -> None:
    files = (file("base/a", "1"), file("base/b", "2"), file("other", "3"))
    whole = sample(files=files)
    assert whole.content_sha256("base/") == sample(files=files[1::-1], metrics={}).content_sha256("base/")
    for changed in ((file("base/a", "9"), files[1]), (files[0],), (file("base/z", "1"), files[1])):
        assert whole.content_sha256("base/") != sample(files=changed).content_sha256("base/")


@given(st.text(max_size=20))
def test_a_safe_path_stays_in_its_folder_and_has_one_spelling(path: str) -> None:
    try:
        assert safe_relative_path(path) == path
    except ValueError:
        return
    parts = path.split("/")
    assert all(part not in ("", ".", "..") for part in parts)
    assert not set(path) & set("\\:\0\n")
