"""Sources in a bucket: list, download, read the first bytes."""

import contextlib
from io import BytesIO
from pathlib import Path
from urllib.parse import unquote, urlsplit

from llamarefine_jobs.contract.artifact import safe_relative_path
from llamarefine_jobs.contract.errors import DataError
from llamarefine_jobs.contract.retry import RetryPolicy, stage_retry_policy
from llamarefine_jobs.sources.fingerprints import content_sha256, was_computed_elsewhere
from llamarefine_jobs.sources.locations import Kind
from llamarefine_jobs.store.objects import Entry, Objects
from llamarefine_jobs.store.uri import open_objects


def download_s3(source: str, into: Path, pinned: str | None = None) -> Path:
    """Download an object, or all objects below a prefix, to `into`; return the path of the file or folder.

    Raises DataError if an object's name is no safe path, if an object is removed meanwhile, or if `pinned` is the
    sha256 of other bytes.
    """
    objects, prefix, entries = list_s3(source, stage_retry_policy("prepare"))
    single = into / Path(prefix).name
    for entry in entries:
        target = single if entry.path == prefix else into / _local_name(source, entry.path[len(prefix) + 1 :])
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as file:
            if not objects.download(entry.path, file, lambda chunk: None):
                raise DataError(f"{source}: {entry.path} was removed while it was read")
    path = single if single.is_file() else into
    if pinned and was_computed_elsewhere(Kind.S3, pinned) and content_sha256(path) != pinned:
        raise DataError(f"{source}: expected the bytes that were uploaded ({pinned}), found others; submit again")
    return path


def read_s3_head(source: str, key: str, size_bytes: int) -> bytes:
    """Return the first `size_bytes` of an object, or up to one chunk more.

    `key` is the recipe's key that names the source. Raises DataError if there is no such object.
    """
    parts = urlsplit(source)
    head = BytesIO()

    def stop_when_full(chunk: bytes) -> None:
        if head.tell() >= size_bytes:
            raise _HeadCompleteError

    with contextlib.suppress(_HeadCompleteError):
        if not open_objects(f"s3://{parts.netloc}").download(unquote(parts.path).strip("/"), head, stop_when_full):
            raise DataError(f"{key}: there is nothing at {source}")
    return head.getvalue()


class _HeadCompleteError(Exception):
    """Stops a download after the requested number of bytes."""


def list_s3(source: str, retry_policy: RetryPolicy | None = None) -> tuple[Objects, str, list[Entry]]:
    """Return the bucket, the source's key or prefix in it, and the objects at or below that prefix."""
    parts = urlsplit(source)
    objects, prefix = open_objects(f"s3://{parts.netloc}", retry_policy), unquote(parts.path).strip("/")
    return (
        objects,
        prefix,
        [
            entry
            for entry in objects.entries(prefix)
            if (entry.path == prefix or entry.path.startswith(f"{prefix}/"))
            and not entry.path.endswith("/")  # some clients write such an object for a folder
        ],
    )


def _local_name(source: str, name: str) -> str:
    try:
        return safe_relative_path(name)
    except ValueError as error:
        raise DataError(f"{source}: {error}; rename that object") from None
