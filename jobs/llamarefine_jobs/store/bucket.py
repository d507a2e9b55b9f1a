"""Objects in an S3-compatible bucket, through boto3: its credential chain, its timeouts, its retries of one request.

An outage that outlasts those is waited out here: see `contract/retry_policy.py`.

The endpoint comes from AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL where it is not Amazon's.
"""

import contextlib
import errno
import functools
import logging
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Concatenate, ParamSpec, TypeVar

from llamarefine_jobs.contract.credentials import refuse_credentials
from llamarefine_jobs.contract.errors import (
    AccessError,
    DiskFullError,
    LlamaRefineError,
    RecipeError,
    StoreError,
    from_os_error,
)
from llamarefine_jobs.contract.retry import RetryPolicy
from llamarefine_jobs.store.objects import CHUNK_BYTES, READ_LIMIT_BYTES, Entry, refuse_too_large
from llamarefine_jobs.untrusted.log_redaction import redact_logs

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S = 5, 60
_REQUEST_ATTEMPTS = 4  # boto3's own, within about a second, for a part of a large file most of all
_REFUSED = ("AccessDenied", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch")
_ELSEWHERE = ("AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect", "301")
_FULL = ("QuotaExceeded", "XMinioAdminBucketQuotaExceeded", "XMinioStorageFull")
_BUSY = (
    "BadDigest",  # a byte was changed on its way
    "ConditionalRequestConflict",  # another conditional write is under way; who wins is known when it ends
    "IncompleteBody",
    "NoSuchUpload",
    "OperationAborted",
    "RequestTimeout",
    "SlowDown",
    "XAmzContentSHA256Mismatch",
)

Rest = ParamSpec("Rest")
Result = TypeVar("Result")


def _patiently(
    method: Callable[Concatenate["S3Objects", Rest], Result],
) -> Callable[Concatenate["S3Objects", Rest], Result]:
    """`method`, which is tried again as a whole while the bucket is away."""

    def call(self: "S3Objects", /, *arguments: Rest.args, **named: Rest.kwargs) -> Result:
        return self.retry_policy.call(lambda: method(self, *arguments, **named))

    return call


class S3Objects:
    """The objects of `bucket` whose keys start with `prefix`."""

    keeps_checksums = True
    root = None

    def __init__(self, bucket: str, prefix: str = "", retry_policy: RetryPolicy | None = None) -> None:
        self.retry_policy = retry_policy or RetryPolicy()
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")

    @cached_property
    def client(self) -> "S3Client":
        """The one boto3 client, made when it is first needed; AccessError where it cannot start."""
        import boto3
        import botocore.session
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        redact_logs()
        # At DEBUG it writes each request's headers: a session's token is one of them.
        logging.getLogger("botocore").setLevel(logging.INFO)
        settings = Config(
            # boto3's newer default checksums break some S3-compatible stores; sha256 is ours to check.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            retries={"mode": "standard", "total_max_attempts": _REQUEST_ATTEMPTS},
            connect_timeout=_CONNECT_TIMEOUT_S,
            read_timeout=_READ_TIMEOUT_S,
            max_pool_connections=32,
        )
        try:
            session = botocore.session.get_session()
            session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_time)
            client: S3Client = boto3.session.Session(botocore_session=session).client("s3", config=settings)
            refuse_credentials(client.meta.endpoint_url)
            return client
        except (BotoCoreError, ValueError) as error:
            raise AccessError(f"store {self.uri}: the S3 client cannot start: {_sentence(error)}") from None

    def local_path(self, path: str) -> None:
        return None

    @_patiently
    def read(self, path: str) -> bytes | None:
        with self._errors(path):
            response = self._get(path)
            if response is None:
                return None
            return refuse_too_large(f"{self.uri}/{path}", _whole(response["Body"], READ_LIMIT_BYTES + 1))

    def download(self, path: str, into: BinaryIO, on_chunk: Callable[[bytes], None]) -> bool:
        """As `Objects.download`; a connection that breaks is taken up again where it broke."""
        done_bytes = 0
        more: dict[str, str] = {}
        outage = self.retry_policy.new_state()
        while True:
            try:
                with self._errors(path):
                    response = self._get(path, **more)
                    if response is None:
                        return False
                    again_bytes = 0 if "ContentRange" in response else done_bytes  # it knows no ranges: all comes again
                    for whole_chunk in response["Body"].iter_chunks(CHUNK_BYTES):
                        chunk = whole_chunk[again_bytes:]
                        again_bytes = max(0, again_bytes - len(whole_chunk))
                        if not chunk:  # what is here already is no progress
                            continue
                        into.write(chunk)
                        on_chunk(chunk)
                        done_bytes += len(chunk)
                        more = {"Range": f"bytes={done_bytes}-", "IfMatch": response["ETag"]}
                        outage.end()
                outage.end()
                return True
            except StoreError as error:
                outage.wait(error)

    def write(self, path: str, data: bytes, *, retry: bool = True) -> None:
        write = functools.partial(self._write, path, data)
        if retry:
            self.retry_policy.call(write)
            return
        try:
            write()
        except StoreError:
            self.retry_policy.record_failure()
            raise
        self.retry_policy.record_success()

    @_patiently
    def create(self, path: str, data: bytes) -> bool:
        from botocore.exceptions import ClientError

        with self._errors(path):
            try:
                self.client.put_object(Bucket=self.bucket, Key=self._key(path), Body=data, IfNoneMatch="*")
                return True
            except ClientError as error:
                if _code(error) not in ("PreconditionFailed", "412"):
                    raise
            # A try whose answer was lost may be what stands there now.
            response = self._get(path)
            return response is not None and _whole(response["Body"], len(data) + 1) == data

    @_patiently
    def upload(self, path: str, file: Path, on_chunk: Callable[[bytes], None]) -> None:
        with self._errors(path):
            self.client.upload_file(str(file), self.bucket, self._key(path))
            with file.open("rb") as source:
                while chunk := source.read(CHUNK_BYTES):
                    on_chunk(chunk)

    def entries(self, prefix: str) -> Iterator[Entry]:
        yield from self._listed(prefix)

    def unfinished(self, folder: str = ".") -> Iterator[Entry]:
        yield from ()  # an upload shows in no listing before it is complete

    @_patiently
    def delete(self, path: str) -> None:
        with self._errors(path):
            self.client.delete_object(Bucket=self.bucket, Key=self._key(path))

    @_patiently
    def clock(self) -> datetime | None:
        with self._errors(""):
            answer = self.client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix, MaxKeys=1)
            date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
            return parsedate_to_datetime(date) if date else None

    @_patiently
    def _listed(self, prefix: str) -> list[Entry]:
        with self._errors(prefix):
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._key(prefix))
            return [
                Entry(item["Key"][len(self.prefix) :], item["Size"], item["ETag"].strip('"'), item["LastModified"])
                for page in pages
                for item in page.get("Contents", [])
            ]

    def _write(self, path: str, data: bytes) -> None:
        with self._errors(path):
            self.client.put_object(Bucket=self.bucket, Key=self._key(path), Body=data)

    def _key(self, path: str) -> str:
        return self.prefix + path  # to a bucket a key is only a name: none leads out of it

    def _get(self, path: str, **more: Any) -> Any:
        from botocore.exceptions import ClientError

        try:
            return self.client.get_object(Bucket=self.bucket, Key=self._key(path), **more)
        except ClientError as error:
            if _code(error) == "NoSuchKey":  # any other 404 is not the bucket's
                return None
            raise

    @contextlib.contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        """Turn boto3's errors into the tree's: what may pass by itself is a StoreError, the rest is not."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            NoCredentialsError,
            ParamValidationError,
            PartialCredentialsError,
            SSLError,
        )

        where = f"{self.uri}/{path}".rstrip("/")
        try:
            yield
        except LlamaRefineError:
            raise
        except (NoCredentialsError, PartialCredentialsError):
            raise AccessError(
                f"{where}: no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            ) from None
        except ParamValidationError as error:
            said = _sentence(error).partition(": Bucket name must match")[0]
            raise RecipeError(f"{where}: {said}; correct the store's URI") from None
        except SSLError as error:
            raise self._from_tls_error(where, str(error)) from None
        except ClientError as error:
            raise self._from_client_error(where, error) from None
        except (BotoCoreError, Boto3Error) as error:
            cause = error.__cause__ or error.__context__
            if isinstance(cause, ClientError):
                raise self._from_client_error(where, cause) from None
            raise StoreError(f"{where}: {_sentence(error)}; is the endpoint right and reachable?") from None
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _LOCAL:
                raise from_os_error(error) from None
            if _is_broken_connection(error):
                raise StoreError(f"{where}: the connection broke: {_sentence(error)}") from None
            raise

    def _from_tls_error(self, where: str, error: str) -> LlamaRefineError:
        endpoint = self.client.meta.endpoint_url
        if "CERTIFICATE_VERIFY_FAILED" in error:
            reason = _sentence(error.rpartition("certificate verify failed: ")[2]).partition(" (_ssl")[0]
            said = f"the certificate of {endpoint} is not trusted ({reason}); name its authority by AWS_CA_BUNDLE"
        elif "WRONG_VERSION_NUMBER" in error or "record layer failure" in error:
            said = f"{endpoint} does not speak TLS; give it a certificate, or write http:// where that is meant"
        else:
            said = f"no TLS connection to {endpoint}: {_sentence(error)}; is the endpoint right?"
        # Cut off, or something else has the bucket's address for a while, as an ingress that starts again.
        passes = self.retry_policy.has_succeeded or "EOF" in error
        return StoreError(f"{where}: {said}") if passes else AccessError(f"{where}: {said}")

    def _from_client_error(self, where: str, error: Any) -> LlamaRefineError:
        code = _code(error)
        message = error.response.get("Error", {}).get("Message")
        answer = f"{code}: {_sentence(message)}" if message else code
        if code == "NoSuchBucket":
            return AccessError(f"{where}: there is no bucket `{self.bucket}`; create it or correct the store's URI")
        if code in _REFUSED:
            return AccessError(f"{where}: the bucket refuses these credentials ({code}); check key, secret and policy")
        if code == "ExpiredToken":
            return AccessError(f"{where}: the session's credentials have expired; renew them, then run again")
        if code in _ELSEWHERE:
            return AccessError(f"{where}: the bucket lies in another region ({answer}); set AWS_REGION")
        if code == "InvalidBucketName":
            return RecipeError(f"{where}: `{self.bucket}` is no bucket's name; correct the store's URI")
        if code == "NotImplemented":
            return AccessError(f"{where}: this store lacks what is needed of S3 ({answer}); choose another one")
        if code == "RequestTimeTooSkewed":
            return AccessError(f"{where}: this machine's clock differs too much from the bucket's; set it right")
        if code in _FULL:
            return DiskFullError(f"{where}: the bucket is full ({answer}); free some room, then run again")
        if re.fullmatch(r"4\d\d|501", code) and code not in ("408", "429"):  # a status without S3's own word for it
            said = f"{where}: {self.client.meta.endpoint_url} does not answer as S3 ({answer})"
            if self.retry_policy.has_succeeded:  # something else has the bucket's address for a while
                self.client.close()  # and this connection for as long as it stands
                return StoreError(said)
            return AccessError(f"{said}; is it the endpoint, TLS or not?")
        failed = StoreError(f"{where}: the bucket answered {answer}")
        about = error.response.get("ResponseMetadata", {})
        asked_s = str(about.get("HTTPHeaders", {}).get("retry-after", ""))
        failed.retry_after_s = float(asked_s) if asked_s.isdecimal() else 0.0
        if about.get("HTTPStatusCode", 500) < 429 and code not in _BUSY:
            failed.retry_after_s = None
        return failed


_LOCAL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EISDIR)


def _is_broken_connection(error: Exception) -> bool:
    """Whether `error` came from the network while a body was read: botocore wraps some, urllib3's surface raw."""
    from botocore.exceptions import HTTPClientError, IncompleteReadError

    if isinstance(error, OSError):
        return error.errno not in _LOCAL
    return isinstance(error, HTTPClientError | IncompleteReadError) or type(error).__module__.startswith("urllib3")


def _whole(body: Any, limit_bytes: int) -> bytes:
    """The bytes of an answer, or the first `limit_bytes` and some: `read(limit_bytes)` takes a cut one for whole."""
    data = bytearray()
    for chunk in body.iter_chunks(CHUNK_BYTES):
        data += chunk
        if len(data) >= limit_bytes:
            break
    return bytes(data)


def _time(text: Any) -> datetime:
    """A time in an answer. botocore alone would spend half of a long listing's processor time on trying formats."""
    from botocore.utils import parse_timestamp

    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):  # a header's form, or a number
        return parse_timestamp(text)


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", "unknown"))


def _sentence(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__
