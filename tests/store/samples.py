"""Folders to publish, drafts of manifests, and checks of a store's content."""

import hashlib
import random
from datetime import UTC, datetime
from pathlib import Path

from llamarefine_jobs.contract.artifact import MANIFEST, Manifest, artifact_path
from llamarefine_jobs.contract.prompt import TEMPLATE_SHA256
from llamarefine_jobs.store import Store

STAGE = "sft"


def key_of(text: str) -> str:
    """Return an artifact key that is made from `text`."""
    return hashlib.sha256(text.encode()).hexdigest()


KEY = key_of("the key of most tests")


def draft(key: str = KEY, stage: str = STAGE) -> Manifest:
    """Return a manifest as a stage passes it to the store."""
    now = datetime(2026, 11, 1, 12, tzinfo=UTC)
    return Manifest(
        stage=stage,
        key=key,
        recipe={"common": {"seed": 42}},
        seed=42,
        prompt_template_sha256=TEMPLATE_SHA256,
        package_version="0.1.0",
        started_at=now,
        finished_at=now,
        metrics={"loss": 4.143, "words": "größer, 更好"},
    )


def make_folder(path: Path, seed: int = 1, size_bytes: int = 200_000) -> Path:
    """Create a folder with the kinds of files that artifacts have: large, small, empty, nested, oddly named."""
    content = random.Random(seed)
    for name, length in {
        "adapter/adapter_model.safetensors": size_bytes,
        "adapter/adapter_config.json": 700,
        "empty.txt": 0,
        "Große Fragen/ответ 第一 🦙.txt": 33,
        "a+b & c%20d=é?#.bin": 64,
        "one.byte": 1,
    }.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.randbytes(length))
    return path


def content(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below `folder`, by relative path."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()
    }


def objects_of(store: Store, stage: str = STAGE, key: str = KEY) -> list[str]:
    """Return the paths of all objects of an artifact, including its manifest."""
    return [entry.path for entry in store.entries(f"{artifact_path(stage, key)}/")]


def assert_only(store: Store, manifest: Manifest) -> None:
    """Assert that the artifact consists of its manifest and the listed files, and that every byte is right."""
    expected = [f"{manifest.folder}/{file.path}" for file in manifest.files]
    expected.append(f"{artifact_path(manifest.stage, manifest.key)}/{MANIFEST}")
    assert objects_of(store, manifest.stage, manifest.key) == sorted(expected)
    store.verify(manifest)
