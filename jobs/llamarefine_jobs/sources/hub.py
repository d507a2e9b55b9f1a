"""A snapshot of a Hugging Face Hub repository, from the network or from the cache on this machine.

What a repository lists is checked before any of it is brought, and what comes is held to that: see hub_client.py.
"""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llamarefine_jobs.contract.artifact import folded, safe_relative_path
from llamarefine_jobs.contract.errors import AccessError, DataError, LlamaRefineError, StoreError, first_line
from llamarefine_jobs.untrusted.log_redaction import redact, redact_logs

_MOST_FILES = 10_000
_MOST_ENTRIES = 100_000  # of a listing, wanted or not
_LIMIT_BYTES = 256 << 30
_ANSWERS_BYTES = 64 << 20  # all that is not a file: listings, pages of errors
_ANSWERS = 200
_REQUESTS_A_FILE = 8  # what a file is, where it lies, redirects, taken up again


def snapshot(repository: str, revision: str | None, kind: str, patterns: Sequence[str], key: str) -> Path:
    """The folder of a repository's files that match `patterns`; its name is the commit.

    Without network, a revision that the cache holds is used. `kind` is ``model`` or ``dataset``,
    `key` the recipe's key that named the repository. Raises DataError where there is no such
    repository or revision, or one that no Hub would serve, AccessError where it is not ours to read,
    StoreError for the network.
    """
    import httpx
    from huggingface_hub import errors

    redact_logs()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it writes addresses, and a file's is signed
    name = repository if revision is None else f"{repository} at {revision}"
    try:
        return _brought(repository, revision, kind, patterns, f"{key}: {name} cannot be brought")
    except LlamaRefineError:
        raise
    except errors.HFValidationError:  # a ValueError too
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
        if error.errno is not None:  # the disk's, not the network's
            raise
        raise StoreError(f"{key}: reading {name} from the Hub failed: {_line(error)}") from None
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError, RecursionError, httpx.InvalidURL) as error:
        raise DataError(f"{key}: {name} cannot be brought: {_line(error)}") from None


def _brought(repository: str, revision: str | None, kind: str, patterns: Sequence[str], refused: str) -> Path:
    """The snapshot's folder; `refused` begins the DataError where the repository is not as it should be."""
    import httpx
    from huggingface_hub import HfApi, errors, snapshot_download
    from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

    from llamarefine_jobs.sources.hub_client import Allowance, guarded, is_commit

    def refuse(reason: str) -> DataError:
        return DataError(f"{refused}: {reason}")

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
            if trouble := _trouble(names, sum(max(0, listed[name]) for name in names)):
                raise refuse(trouble)
            # Twice: a file that broke off may begin anew.
            allowance.raise_by(_REQUESTS_A_FILE * len(names), 2 * sum(listed[name] for name in names))
            return Path(snapshot_download(repository, revision=commit, **wanted))
        except (errors.OfflineModeIsEnabled, errors.RevisionResolutionError, httpx.TransportError):
            pass
        except errors.HfHubHTTPError as error:
            if error.response.status_code < 500:
                raise
        # The Hub is away: what the cache holds, or the error that says so.
        return Path(snapshot_download(repository, revision=revision, local_files_only=True, **wanted))


def _trouble(names: Iterable[str], size_bytes: int) -> str | None:
    """Why files of these names are not brought."""
    seen: dict[str, str] = {}
    for name in names:
        try:
            safe_relative_path(name)
        except ValueError as error:
            return str(error)
        if (other := seen.setdefault(folded(name), name)) != name:
            return f"{other!r:.80} and {name!r:.80} are one file where case and accents do not count"
    if len(seen) > _MOST_FILES:
        return f"{len(seen)} files match, expected at most {_MOST_FILES}"
    if size_bytes > _LIMIT_BYTES:
        return f"its files have {size_bytes >> 30} GiB, expected at most {_LIMIT_BYTES >> 30}"
    return None


def _line(error: BaseException) -> str:
    """Its first line, without what an address in it may be signed by."""
    return redact(first_line(error))[:300]
