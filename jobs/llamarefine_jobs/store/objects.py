"""Objects under a URI, in a folder (``file://``) or in a bucket (``s3://``): the store's ground floor.

Both kinds keep the same promises, and one list of tests checks both: a read sees a whole object or
none, `create` has exactly one winner, a failed write leaves nothing that a listing shows.
"""

import contextlib
import errno
import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import unquote, urlsplit

from llamarefine_jobs.contract.artifact import safe_relative_path
from llamarefine_jobs.contract.credentials import refuse_credentials
from llamarefine_jobs.contract.errors import IntegrityError, RecipeError, from_os_error
from llamarefine_jobs.contract.retry import RetryPolicy

CHUNK_BYTES = 1 << 20
READ_LIMIT_BYTES = 64 << 20
_TEMPORARY = ".writing-"
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # FAT, some network and FUSE file systems


@dataclass(frozen=True)
class Entry:
    """One object in a listing."""

    path: str
    size_bytes: int
    etag: str | None = None
    modified_at: datetime | None = field(default=None, compare=False)


class Objects(Protocol):
    """Bytes by path. Paths are relative, with `/` between their parts."""

    uri: str

    def read(self, path: str) -> bytes | None:
        """The object's bytes, or None where there is none. IntegrityError past READ_LIMIT_BYTES."""

    def download(self, path: str, into: BinaryIO, on_chunk: Callable[[bytes], None]) -> bool:
        """Write the object into `into`, each chunk also given to `on_chunk`; False where there is none."""

    def write(self, path: str, data: bytes, *, retry: bool = True) -> None:
        """Make or replace an object, all at once; where not `retry`, no outage is waited out."""

    def create(self, path: str, data: bytes) -> bool:
        """Make an object unless it is there; False, and nothing changed, where it is."""

    def upload(self, path: str, file: Path, on_chunk: Callable[[bytes], None]) -> None:
        """Make or replace an object from a file, each chunk also given to `on_chunk`."""

    def entries(self, prefix: str) -> Iterator[Entry]:
        """Every object whose path begins with `prefix`, sorted by path."""

    def delete(self, path: str) -> None:
        """Remove an object; nothing happens where there is none."""

    def clock(self) -> datetime | None:
        """What the clock says by which objects are dated; None where it does not say."""


def open_objects(uri: str, retry_policy: RetryPolicy | None = None) -> Objects:
    """The objects under ``file:///folder`` (or a plain path) or ``s3://bucket/prefix``."""
    try:
        parts = urlsplit(refuse_credentials(uri))
    except ValueError as error:
        raise RecipeError(f"store: {error}") from None
    match parts.scheme:
        case "s3":
            from llamarefine_jobs.store.bucket import S3Objects  # boto3's types are not needed for a folder

            if not parts.netloc:
                raise RecipeError(f"store {uri}: expected s3://bucket/prefix, found no bucket")
            return S3Objects(parts.netloc, parts.path.strip("/"), retry_policy)
        case "file":
            if parts.netloc not in ("", "localhost"):
                raise RecipeError(f"store {uri}: expected file:///absolute/folder, found the host `{parts.netloc}`")
            return FileObjects(Path(unquote(parts.path)))
        case "":
            return FileObjects(Path(uri))
        case scheme:
            raise RecipeError(f"store {uri}: expected file:// or s3://, found {scheme}://")


class FileObjects:
    """Objects as files of a folder. A write goes to a temporary name, is flushed to disk, then renamed."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()
        self.uri = self.root.as_uri()

    def path_of(self, path: str) -> Path:
        """The file that holds the object; IntegrityError for a path that leads out of the folder."""
        try:
            file = self.root / safe_relative_path(path)
        except ValueError as error:
            raise IntegrityError(f"{self.uri}: {error}") from None
        if not file.resolve().is_relative_to(self.root.resolve()):
            raise IntegrityError(f"{self.uri}/{path}: a symbolic link leads out of the store; remove the link")
        return file

    def read(self, path: str) -> bytes | None:
        file = self.path_of(path)
        with _os_errors(file):
            try:
                with file.open("rb") as source:
                    data = source.read(READ_LIMIT_BYTES + 1)
            except (FileNotFoundError, NotADirectoryError):
                return None
        return refuse_too_large(f"{self.uri}/{path}", data)

    def download(self, path: str, into: BinaryIO, on_chunk: Callable[[bytes], None]) -> bool:
        file = self.path_of(path)
        with _os_errors(file):
            try:
                source = file.open("rb")
            except (FileNotFoundError, NotADirectoryError):
                return False
            with source:
                _copy(source, into, on_chunk)
            return True

    def write(self, path: str, data: bytes, *, retry: bool = True) -> None:
        with self._temporary(path) as (file, temporary, target):
            file.write(data)
            _flush(file)
            os.replace(temporary, target)

    def create(self, path: str, data: bytes) -> bool:
        with self._temporary(path) as (file, temporary, target):
            file.write(data)
            _flush(file)
            try:
                os.link(temporary, target)  # unlike a rename, a link never replaces what is there
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return _rename_new(temporary, target)
            return True

    def upload(self, path: str, file: Path, on_chunk: Callable[[bytes], None]) -> None:
        with self._temporary(path) as (into, temporary, target), file.open("rb") as source:
            _copy(source, into, on_chunk)
            _flush(into)
            os.replace(temporary, target)

    def entries(self, prefix: str) -> Iterator[Entry]:
        entries = []
        with _os_errors(self.root):
            for folder, _, names in os.walk(self.root / prefix.rpartition("/")[0]):
                for name in names:
                    file = Path(folder, name)
                    path = file.relative_to(self.root).as_posix()
                    if path.startswith(prefix) and not name.startswith(_TEMPORARY):
                        with contextlib.suppress(FileNotFoundError):  # another writer removed it meanwhile
                            entries.append(_entry(path, file))
        yield from sorted(entries, key=lambda entry: entry.path)

    def unfinished(self, folder: str = ".") -> Iterator[Entry]:
        """What writers that were killed left, and what others write just now: files under temporary names."""
        with _os_errors(self.root):
            for file in sorted((self.root / folder).rglob(f"{_TEMPORARY}*")):
                with contextlib.suppress(FileNotFoundError):
                    yield _entry(file.relative_to(self.root).as_posix(), file)

    def delete(self, path: str) -> None:
        file = self.path_of(path)
        with _os_errors(file):
            with contextlib.suppress(NotADirectoryError):
                file.unlink(missing_ok=True)
            for folder in file.parents:  # a bucket has no empty folders
                if folder == self.root:
                    break
                try:
                    folder.rmdir()
                except OSError:
                    break

    def clock(self) -> datetime | None:
        return datetime.now(UTC)

    @contextlib.contextmanager
    def _temporary(self, path: str) -> Iterator[tuple[BinaryIO, Path, Path]]:
        """An open file beside the object, its path, and the object's own: gone afterwards, whatever happens."""
        target = self.path_of(path)
        temporary = target.parent / f"{_TEMPORARY}{secrets.token_hex(8)}"
        with _os_errors(target):
            file = _open_new(temporary)
            try:
                with file:
                    yield file, temporary, target
            finally:
                temporary.unlink(missing_ok=True)


def refuse_too_large(where: str, data: bytes) -> bytes:
    """`data`, unless it is more than an object that is read at once may hold."""
    if len(data) > READ_LIMIT_BYTES:
        raise IntegrityError(f"{where}: holds more than the {READ_LIMIT_BYTES} bytes that are read at once")
    return data


def _entry(path: str, file: Path) -> Entry:
    about = file.stat()
    return Entry(path, about.st_size, modified_at=datetime.fromtimestamp(about.st_mtime, UTC))


def _open_new(path: Path) -> BinaryIO:
    """Open a new file for writing, its folder made where it is missing."""
    for _ in range(20):
        with contextlib.suppress(FileNotFoundError):  # `delete` beside us removed the folder it found empty
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("wb")
    return path.open("wb")


def _rename_new(temporary: Path, target: Path) -> bool:
    """Rename unless something is there, one process at a time where the file system has locks; whether it was done."""
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_EX)
        if target.exists():
            return False
        os.replace(temporary, target)
        return True
    finally:
        os.close(folder)


def _copy(source: BinaryIO, target: BinaryIO, on_chunk: Callable[[bytes], None]) -> None:
    while chunk := source.read(CHUNK_BYTES):
        target.write(chunk)
        on_chunk(chunk)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _os_errors(where: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.filename = error.filename or where  # a failed write does not say where it was
        raise from_os_error(error) from None
