"""Keys, the bucket's layout, and the manifest that makes a folder of files an artifact.

artifacts/<stage>/<key>/manifest.json           written last: without it there is no artifact
artifacts/<stage>/<key>/<attempt>/…             the files of the one writer whose manifest won
checkpoints/<stage>/<key>/<step>/…              the same two, for each checkpoint of a training
runs/<run>/{run.json, logs/<stage>.log, report/…}
inputs/<sha256>/…                               files that the launcher uploaded for a recipe
check/…                                         what preflight writes and removes
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
_MOST_FILES = 10_000  # an artifact has a hundred
# Control characters, those that turn the direction of what follows, a surrogate, and what separates elsewhere.
_STRANGE = re.compile(r"[\x00-\x1f\x7f-\x9f\\:\ud800-\udfff\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")
# Windows' own, whatever follows.
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])\s*(\.|$)", re.IGNORECASE)
_SEAL = "manifest_sha256"


def safe_relative_path(path: str) -> str:
    """`path` if it stays inside the folder it is joined to, anywhere, and is what it looks like; else ValueError."""
    parts = PurePosixPath(path).parts
    if (
        not parts
        or path != str(PurePosixPath(path))
        or path.startswith("/")
        or _STRANGE.search(path)
        or any(part.endswith((".", " ")) or _DEVICE.match(part) or len(part.encode()) > 255 for part in parts)
    ):
        raise ValueError(f"{path!r:.120} is no plain relative path")
    return path


def folded(path: str) -> str:
    """`path` as a file system knows it where neither case nor the way an accent is written counts."""
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
    """An artifact that this one was made from."""

    key: Sha256
    manifest_sha256: Sha256


class Manifest(_Record):
    """What an artifact is, what it was made from, by what and how."""

    format: Literal[1] = 1
    stage: str
    key: Sha256
    attempt: RelativePath = Field("unpublished", description="folder of the files, beside the manifest")
    files: tuple[File, ...] = Field((), max_length=_MOST_FILES)
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
    def _one_entry_a_file(self) -> Self:
        """One entry a file, also where case and accents do not count, and none where another needs a folder."""
        paths = {folded(file.path) for file in self.files}
        if len(paths) != len(self.files):
            raise ValueError("a file is listed twice")
        for path in paths:
            if any(parent.as_posix() in paths for parent in PurePosixPath(path).parents):
                raise ValueError("a file is listed where another needs a folder")
        return self

    def to_bytes(self) -> bytes:
        """The manifest as it lies in the store, its own digest as the last key."""
        return add_self_digest(self.model_dump_json(indent=2), _SEAL)

    @classmethod
    def from_bytes(cls, data: bytes) -> "Manifest":
        """The manifest that `data` holds; ValueError where a byte of it was changed."""
        try:
            body = read_self_digest(data, _SEAL)
        except ValueError:
            body = None
        if body is None:
            raise ValueError("is no manifest, or was changed after it was written")
        try:
            found = cls.model_validate_json(body)
            _digest([found.recipe, found.metrics])  # NaN and infinity are no JSON, and no digest would be their own
            return found
        except ValueError:
            raise ValueError("is a manifest that this version cannot read") from None

    def sha256(self) -> str:
        """The digest that a child records."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def part(self, *prefixes: str) -> tuple[File, ...]:
        """The files under `prefixes` (``"base/"`` is a folder, ``"data_card.json"`` a file); all without any."""
        return tuple(file for file in self.files if not prefixes or _is_under(file.path, prefixes))

    def content_sha256(self, *prefixes: str) -> str:
        """The digest of the bytes under `prefixes`: path, size and sha256 of each file, nothing else."""
        listing = sorted((file.path, file.size_bytes, file.sha256) for file in self.part(*prefixes))
        return _digest(listing)

    @property
    def folder(self) -> str:
        """Where the files lie in the store."""
        return f"{artifact_path(self.stage, self.key)}/{self.attempt}"


def artifact_key(stage: str, recipe: Recipe, parents: Mapping[str, Manifest]) -> str:
    """The key of what `stage` makes from `recipe` and `parents`: same key, same result.

    sha256 of the canonical JSON of the stage, its part of the recipe, the bytes it reads of each
    parent, the prompt template and the package's version. A parent counts by the bytes that are
    read of it, not by its whole manifest: new preference pairs do not train SFT again, and neither
    does a parent that was made a second time with the same result.
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
    """The folder of an artifact in the store."""
    return f"artifacts/{stage}/{key}"


def checkpoint_path(stage: str, key: str, step: int | None = None) -> str:
    """The folder of a stage's checkpoints in the store, or of one of them."""
    folder = f"checkpoints/{stage}/{key}"
    return folder if step is None else f"{folder}/{step:08d}"


def run_path(run: str, *names: str) -> str:
    """The folder of a run in the store, or a file in it."""
    return "/".join(("runs", run, *names))


def short(key: str) -> str:
    """A key as people read it."""
    return key[:12]


def _is_under(path: str, prefixes: Iterable[str]) -> bool:
    return any(path.startswith(prefix) if prefix.endswith("/") else path == prefix for prefix in prefixes)


def _digest(value: object) -> str:
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
