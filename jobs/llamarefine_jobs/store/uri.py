"""Open the objects below a store's URI: a folder or a bucket."""

from pathlib import Path
from urllib.parse import unquote, urlsplit

from llamarefine_jobs.contract.credentials import refuse_credentials
from llamarefine_jobs.contract.errors import RecipeError
from llamarefine_jobs.contract.retry import RetryPolicy
from llamarefine_jobs.store.bucket import S3Objects
from llamarefine_jobs.store.folder import FolderObjects
from llamarefine_jobs.store.objects import Objects


def open_objects(uri: str, retry_policy: RetryPolicy | None = None) -> Objects:
    """Return the objects below ``file:///folder`` (or a plain path) or ``s3://bucket/prefix``.

    Raises RecipeError if the URI has another scheme, names no bucket, names a host, or holds credentials.
    """
    try:
        parts = urlsplit(refuse_credentials(uri))
    except ValueError as error:
        raise RecipeError(f"store: {error}") from None
    match parts.scheme:
        case "s3":
            if not parts.netloc:
                raise RecipeError(f"store {uri}: expected s3://bucket/prefix, found no bucket")
            return S3Objects(parts.netloc, parts.path.strip("/"), retry_policy)
        case "file":
            if parts.netloc not in ("", "localhost"):
                raise RecipeError(f"store {uri}: expected file:///absolute/folder, found the host `{parts.netloc}`")
            return FolderObjects(Path(unquote(parts.path)))
        case "":
            return FolderObjects(Path(uri))
        case scheme:
            raise RecipeError(f"store {uri}: expected file:// or s3://, found {scheme}://")
