"""Download a snapshot of a Hugging Face Hub repository, or use the one in this machine's cache.

The repository's listing is checked before any file is downloaded; hub_client.py checks that the server then sends no
more than it listed.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llamarefine_jobs.contract.artifact import comparable_path, safe_relative_path
from llamarefine_jobs.contract.errors import AccessError, DataError, LlamaRefineError, StoreError, first_line
from llamarefine_jobs.untrusted.log_redaction import redact, redact_logs

_MOST_FILES = 10_000
_MOST_ENTRIES = 100_000  # in a listing, whether they match or not
_LIMIT_BYTES = 256 << 30
# The allowance for listings and error pages; the files' sizes are added once they are known.
_ANSWERS_BYTES = 64 << 20
_ANSWERS = 200
_REQUESTS_A_FILE = 8  # its metadata, its content, redirects, resumed downloads


def snapshot(repository: str, revision: str | None, kind: str, patterns: Sequence[str], key: str) -> Path:
    """Return the folder with the repository's files that match `patterns`; the folder's name is the commit.

    Without a network, a revision in the cache is used. `kind` is ``model`` or ``dataset``, `key` the recipe's key that
    names the repository. Raises DataError if there is no such repository or revision, or if its server sends something
    that the Hub would not send; AccessError if the repository is gated; StoreError if the network or the Hub fails.
    """
    import httpx
    from huggingface_hub import errors

    redact_logs()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # INFO logs addresses, which hold signatures
    name = repository if revision is None else f"{repository} at {revision}"
    try:
        return _download(repository, revision, kind, patterns, f"{key}: {name} cannot be downloaded")
    except LlamaRefineError:
        raise
    except errors.HFValidationError:  # before ValueError, of which it is a subclass
        raise DataError(f"{key}: expected a Hub id such as owner/name, found {repository}") from None
    except errors.GatedRepoError:
        raise AccessError(f"{key}: {name} is gated: accept its terms on the Hub, then set HF_TOKEN") from None
    except errors.RepositoryNotFoundError:
        raise DataError(
            f"{key}: the Hub has no {kind} {name} that you may read; set HF_TOKEN for a private one"
        ) from None
    except errors.RevisionNotFoundError:
        raise DataError(f"{key}: the Hub's {repository} has no revision {revision}") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        raise StoreError(
            f"{key}: the Hugging Face Hub cannot be reached and {name} is not in the cache of this machine; "
            "check the network, or give a folder or an s3:// copy as the source"
        ) from None
    except (errors.HfHubHTTPError, httpx.HTTPError) as error:
        raise StoreError(f"{key}: the Hub failed on {name}: {_line(error)}") from None
    except OSError as error:
        if error.errno is not None:  # of the disk, not of the network
            raise
        raise StoreError(f"{key}: reading {name} from the Hub failed: {_line(error)}") from None
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, RecursionError, httpx.InvalidURL) as error:
        raise DataError(f"{key}: {name} cannot be downloaded: {_line(error)}") from None


def _download(repository: str, revision: str | None, kind: str, patterns: Sequence[str], failure: str) -> Path:
    """Return the snapshot's folder.

    Raises DataError, which begins with `failure`, if the server sends something that the Hub would not send.
    """
    import httpx
    from huggingface_hub import HfApi, errors, snapshot_download
    from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

    from llamarefine_jobs.sources.hub_client import Allowance, guarded, is_commit

    def refuse(reason: str) -> DataError:
        return DataError(f"{failure}: {reason}")

    wanted: dict[str, Any] = {"repo_type": kind, "allow_patterns": list(patterns)}
    allowance, api = Allowance(_ANSWERS, _ANSWERS_BYTES, refuse), HfApi()
    with guarded(allowance):
        try:
            commit = api.resolve_revision(repository, repo_type=kind, revision=revision).resolved
            if not is_commit(commit):
                raise refuse(f"its server names {commit!r:.80} as a commit")
            listed: dict[str, int] = {}
            for entry in api.list_repo_tree(repository, recursive=True, revision=commit, repo_type=kind):
                if len(listed) > _MOST_ENTRIES:
                    raise refuse(f"it lists more than {_MOST_ENTRIES} files")
                listed[entry.path] = getattr(entry, "size", 0)
            names = list(filter_repo_objects(listed, allow_patterns=list(patterns)))
            if reason := _reason_to_refuse(names, sum(max(0, listed[name]) for name in names)):
                raise refuse(reason)
            # Twice the bytes: an interrupted file may start again.
            allowance.raise_by(_REQUESTS_A_FILE * len(names), 2 * sum(listed[name] for name in names))
            return Path(snapshot_download(repository, revision=commit, **wanted))
        except (errors.OfflineModeIsEnabled, errors.RevisionResolutionError, httpx.TransportError):
            pass
        except errors.HfHubHTTPError as error:
            if error.response.status_code < 500:
                raise
        # The Hub is unavailable: use the cache. If it lacks the revision, the library raises LocalEntryNotFoundError.
        return Path(snapshot_download(repository, revision=revision, local_files_only=True, **wanted))


def _reason_to_refuse(names: Iterable[str], size_bytes: int) -> str | None:
    """Return why files of these names and this total size are not downloaded; None if they may be."""
    seen: dict[str, str] = {}
    for name in names:
        try:
            safe_relative_path(name)
        except ValueError as error:
            return str(error)
        if (other := seen.setdefault(comparable_path(name), name)) != name:
            return f"{other!r:.80} and {name!r:.80} are one file on a file system that ignores case and accents"
    if len(seen) > _MOST_FILES:
        return f"{len(seen)} files match, expected at most {_MOST_FILES}"
    if size_bytes > _LIMIT_BYTES:
        return f"its files have {size_bytes >> 30} GiB, expected at most {_LIMIT_BYTES >> 30}"
    return None


def _line(error: BaseException) -> str:
    """Return the error's first line, without the signatures of addresses in it."""
    return redact(first_line(error))[:300]
