"""A snapshot of a Hugging Face Hub repository, from the network or from the cache on this machine."""

import logging
from collections.abc import Sequence
from pathlib import Path

from llamarefine_jobs.contract.errors import AccessError, DataError, StoreError


def snapshot(repository: str, revision: str | None, kind: str, patterns: Sequence[str], key: str) -> Path:
    """The folder of a repository's files that match `patterns`; its name is the commit.

    Without network, a revision that the cache holds is used. `kind` is ``model`` or ``dataset``,
    `key` the recipe's key that named the repository. Raises DataError where there is no such
    repository or revision, AccessError where it is not ours to read, StoreError for the network.
    """
    from huggingface_hub import errors, snapshot_download

    logging.getLogger("httpx").setLevel(logging.WARNING)  # it writes addresses, and a file's is signed
    name = repository if revision is None else f"{repository} at {revision}"
    try:
        return Path(snapshot_download(repository, repo_type=kind, revision=revision, allow_patterns=list(patterns)))
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
    except errors.HfHubHTTPError as error:
        raise StoreError(f"{key}: the Hub failed on {name}: {str(error).splitlines()[0]}") from None
    except ValueError as error:  # a name in the repository's listing that leads out of its folder
        raise DataError(f"{key}: {name} cannot be brought: {str(error).splitlines()[0]}") from None
    except OSError as error:
        if error.errno is not None:  # the disk's, not the network's
            raise
        raise StoreError(f"{key}: reading {name} from the Hub failed: {str(error).splitlines()[0]}") from None
