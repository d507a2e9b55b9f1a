"""Objects in an S3-compatible bucket (``s3://``), through boto3.

boto3 finds the credentials, applies timeouts and retries a single request a few times. If an outage lasts longer, the
whole operation is retried under a `RetryPolicy` (contract/retry.py).

Keys are rotated while a training runs. If the bucket refuses a client that it has served before, the failure may pass:
the client is made anew, so that the keys are read again (environment, files, STS), and the operation is retried. A
refusal of the first request, or of a permission that the keys never had, is an AccessError at once.

For a store that is not Amazon's, the endpoint comes from AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL.
"""

import contextlib
import errno
import functools
import logging
import re
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from email.utils import parsedate_to_datetime
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
from llamarefine_jobs.store.mounted_keys import read_mounted_keys
from llamarefine_jobs.store.objects import CHUNK_BYTES, READ_LIMIT_BYTES, Entry, refuse_too_large
from llamarefine_jobs.untrusted.log_redaction import redact_logs

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

_CONNECT_TIMEOUT_S, _READ_TIMEOUT_S = 5, 60
_REQUEST_ATTEMPTS = 4  # boto3's, within about a second; they save repeating a large file for one failed part
# Of the bucket, and of STS, from which boto3 gets the keys of a role or of a web identity.
_EXPIRED = ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired")
_REFUSED = (
    "AccessDenied",
    "InvalidAccessKeyId",
    "InvalidClientTokenId",
    "InvalidIdentityToken",
    "InvalidToken",
    "InvalidTokenId",
    "SignatureDoesNotMatch",
    "UnrecognizedClientException",
)
_OTHER_REGION = ("AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "PermanentRedirect", "301")
_FULL = ("QuotaExceeded", "XMinioAdminBucketQuotaExceeded", "XMinioStorageFull")
_RETRYABLE = (
    "BadDigest",  # a byte changed in transit
    "ConditionalRequestConflict",  # another conditional write is in progress; its end decides which one wins
    "IncompleteBody",
    "NoSuchUpload",
    "OperationAborted",
    "RequestTimeout",
    "SlowDown",
    "XAmzContentSHA256Mismatch",
)

Rest = ParamSpec("Rest")
Result = TypeVar("Result")


def _retried(
    method: Callable[Concatenate["S3Objects", Rest], Result],
) -> Callable[Concatenate["S3Objects", Rest], Result]:
    """Decorate `method` so that all of it is retried while the bucket is unavailable."""

    def call(self: "S3Objects", /, *arguments: Rest.args, **named: Rest.kwargs) -> Result:
        return self.retry_policy.call(lambda: method(self, *arguments, **named))

    return call


class S3Objects:
    """The objects of `bucket` whose keys start with `prefix`.

    For a failure that may be temporary, every operation raises StoreError after the retries. For a lasting failure it
    raises AccessError, RecipeError or DiskFullError at once.
    """

    keeps_checksums = True
    root = None

    def __init__(self, bucket: str, prefix: str = "", retry_policy: RetryPolicy | None = None) -> None:
        self.retry_policy = retry_policy or RetryPolicy()
        self.bucket = bucket
        self.prefix = f"{prefix}/" if prefix else ""
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self._client: S3Client | None = None
        self._creating = threading.Lock()
        self._granted: set[str] = set()  # permissions that the bucket, or STS, has granted this object's clients

    @property
    def client(self) -> "S3Client":
        """The boto3 client, created when it is needed.

        Raises AccessError if boto3 cannot create it, or StoreError if it could before: a file is being replaced.
        """
        with self._creating:
            if self._client is None:
                self._client = self._create_client()
            return self._client

    def _create_client(self) -> "S3Client":
        import boto3
        import botocore.session
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        redact_logs()
        # At DEBUG, botocore logs each request's headers, and one of them is the session's token.
        logging.getLogger("botocore").setLevel(logging.INFO)
        settings = Config(
            # boto3's newer default checksums break some S3-compatible stores; manifests hold sha256 sums instead.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            retries={"mode": "standard", "total_max_attempts": _REQUEST_ATTEMPTS},
            connect_timeout=_CONNECT_TIMEOUT_S,
            read_timeout=_READ_TIMEOUT_S,
            max_pool_connections=32,
        )
        try:
            session = botocore.session.get_session()
            session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=_parse_time)
            session.register("after-call", self._record_granted)
            keys = read_mounted_keys()
            client: S3Client = boto3.session.Session(botocore_session=session, **keys).client("s3", config=settings)
            refuse_credentials(client.meta.endpoint_url)
            return client
        except (BotoCoreError, OSError, ValueError) as error:
            text = f"store {self.uri}: the S3 client cannot start: {_sentence(error)}"
            raise (StoreError(text) if self.retry_policy.has_succeeded else AccessError(text)) from None

    def _record_granted(self, **answer: Any) -> None:
        """Record the permission that an answer of the bucket proves, among them that an object is not there."""
        status = answer["http_response"].status_code
        if status < 300 or status in (404, 412):
            self._granted.add(_permission(answer["model"].name))

    def local_path(self, path: str) -> None:
        return None

    @_retried
    def read(self, path: str) -> bytes | None:
        with self._errors(path):
            response = self._get(path)
            if response is None:
                return None
            return refuse_too_large(f"{self.uri}/{path}", _read_body(response["Body"], READ_LIMIT_BYTES + 1))

    def download(self, path: str, into: BinaryIO, on_chunk: Callable[[bytes], None]) -> bool:
        """Download like `Objects.download`; after a broken connection, continue from the last byte received."""
        done_bytes = 0
        resume_from: dict[str, str] = {}
        retry_state = self.retry_policy.new_state()
        while True:
            try:
                with self._errors(path):
                    response = self._get(path, **resume_from)
                    if response is None:
                        return False
                    # A server that ignores ranges sends the whole object again.
                    repeated_bytes = 0 if "ContentRange" in response else done_bytes
                    for whole_chunk in response["Body"].iter_chunks(CHUNK_BYTES):
                        chunk = whole_chunk[repeated_bytes:]
                        repeated_bytes = max(0, repeated_bytes - len(whole_chunk))
                        if not chunk:  # repeated bytes are no progress: they do not end the outage
                            continue
                        into.write(chunk)
                        on_chunk(chunk)
                        done_bytes += len(chunk)
                        resume_from = {"Range": f"bytes={done_bytes}-", "IfMatch": response["ETag"]}
                        retry_state.end()
                retry_state.end()
                return True
            except StoreError as error:
                retry_state.wait(error)

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

    @_retried
    def create(self, path: str, data: bytes) -> bool:
        from botocore.exceptions import ClientError

        with self._errors(path):
            try:
                self.client.put_object(Bucket=self.bucket, Key=self._key(path), Body=data, IfNoneMatch="*")
                return True
            except ClientError as error:
                if _code(error) not in ("PreconditionFailed", "412"):
                    raise
            # The existing object may be this writer's own: an earlier attempt succeeded but its answer was lost.
            response = self._get(path)
            return response is not None and _read_body(response["Body"], len(data) + 1) == data

    @_retried
    def upload(self, path: str, file: Path, on_chunk: Callable[[bytes], None]) -> None:
        with self._errors(path):
            self.client.upload_file(str(file), self.bucket, self._key(path))
            with file.open("rb") as source:
                while chunk := source.read(CHUNK_BYTES):
                    on_chunk(chunk)

    def entries(self, prefix: str) -> Iterator[Entry]:
        yield from self._listed(prefix)

    def unfinished(self, folder: str = ".") -> Iterator[Entry]:
        yield from ()  # a bucket lists no upload before it is complete

    @_retried
    def delete(self, path: str) -> None:
        with self._errors(path):
            self.client.delete_object(Bucket=self.bucket, Key=self._key(path))

    @_retried
    def clock(self) -> datetime | None:
        with self._errors(""):
            response = self.client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix, MaxKeys=1)
            date = response["ResponseMetadata"]["HTTPHeaders"].get("date")
            return parsedate_to_datetime(date) if date else None

    @_retried
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
        return self.prefix + path  # a key is a plain name to a bucket, so none can lead out of the prefix

    def _get(self, path: str, **options: Any) -> Any:
        """Return the response of GetObject, or None if the object does not exist."""
        from botocore.exceptions import ClientError

        try:
            return self.client.get_object(Bucket=self.bucket, Key=self._key(path), **options)
        except ClientError as error:
            if _code(error) == "NoSuchKey":  # another kind of 404 does not come from the bucket
                return None
            raise

    @contextlib.contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        """Turn boto3's errors into ours: StoreError if the failure may be temporary, another class if it is not."""
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
        client = self.client
        try:
            yield
        except LlamaRefineError:
            raise
        except (NoCredentialsError, PartialCredentialsError):
            text = f"{where}: no credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            raise self._refusal(client, text, may_pass=self.retry_policy.has_succeeded) from None
        except ParamValidationError as error:
            reason = _sentence(error).partition(": Bucket name must match")[0]
            raise RecipeError(f"{where}: {reason}; correct the store's URI") from None
        except SSLError as error:
            raise self._from_tls_error(where, str(error)) from None
        except ClientError as error:
            raise self._from_client_error(client, where, error) from None
        except (BotoCoreError, Boto3Error) as error:
            cause = error.__cause__ or error.__context__
            if isinstance(cause, ClientError):
                raise self._from_client_error(client, where, cause) from None
            raise StoreError(f"{where}: {_sentence(error)}; is the endpoint right and reachable?") from None
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _DISK_ERRORS:
                raise from_os_error(error) from None
            if _is_broken_connection(error):
                raise StoreError(f"{where}: the connection broke: {_sentence(error)}") from None
            raise

    def _from_tls_error(self, where: str, error: str) -> LlamaRefineError:
        endpoint = self.client.meta.endpoint_url
        if "CERTIFICATE_VERIFY_FAILED" in error:
            reason = _sentence(error.rpartition("certificate verify failed: ")[2]).partition(" (_ssl")[0]
            message = f"the certificate of {endpoint} is not trusted ({reason}); set AWS_CA_BUNDLE to its CA's file"
        elif "WRONG_VERSION_NUMBER" in error or "record layer failure" in error:
            message = f"{endpoint} does not speak TLS; give it a certificate, or write http:// if that is intended"
        else:
            message = f"no TLS connection to {endpoint}: {_sentence(error)}; is the endpoint right?"
        # Temporary if the connection was cut, or if another server (such as a restarting ingress) answered for the
        # bucket, which has answered before.
        may_be_temporary = self.retry_policy.has_succeeded or "EOF" in error
        return StoreError(f"{where}: {message}") if may_be_temporary else AccessError(f"{where}: {message}")

    def _refusal(self, client: "S3Client", text: str, *, may_pass: bool) -> LlamaRefineError:
        """Return the error for refused or missing keys. If it may pass, the next client reads the keys again."""
        if not may_pass:
            return AccessError(text)
        with self._creating:
            if self._client is client:  # otherwise another thread has replaced it already
                self._client = None
        return StoreError(f"{text}; they were accepted before and are read again for each attempt")

    def _from_client_error(self, client: "S3Client", where: str, error: Any) -> LlamaRefineError:
        code = _code(error)
        message = error.response.get("Error", {}).get("Message")
        answer = f"{code}: {_sentence(message)}" if message else code
        if code == "NoSuchBucket":
            return AccessError(f"{where}: there is no bucket `{self.bucket}`; create it or correct the store's URI")
        # Access may be denied to keys that are right, so it must have been granted before.
        granted = code != "AccessDenied" or _permission(error.operation_name) in self._granted
        may_pass = self.retry_policy.has_succeeded and granted
        if code in _REFUSED:
            text = f"{where}: the bucket refuses these credentials ({code}); check key, secret and policy"
            return self._refusal(client, text, may_pass=may_pass)
        if code in _EXPIRED:
            text = f"{where}: the session's credentials have expired; renew them"
            return self._refusal(client, text, may_pass=may_pass)
        if code in _OTHER_REGION:
            return AccessError(f"{where}: the bucket lies in another region ({answer}); set AWS_REGION")
        if code == "InvalidBucketName":
            return RecipeError(f"{where}: `{self.bucket}` is not a valid bucket name; correct the store's URI")
        if code == "NotImplemented":
            return AccessError(f"{where}: this store lacks a required S3 operation ({answer}); choose another one")
        if code == "RequestTimeTooSkewed":
            return AccessError(f"{where}: this machine's clock differs too much from the bucket's; correct it (NTP)")
        if code in _FULL:
            return DiskFullError(f"{where}: the bucket is full ({answer}); free some space, then run again")
        # An HTTP status without an S3 error code.
        if re.fullmatch(r"4\d\d|501", code) and code not in ("408", "429"):
            text = f"{where}: {self.client.meta.endpoint_url} does not answer as S3 ({answer})"
            if self.retry_policy.has_succeeded:  # another server answers for the bucket, which has answered before
                self.client.close()  # an open connection would lead to that server for as long as it lasts
                return StoreError(text)
            return AccessError(f"{text}; is the endpoint right, with or without TLS?")
        store_error = StoreError(f"{where}: the bucket answered {answer}")
        metadata = error.response.get("ResponseMetadata", {})
        retry_after_s = str(metadata.get("HTTPHeaders", {}).get("retry-after", ""))
        store_error.retry_after_s = float(retry_after_s) if retry_after_s.isdecimal() else 0.0
        if metadata.get("HTTPStatusCode", 500) < 429 and code not in _RETRYABLE:
            store_error.retry_after_s = None  # the same request would fail again
        return store_error


_DISK_ERRORS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.EISDIR),
)


def _is_broken_connection(error: Exception) -> bool:
    """Return whether `error` is a network failure: botocore wraps some of urllib3's errors and passes others on."""
    from botocore.exceptions import HTTPClientError, IncompleteReadError

    if isinstance(error, OSError):
        return error.errno not in _DISK_ERRORS
    return isinstance(error, HTTPClientError | IncompleteReadError) or type(error).__module__.startswith("urllib3")


def _read_body(body: Any, limit_bytes: int) -> bytes:
    """Return a response's body, or somewhat more than its first `limit_bytes`.

    It is read in chunks because `body.read(limit_bytes)` does not notice that a body was cut short.
    """
    data = bytearray()
    for chunk in body.iter_chunks(CHUNK_BYTES):
        data += chunk
        if len(data) >= limit_bytes:
            break
    return bytes(data)


def _parse_time(text: Any) -> datetime:
    """Return the time in a response. botocore's parser would use half the processor time of a long listing."""
    from botocore.utils import parse_timestamp

    try:
        return datetime.fromisoformat(text)
    except (TypeError, ValueError):  # the format of a header, or a number
        return parse_timestamp(text)


def _permission(operation: str) -> str:
    """Return the permission that an operation needs. A write in parts needs the same as a write in one request."""
    return "PutObject" if "Upload" in operation else operation


def _code(error: Any) -> str:
    return str(error.response.get("Error", {}).get("Code", "unknown"))


def _sentence(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__
