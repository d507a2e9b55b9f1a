"""The interface of a folder and of a bucket: objects by path, entries of a listing, size limits.

Both implementations keep the same promises (see the docstrings below and tests/store/ACCEPTANCE.md): a read returns a
whole object or none, `create` has exactly one winner, and a failed write leaves nothing that a listing shows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, Protocol

from llamarefine_jobs.contract.errors import IntegrityError

CHUNK_BYTES = 1 << 20
READ_LIMIT_BYTES = 64 << 20


@dataclass(frozen=True)
class Entry:
    """One object in a listing."""

    path: str
    size_bytes: int
    etag: str | None = None
    modified_at: datetime | None = field(default=None, compare=False)


class Objects(Protocol):
    """Objects below one URI. Paths are relative and use `/` between their parts."""

    uri: str
    keeps_checksums: bool  # the storage detects changed bytes by itself

    @property
    def root(self) -> Path | None:
        """The local folder that holds the objects; None for a bucket."""

    def local_path(self, path: str) -> Path | None:
        """Return the local file that holds the object; None for a bucket."""

    def read(self, path: str) -> bytes | None:
        """Return the object's bytes, or None if it does not exist. Raises IntegrityError above READ_LIMIT_BYTES."""

    def download(self, path: str, into: BinaryIO, on_chunk: Callable[[bytes], None]) -> bool:
        """Write the object to `into` and call `on_chunk` with each chunk; return False if it does not exist."""

    def write(self, path: str, data: bytes, *, retry: bool = True) -> None:
        """Create or replace an object atomically. Without `retry`, a failed request raises StoreError at once."""

    def create(self, path: str, data: bytes) -> bool:
        """Create an object only if the path is free; return False, and change nothing, if an object exists."""

    def upload(self, path: str, file: Path, on_chunk: Callable[[bytes], None]) -> None:
        """Create or replace an object from a file and call `on_chunk` with each chunk."""

    def entries(self, prefix: str) -> Iterator[Entry]:
        """Yield every object whose path starts with `prefix`, sorted by path."""

    def unfinished(self, folder: str = ".") -> Iterator[Entry]:
        """Yield the temporary files below `folder`, of killed and of running writers; none for a bucket."""

    def delete(self, path: str) -> None:
        """Delete an object; do nothing if it does not exist."""

    def clock(self) -> datetime | None:
        """Return the time of the clock that dates the objects; None if the server sends no date."""


def refuse_too_large(where: str, data: bytes) -> bytes:
    """Return `data`. Raises IntegrityError if it has more than READ_LIMIT_BYTES."""
    if len(data) > READ_LIMIT_BYTES:
        raise IntegrityError(f"{where}: holds more than the {READ_LIMIT_BYTES} bytes that are read at once")
    return data
