"""Artifact keys, the layout of the store, and the manifest that turns a folder of files into an artifact.

artifacts/<stage>/<key>/manifest.json           written last: without it the artifact does not exist
artifacts/<stage>/<key>/<attempt>/…             the files; each writer has its own attempt, and the manifest names one
checkpoints/<stage>/<key>/<step>/…              manifest and files in the same way, for each checkpoint of a training
runs/<run>/{run.json, logs/<stage>.log, report/…}
inputs/<sha256>/…                               files that the launcher uploaded for a recipe
check/…                                         files that preflight writes and removes
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from llamarefine_jobs.contract.prompt import TEMPLATE_SHA256
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.self_digest import add_self_digest, read_self_digest
from llamarefine_jobs.contract.stages import STAGES
from llamarefine_jobs.contract.version import __version__

MANIFEST = "manifest.json"
_MAX_FILES = 10_000  # real artifacts have about a hundred
# Control characters, bidirectional controls, surrogates, and characters that separate paths or lines on some systems.
_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f-\x9f\\:\ud800-\udfff\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
# Names that Windows reserves for devices, with any extension.
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])\s*(\.|$)", re.IGNORECASE)
_DIGEST_KEY = "manifest_sha256"


def safe_relative_path(path: str) -> str:
    """Return `path` if it is a plain relative path on every operating system.

    Raises ValueError if the path, joined to a folder, could lead out of it, or if it could be displayed misleadingly.
    """
    parts = PurePosixPath(path).parts
    if (
        not parts
        or path != str(PurePosixPath(path))
        or path.startswith("/")
        or _FORBIDDEN.search(path)
        or any(part.endswith((".", " ")) or _DEVICE.match(part) or len(part.encode()) > 255 for part in parts)
    ):
        raise ValueError(f"{path!r:.120} is not a plain relative path")
    return path


def comparable_path(path: str) -> str:
    """Return `path` as file systems compare it that ignore case and the Unicode normalization form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", path).casefold())


RelativePath = Annotated[str, AfterValidator(safe_relative_path)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class File(_Record):
    """One file of an artifact."""

    path: RelativePath
    size_bytes: int = Field(ge=0)
    sha256: Sha256


class Parent(_Record):
    """A parent artifact, named by its key and the digest of its manifest."""

    key: Sha256
    manifest_sha256: Sha256


class Manifest(_Record):
    """Record of an artifact or checkpoint: its files, its parents, and the recipe and software that made it."""

    format: Literal[1] = 1
    stage: str
    key: Sha256
    attempt: RelativePath = Field("unpublished", description="folder of the files, next to the manifest")
    files: tuple[File, ...] = Field((), max_length=_MAX_FILES)
    parents: dict[str, Parent] = {}
    recipe: dict[str, Any]
    seed: int
    prompt_template_sha256: Sha256
    package_version: str
    git_commit: str | None = None
    image_digest: str | None = None
    libraries: dict[str, str] = {}
    backend: str | None = None
    accelerator: str | None = None
    started_at: datetime
    finished_at: datetime
    metrics: dict[str, Any] = {}

    @model_validator(mode="after")
    def _check_paths(self) -> Self:
        """Refuse two entries for one file, also if they differ in case only, and a file that is another's folder."""
        paths = {comparable_path(file.path) for file in self.files}
        if len(paths) != len(self.files):
            raise ValueError("a file is listed twice")
        for path in paths:
            if any(parent.as_posix() in paths for parent in PurePosixPath(path).parents):
                raise ValueError("a path is listed as a file and as a folder")
        return self

    def to_bytes(self) -> bytes:
        """Return the manifest as stored: JSON with the manifest's own digest as the last key."""
        return add_self_digest(self.model_dump_json(indent=2), _DIGEST_KEY)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Manifest":
        """Parse a stored manifest. Raises ValueError if it is not a manifest or any byte of it was changed."""
        try:
            body = read_self_digest(data, _DIGEST_KEY)
        except ValueError:
            body = None
        if body is None:
            raise ValueError("is not a manifest, or was changed after it was written")
        try:
            found = cls.model_validate_json(body)
            _digest([found.recipe, found.metrics])  # raises ValueError for NaN and infinity, which JSON does not have
            return found
        except ValueError:
            raise ValueError("is a manifest that this version cannot read") from None

    def sha256(self) -> str:
        """Return the digest of the stored manifest, which children record."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def part(self, *prefixes: str) -> tuple[File, ...]:
        """Return the files under `prefixes` (``"base/"``: a folder, ``"data_card.json"``: a file); without any, all."""
        return tuple(file for file in self.files if not prefixes or _is_under(file.path, prefixes))

    def content_sha256(self, *prefixes: str) -> str:
        """Return the digest of the files under `prefixes`: of the path, size and sha256 of each, and nothing else."""
        listing = sorted((file.path, file.size_bytes, file.sha256) for file in self.part(*prefixes))
        return _digest(listing)

    @property
    def folder(self) -> str:
        """The folder of the files in the store."""
        return f"{artifact_path(self.stage, self.key)}/{self.attempt}"


def artifact_key(stage: str, recipe: Recipe, parents: Mapping[str, Manifest]) -> str:
    """Return the key of the artifact that `stage` makes from `recipe` and `parents`: same key, same result.

    The key is the sha256 of the canonical JSON of the stage, its part of the recipe, the content that it reads from
    each parent, the prompt template and the package's version. Only the files that the stage reads count, not the
    parent's whole manifest. SFT is not trained again for new preference pairs, or if a parent was made again with the
    same result.
    """
    reads = STAGES[stage].reads
    return _digest(
        {
            "stage": stage,
            "recipe": recipe.key_payload(stage),
            "parents": {name: parents[name].content_sha256(*prefixes) for name, prefixes in reads.items()},
            "prompt_template_sha256": TEMPLATE_SHA256,
            "package_version": __version__,
        }
    )


def artifact_path(stage: str, key: str) -> str:
    """Return the folder of an artifact in the store."""
    return f"artifacts/{stage}/{key}"


def checkpoint_path(stage: str, key: str, step: int | None = None) -> str:
    """Return the folder of a training's checkpoints in the store, or the folder of its checkpoint at `step`."""
    folder = f"checkpoints/{stage}/{key}"
    return folder if step is None else f"{folder}/{step:08d}"


def run_path(run: str, *names: str) -> str:
    """Return the path of a run's folder in the store, or of a file in it."""
    return "/".join(("runs", run, *names))


def short(key: str) -> str:
    """Return the first twelve characters of a key, for logs and errors."""
    return key[:12]


def _is_under(path: str, prefixes: Iterable[str]) -> bool:
    return any(path.startswith(prefix) if prefix.endswith("/") else path == prefix for prefix in prefixes)


def _digest(value: object) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
