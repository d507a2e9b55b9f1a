"""Objects under a URI, in a folder (``file://``) or in a bucket (``s3://``): the store's ground floor.

Both kinds keep the same promises, and one list of tests checks both: a read sees a whole object or
none, `create` has exactly one winner, a failed write leaves nothing that a listing shows.
"""

import contextlib
import errno
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol
from urllib.parse import unquote, urlsplit

from llamarefine_jobs.contract.artifact import safe_relative_path
from llamarefine_jobs.contract.errors import (
    AccessError,
    IntegrityError,
    LlamaRefineError,
    RecipeError,
    StoreError,
    from_os_error,
)

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

CHUNK_BYTES = 1 << 20
_TEMPORARY = ".writing-"


@dataclass(frozen=True)
class Entry:
    """One object in a listing."""

    path: str
    size_bytes: int
    etag: str | None = None


class Objects(Protocol):
    """Bytes by path. Paths are relative, with `/` between their parts."""

    uri: str

    def read(self, path: str) -> bytes | None:
        """The object's bytes, or None where there is none."""

    def download(self, path: str, into: BinaryIO, on_chunk: Callable[[bytes], None]) -> bool:
        """Write the object into `into`, each chunk also given to `on_chunk`; False where there is none."""

    def write(self, path: str, data: bytes) -> None:
        """Make or replace an object, all at once."""

    def create(self, path: str, data: bytes) -> bool:
        """Make an object unless it is there; False, and nothing changed, where it is."""

    def upload(self, path: str, file: Path, on_chunk: Callable[[bytes], None]) -> None:
        """Make or replace an object from a file, each chunk also given to `on_chunk`."""

    def entries(self, prefix: str) -> Iterator[Entry]:
        """Every object whose path begins with `prefix`, sorted by path."""

    def delete(self, path: str) -> None:
        """Remove an object; nothing happens where there is none."""


def open_objects(uri: str) -> Objects:
    """The objects under ``file:///folder`` (or a plain path) or ``s3://bucket/prefix``."""
    parts = urlsplit(uri)
    match parts.scheme:
        case "s3":
            if not parts.netloc:
                raise RecipeError(f"store {uri}: expected s3://bucket/prefix, found no bucket")
            return S3Objects(parts.netloc, parts.path.strip("/"))
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
        """The file that holds the object."""
        return self.root / safe_relative_path(path)

    def read(self, path: str) -> bytes | None:
        with _os_errors():
            try:
                return self.path_of(path).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def download(self, path: str, into: BinaryIO, on_chunk: Callable[[bytes], None]) -> bool:
        with _os_errors():
            try:
                source = self.path_of(path).open("rb")
            except (FileNotFoundError, NotADirectoryError):
                return False
            with source:
                _copy(source, into, on_chunk)
            return True

    def write(self, path: str, data: bytes) -> None:
        with self._temporary(path) as (file, temporary):
            file.write(data)
            _flush(file)
            os.replace(temporary, self.path_of(path))

    def create(self, path: str, data: bytes) -> bool:
        with self._temporary(path) as (file, temporary):
            file.write(data)
            _flush(file)
            try:
                os.link(temporary, self.path_of(path))
            except FileExistsError:
                return False
            return True

    def upload(self, path: str, file: Path, on_chunk: Callable[[bytes], None]) -> None:
        with self._temporary(path) as (target, temporary), file.open("rb") as source:
            _copy(source, target, on_chunk)
            _flush(target)
            os.replace(temporary, self.path_of(path))

    def entries(self, prefix: str) -> Iterator[Entry]:
        with _os_errors():
            entries = []
            start = self.root / prefix.rpartition("/")[0]
            for folder, _, names in os.walk(start):
                for name in names:
                    file = Path(folder, name)
                    path = file.relative_to(self.root).as_posix()
                    if path.startswith(prefix) and not name.startswith(_TEMPORARY):
                        with contextlib.suppress(FileNotFoundError):  # another writer removed it meanwhile
                            entries.append(Entry(path, file.stat().st_size))
        yield from sorted(entries, key=lambda entry: entry.path)

    def delete(self, path: str) -> None:
        with _os_errors():
            file = self.path_of(path)
            file.unlink(missing_ok=True)
            for folder in file.parents:  # a bucket has no empty folders
                if folder == self.root:
                    break
                try:
                    folder.rmdir()
                except OSError:
                    break

    @contextlib.contextmanager
    def _temporary(self, path: str) -> Iterator[tuple[BinaryIO, Path]]:
        target = self.path_of(path)
        temporary = target.parent / f"{_TEMPORARY}{secrets.token_hex(8)}"
        with _os_errors():
            for attempt in range(3):
                try:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    file = temporary.open("wb")
                    break
                except FileNotFoundError:  # `delete` beside us removed the folder it found empty
                    if attempt == 2:
                        raise
            try:
                with file:
                    yield file, temporary
            finally:
                temporary.unlink(missing_ok=True)


class S3Objects:
    """Objects of an S3-compatible bucket, through boto3: its retries, its credential chain, its timeouts.

    The endpoint comes from AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL where it is not Amazon's.
    """

    def __init__(self, bucket: str, prefix: str = "") -> None:
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")

    @cached_property
    def client(self) -> "S3Client":
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        settings = Config(
            # boto3's newer default checksums break some S3-compatible stores; sha256 is ours to check.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            retries={"mode": "adaptive", "max_attempts": 8},
            connect_timeout=10,
            read_timeout=60,
            max_pool_connections=32,
        )
        try:
            client: S3Client = boto3.session.Session().client("s3", config=settings)
            return client
        except (BotoCoreError, ValueError) as error:
            raise AccessError(f"store {self.uri}: the S3 client cannot start: {error}") from None

    def read(self, path: str) -> bytes | None:
        body = self._get(path)
        if body is None:
            return None
        with self._errors(path):
            data: bytes = body.read()
            return data

    def download(self, path: str, into: BinaryIO, on_chunk: Callable[[bytes], None]) -> bool:
        body = self._get(path)
        if body is None:
            return False
        with self._errors(path):
            for chunk in body.iter_chunks(CHUNK_BYTES):
                into.write(chunk)
                on_chunk(chunk)
        return True

    def write(self, path: str, data: bytes) -> None:
        with self._errors(path):
            self.client.put_object(Bucket=self.bucket, Key=self._key(path), Body=data)

    def create(self, path: str, data: bytes) -> bool:
        from botocore.exceptions import ClientError

        with self._errors(path):
            try:
                self.client.put_object(Bucket=self.bucket, Key=self._key(path), Body=data, IfNoneMatch="*")
            except ClientError as error:
                # 409: another conditional write of this key is under way, so it has a winner already.
                if _code(error) not in ("PreconditionFailed", "412", "ConditionalRequestConflict", "409"):
                    raise
                # boto3 may have sent the request twice: the first try may be what stands there now.
                return self.read(path) == data
            return True

    def upload(self, path: str, file: Path, on_chunk: Callable[[bytes], None]) -> None:
        with self._errors(path):
            self.client.upload_file(str(file), self.bucket, self._key(path))
        with _os_errors(), file.open("rb") as source:
            while chunk := source.read(CHUNK_BYTES):
                on_chunk(chunk)

    def entries(self, prefix: str) -> Iterator[Entry]:
        with self._errors(prefix):
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix + prefix)
            for page in pages:
                for item in page.get("Contents", []):
                    yield Entry(item["Key"][len(self.prefix) :], item["Size"], item["ETag"].strip('"'))

    def delete(self, path: str) -> None:
        with self._errors(path):
            self.client.delete_object(Bucket=self.bucket, Key=self._key(path))

    def _key(self, path: str) -> str:
        return self.prefix + safe_relative_path(path)

    def _get(self, path: str) -> Any:
        from botocore.exceptions import ClientError

        with self._errors(path):
            try:
                return self.client.get_object(Bucket=self.bucket, Key=self._key(path))["Body"]
            except ClientError as error:
                if _code(error) in ("NoSuchKey", "404"):
                    return None
                raise

    @contextlib.contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        """Turn boto3's errors into the tree's: what may pass by itself is a StoreError, the rest is not."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError, PartialCredentialsError

        where = f"{self.uri}/{path}".rstrip("/")
        try:
            yield
        except LlamaRefineError:
            raise
        except (NoCredentialsError, PartialCredentialsError):
            raise AccessError(
                f"{where}: no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            ) from None
        except ClientError as error:
            raise self._from_client_error(where, error) from None
        except (BotoCoreError, Boto3Error) as error:
            cause = error.__cause__ or error.__context__
            if isinstance(cause, ClientError):
                raise self._from_client_error(where, cause) from None
            raise StoreError(f"{where}: {_sentence(error)}; is the endpoint right and reachable?") from None
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EFBIG):
                raise from_os_error(error) from None
            raise StoreError(f"{where}: the connection broke: {_sentence(error)}") from None
        except Exception as error:  # urllib3's errors surface raw while a body is read
            if type(error).__module__.startswith("urllib3"):
                raise StoreError(f"{where}: the connection broke: {_sentence(error)}") from None
            raise

    def _from_client_error(self, where: str, error: Any) -> LlamaRefineError:
        code = _code(error)
        match code:
            case "NoSuchBucket":
                return AccessError(f"{where}: there is no bucket `{self.bucket}`; create it or correct the store's URI")
            case "InvalidAccessKeyId" | "SignatureDoesNotMatch" | "AccessDenied" | "403" | "ExpiredToken":
                return AccessError(f"{where}: the bucket refuses these credentials ({code}); check key, secret and policy")
            case "RequestTimeTooSkewed":
                return AccessError(f"{where}: this machine's clock differs too much from the bucket's; set it right")
            case _:
                message = error.response.get("Error", {}).get("Message", "")
                return StoreError(f"{where}: the bucket answered {code}{': ' + message if message else ''}")


def _copy(source: BinaryIO, target: BinaryIO, on_chunk: Callable[[bytes], None]) -> None:
    while chunk := source.read(CHUNK_BYTES):
        target.write(chunk)
        on_chunk(chunk)


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextlib.contextmanager
def _os_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise from_os_error(error) from None
    except ValueError as error:
        raise IntegrityError(str(error)) from None


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", "unknown"))


def _sentence(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
