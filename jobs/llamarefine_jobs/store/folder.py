"""Objects as files in a local folder (``file://``)."""

import contextlib
import errno
import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from llamarefine_jobs.contract.artifact import safe_relative_path
from llamarefine_jobs.contract.errors import IntegrityError, from_os_error
from llamarefine_jobs.store.objects import CHUNK_BYTES, READ_LIMIT_BYTES, Entry, refuse_too_large

_TEMPORARY = ".writing-"
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # FAT, some network and FUSE file systems


class FolderObjects:
    """Objects as files below `root`. Each write goes to a temporary file, which is flushed to disk and then renamed."""

    keeps_checksums = False

    def __init__(self, root: Path) -> None:
        self._root = root.expanduser().absolute()
        self.uri = self._root.as_uri()

    @property
    def root(self) -> Path:
        return self._root

    def local_path(self, path: str) -> Path:
        """Return the file that holds the object. Raises IntegrityError if the path leads out of the folder."""
        try:
            file = self._root / safe_relative_path(path)
        except ValueError as error:
            raise IntegrityError(f"{self.uri}: {error}") from None
        if not file.resolve().is_relative_to(self._root.resolve()):
            raise IntegrityError(f"{self.uri}/{path}: a symbolic link leads out of the store; remove the link")
        return file

    def read(self, path: str) -> bytes | None:
        file = self.local_path(path)
        with _os_errors(file):
            try:
                with file.open("rb") as source:
                    data = source.read(READ_LIMIT_BYTES + 1)
            except (FileNotFoundError, NotADirectoryError):
                return None
        return refuse_too_large(f"{self.uri}/{path}", data)

    def download(self, path: str, into: BinaryIO, on_chunk: Callable[[bytes], None]) -> bool:
        file = self.local_path(path)
        with _os_errors(file):
            try:
                source = file.open("rb")
            except (FileNotFoundError, NotADirectoryError):
                return False
            with source:
                _copy(source, into, on_chunk)
            return True

    def write(self, path: str, data: bytes, *, retry: bool = True) -> None:
        with self._temporary_file(path) as (file, temporary, target):
            file.write(data)
            _flush(file)
            os.replace(temporary, target)

    def create(self, path: str, data: bytes) -> bool:
        with self._temporary_file(path) as (file, temporary, target):
            file.write(data)
            _flush(file)
            try:
                os.link(temporary, target)  # unlike a rename, a link never replaces an existing file
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in _NO_LINKS:
                    raise
                return _rename_if_absent(temporary, target)
            return True

    def upload(self, path: str, file: Path, on_chunk: Callable[[bytes], None]) -> None:
        with self._temporary_file(path) as (into, temporary, target), file.open("rb") as source:
            _copy(source, into, on_chunk)
            _flush(into)
            os.replace(temporary, target)

    def entries(self, prefix: str) -> Iterator[Entry]:
        entries = []
        with _os_errors(self._root):
            for folder, _, names in os.walk(self._root / prefix.rpartition("/")[0]):
                for name in names:
                    file = Path(folder, name)
                    path = file.relative_to(self._root).as_posix()
                    if path.startswith(prefix) and not name.startswith(_TEMPORARY):
                        with contextlib.suppress(FileNotFoundError):  # another writer has just deleted it
                            entries.append(_entry(path, file))
        yield from sorted(entries, key=lambda entry: entry.path)

    def unfinished(self, folder: str = ".") -> Iterator[Entry]:
        with _os_errors(self._root):
            for file in sorted((self._root / folder).rglob(f"{_TEMPORARY}*")):
                with contextlib.suppress(FileNotFoundError):
                    yield _entry(file.relative_to(self._root).as_posix(), file)

    def delete(self, path: str) -> None:
        file = self.local_path(path)
        with _os_errors(file):
            with contextlib.suppress(NotADirectoryError):
                file.unlink(missing_ok=True)
            for folder in file.parents:  # like a bucket, the store has no empty folders
                if folder == self._root:
                    break
                try:
                    folder.rmdir()
                except OSError:
                    break

    def clock(self) -> datetime | None:
        return datetime.now(UTC)

    @contextlib.contextmanager
    def _temporary_file(self, path: str) -> Iterator[tuple[BinaryIO, Path, Path]]:
        """Open a temporary file beside the object; yield it, its path and the object's path.

        The temporary file is deleted when the context ends, whatever happened.
        """
        target = self.local_path(path)
        temporary = target.parent / f"{_TEMPORARY}{secrets.token_hex(8)}"
        with _os_errors(target):
            file = _open_new(temporary)
            try:
                with file:
                    yield file, temporary, target
            finally:
                temporary.unlink(missing_ok=True)


def _entry(path: str, file: Path) -> Entry:
    stat = file.stat()
    return Entry(path, stat.st_size, modified_at=datetime.fromtimestamp(stat.st_mtime, UTC))


def _open_new(path: Path) -> BinaryIO:
    """Open a new file for writing; create its folder if it is missing."""
    for _ in range(20):
        with contextlib.suppress(FileNotFoundError):  # a concurrent `delete` removed the folder while it was empty
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("wb")
    return path.open("wb")


def _rename_if_absent(temporary: Path, target: Path) -> bool:
    """Rename `temporary` unless `target` exists; return whether it was renamed.

    A lock on the folder admits one process at a time, if the file system supports locks.
    """
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
    """Turn an OSError into the package's error for it, which names `where` if the OSError names no file."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or where  # a failed write does not name its file
        raise from_os_error(error) from None
