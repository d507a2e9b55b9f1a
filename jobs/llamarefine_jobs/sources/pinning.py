"""What prepare reads from outside the store: recognised, fingerprinted, brought to a local path.

A fingerprint is taken when a run is planned and checked when the source is read, so a file that
changes in between is noticed, and one that only moved is known again. A file that the launcher
uploaded keeps the fingerprint of its bytes: the same file is the same input here and on a cluster.
"""

import contextlib
import hashlib
import platform
from collections.abc import Iterator
from enum import Enum
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote, urlsplit

from llamarefine_jobs.contract.artifact import safe_relative_path
from llamarefine_jobs.contract.errors import DataError, from_os_error
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.retry import RetryPolicy, stage_retry_policy
from llamarefine_jobs.store.objects import Entry, Objects
from llamarefine_jobs.store.uri import open_objects

DOCSTRINGS = "python-docstrings"
TINY_LLAMA = "tiny-llama"
IN_IMAGE = "image:"  # and the name of the image whose Python the docstrings are of


class Kind(Enum):
    """Where a source lies."""

    BUILT_IN = "built-in"
    PATH = "path"
    S3 = "s3"
    HTTPS = "https"
    HUB = "hub"


def kind(source: str, *, hub_id_allowed: bool = False) -> Kind:
    """Where `source` lies. A bare ``owner/name`` that is no path is a Hub id where one may stand."""
    if source in (DOCSTRINGS, TINY_LLAMA):
        return Kind.BUILT_IN
    match urlsplit(source).scheme:
        case "s3":
            return Kind.S3
        case "https" | "http":
            return Kind.HTTPS
        case "hf":
            return Kind.HUB
    is_path = source.startswith((".", "/", "~")) or source.count("/") > 1 or Path(source).exists()
    if hub_id_allowed and not is_path:
        return Kind.HUB
    return Kind.PATH


def local_path(source: str) -> Path:
    """The path that a `Kind.PATH` source names."""
    parts = urlsplit(source)
    return Path(unquote(parts.path) if parts.scheme == "file" else source).expanduser().absolute()


def pin(recipe: Recipe, *, check: bool = True) -> Recipe:
    """`recipe` with a fingerprint at each source that can be looked at from here, and absolute paths.

    A source that has one already is looked at again only to `check` it, and only where looking can tell
    (`is_known_elsewhere`). Raises DataError where a file or an object is missing, or is not the one that was pinned.
    """
    pinned = {}
    for name, source in recipe.sources().items():
        where = kind(source.source, hub_id_allowed=name == "base")
        changes: dict[str, str] = {}
        if where is Kind.PATH:
            changes["source"] = str(local_path(source.source))
        if not source.fingerprint or (check and not is_known_elsewhere(where, source.fingerprint)):
            retry_policy = (
                stage_retry_policy("prepare") if source.fingerprint else None
            )  # only a stage is given pinned ones
            found = fingerprint(source.source, where, f"prepare.{name}.source", retry_policy)
            if source.fingerprint and found and source.fingerprint != found:
                raise DataError(
                    f"prepare.{name}.source: {source.source} changed since the run was planned; submit again"
                )
            if found:
                changes["fingerprint"] = found
        pinned[name] = type(source).model_validate(source.model_dump() | changes)
    return recipe.with_sources(pinned)


def is_known_elsewhere(where: Kind, fingerprint: str) -> bool:
    """Whether a fingerprint is not one that looking gives: of bytes that were uploaded since, or of an image's Python.

    Uploaded bytes are compared as they are downloaded.
    """
    return (where is Kind.S3 and "sha256:" in fingerprint) or fingerprint.startswith(IN_IMAGE)


def fingerprint(source: str, where: Kind, key: str, retry_policy: RetryPolicy | None = None) -> str | None:
    """What lies behind `source`; None where only the stage that reads it can tell (https, the Hub)."""
    match where:
        case Kind.BUILT_IN:
            # The docstrings are those of the Python that runs; tiny-llama is all in the recipe.
            return f"python:{platform.python_version()}" if source == DOCSTRINGS else "recipe"
        case Kind.PATH:
            path = local_path(source)
            if not path.exists():
                raise DataError(f"{key}: there is no {path}")
            return content_sha256(path)
        case Kind.S3:
            _, prefix, entries = _listed(source, retry_policy)
            if not entries:
                raise DataError(f"{key}: there is nothing at {source}")
            listing = [(entry.path[len(prefix) :], entry.size_bytes, entry.etag) for entry in entries]
            return f"etag:{hashlib.sha256(repr(listing).encode()).hexdigest()}"
        case _:
            return None


def download_s3(source: str, into: Path, pinned: str | None = None) -> Path:
    """Bring an object, or all objects under a prefix, to `into`; the file's or the folder's path.

    Raises DataError where `pinned` is the sha256 of other bytes.
    """
    objects, prefix, entries = _listed(source, stage_retry_policy("prepare"))
    single = into / Path(prefix).name
    for entry in entries:
        target = single if entry.path == prefix else into / _local_name(source, entry.path[len(prefix) + 1 :])
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            if not objects.download(entry.path, file, lambda chunk: None):
                raise DataError(f"{source}: {entry.path} was removed while it was read")
    path = single if single.is_file() else into
    if pinned and is_known_elsewhere(Kind.S3, pinned) and content_sha256(path) != pinned:
        raise DataError(f"{source}: expected the bytes that were uploaded ({pinned}), found others; submit again")
    return path


def read_s3_head(source: str, key: str, size_bytes: int) -> bytes:
    """The first `size_bytes` of an object, or a little more. DataError where there is none."""
    parts = urlsplit(source)
    head = BytesIO()

    def enough(chunk: bytes) -> None:
        if head.tell() >= size_bytes:
            raise _EnoughError

    with contextlib.suppress(_EnoughError):
        if not open_objects(f"s3://{parts.netloc}").download(unquote(parts.path).strip("/"), head, enough):
            raise DataError(f"{key}: there is nothing at {source}")
    return head.getvalue()


class _EnoughError(Exception):
    """As much was read as was wanted."""


def _listed(source: str, retry_policy: RetryPolicy | None = None) -> tuple[Objects, str, list[Entry]]:
    """The bucket, the prefix, and the objects that are the source itself or lie below it."""
    parts = urlsplit(source)
    objects, prefix = open_objects(f"s3://{parts.netloc}", retry_policy), unquote(parts.path).strip("/")
    return (
        objects,
        prefix,
        [
            entry
            for entry in objects.entries(prefix)
            if (entry.path == prefix or entry.path.startswith(f"{prefix}/"))
            and not entry.path.endswith("/")  # what some clients write for a folder
        ],
    )


def _local_name(source: str, name: str) -> str:
    try:
        return safe_relative_path(name)
    except ValueError as error:
        raise DataError(f"{source}: {error}; rename that object") from None


def content_sha256(path: Path) -> str:
    """The fingerprint of a path: the sha256 of a file, or of the names and sha256s of all files of a folder."""
    try:
        if path.is_file():
            return f"sha256:{file_sha256(path)}"
        files = sorted(files_below(path))
        listing = [(file.relative_to(path).as_posix(), file_sha256(file)) for file in files]
        return f"tree-sha256:{hashlib.sha256(repr(listing).encode()).hexdigest()}"
    except OSError as error:
        raise from_os_error(error) from None


def files_below(folder: Path) -> Iterator[Path]:
    """Every regular file below `folder`; DataError where a link in it leads to a file that is not its own.

    The Hub's cache keeps a snapshot as links to the blobs of the same repository: those are its own.
    """
    root = folder.resolve()
    home = root.parent.parent if root.parent.name == "snapshots" else root
    for file in folder.rglob("*"):
        if file.is_file():
            if not file.resolve().is_relative_to(home):
                raise DataError(f"{file}: is a link to a file outside {folder}; put the file itself there")
            yield file


def file_sha256(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
