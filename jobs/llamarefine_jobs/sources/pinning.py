"""Pin a recipe's sources: add a fingerprint to each, and check it again where the source is read.

Fingerprints are computed when a run is planned, and checked when a stage reads the source. A source that changed in
between is an error; a source that only moved keeps its artifact key. The fingerprint of a file that the launcher
uploads to the bucket is the sha256 of its bytes, so the same file is the same input on this machine and on a cluster.
"""

import hashlib
import platform

from llamarefine_jobs.contract.errors import DataError
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.retry import RetryPolicy, stage_retry_policy
from llamarefine_jobs.sources.fingerprints import content_sha256, was_computed_elsewhere
from llamarefine_jobs.sources.locations import DOCSTRINGS, Kind, kind, local_path
from llamarefine_jobs.sources.s3 import list_s3


def pin(recipe: Recipe, *, check: bool = True) -> Recipe:
    """Return `recipe` with absolute paths, and with a fingerprint for each source except https and the Hub.

    With `check`, fingerprints that the recipe already holds are computed again and compared, except those that cannot
    be computed from the source (`was_computed_elsewhere`). Raises DataError if a file or an object is missing or has
    changed since it was pinned.
    """
    pinned = {}
    for name, source in recipe.sources().items():
        where = kind(source.source, hub_id_allowed=name == "base")
        changes: dict[str, str] = {}
        if where is Kind.PATH:
            changes["source"] = str(local_path(source.source))
        if not source.fingerprint or (check and not was_computed_elsewhere(where, source.fingerprint)):
            # Only a stage's recipe has fingerprints already, and a stage retries for longer than a command does.
            retry_policy = stage_retry_policy("prepare") if source.fingerprint else None
            found = fingerprint(source.source, where, f"prepare.{name}.source", retry_policy)
            if source.fingerprint and found and source.fingerprint != found:
                raise DataError(
                    f"prepare.{name}.source: {source.source} changed since the run was planned; submit again"
                )
            if found:
                changes["fingerprint"] = found
        pinned[name] = type(source).model_validate(source.model_dump() | changes)
    return recipe.with_sources(pinned)


def fingerprint(source: str, where: Kind, key: str, retry_policy: RetryPolicy | None = None) -> str | None:
    """Return the fingerprint of `source`; None for https and the Hub, whose content only the reading stage knows.

    `key` is the recipe's key that names the source. Raises DataError if there is nothing at `source`.
    """
    match where:
        case Kind.BUILT_IN:
            # The docstrings depend on the running Python. The tiny Llama depends on nothing outside the recipe.
            return f"python:{platform.python_version()}" if source == DOCSTRINGS else "recipe"
        case Kind.PATH:
            path = local_path(source)
            if not path.exists():
                raise DataError(f"{key}: there is no {path}")
            return content_sha256(path)
        case Kind.S3:
            _, prefix, entries = list_s3(source, retry_policy)
            if not entries:
                raise DataError(f"{key}: there is nothing at {source}")
            listing = [(entry.path[len(prefix) :], entry.size_bytes, entry.etag) for entry in entries]
            return f"etag:{hashlib.sha256(repr(listing).encode()).hexdigest()}"
        case _:
            return None
