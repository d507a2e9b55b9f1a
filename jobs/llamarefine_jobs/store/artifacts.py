"""Publish and fetch artifacts, checkpoints and files of runs. The store is the pipeline's only state.

The main guarantees, for ``file://`` and ``s3://`` alike (tests/store/ACCEPTANCE.md lists all, with their tests):

- Without a manifest there is no artifact: the files are written first, then `manifest.json`, only if there is none.
- If two writers publish one key, one manifest wins, both succeed, and none of the loser's files stay.
- A fetched file has the size and sha256 that its manifest lists; otherwise an IntegrityError names the file.
- A fetched folder appears complete or not at all.
"""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from llamarefine_jobs.contract.artifact import (
    MANIFEST,
    File,
    Manifest,
    artifact_path,
    checkpoint_path,
    safe_relative_path,
)
from llamarefine_jobs.contract.errors import (
    AccessError,
    DataError,
    DiskFullError,
    IntegrityError,
    LlamaRefineError,
    from_os_error,
)
from llamarefine_jobs.contract.retry import RetryPolicy
from llamarefine_jobs.store.objects import Entry
from llamarefine_jobs.store.uri import open_objects

_TRANSFERS = 8

Item = TypeVar("Item")
Result = TypeVar("Result")


class Store:
    """Artifacts, checkpoints and runs below one URI. Failed requests to a bucket are retried under `retry_policy`."""

    def __init__(self, uri: str, retry_policy: RetryPolicy | None = None) -> None:
        self.retry_policy = retry_policy or RetryPolicy()
        self.objects = open_objects(uri, self.retry_policy)
        self.uri = self.objects.uri

    # Artifacts and checkpoints

    def manifest(self, stage: str, key: str) -> Manifest | None:
        """Return the manifest of an artifact, or None if there is no artifact."""
        return self._manifest(artifact_path(stage, key))

    def publish(self, folder: Path, draft: Manifest) -> Manifest:
        """Publish all files of `folder` as an artifact; return the artifact's manifest.

        `draft` holds everything except the files and the attempt, which this method adds. If another writer has
        published the same key first, that writer's manifest is returned.
        """
        return self._publish(artifact_path(draft.stage, draft.key), folder, draft)

    def fetch(self, manifest: Manifest, into: Path, *prefixes: str) -> Path:
        """Download and verify the files below `prefixes` (default: all files) into the new folder `into`.

        The folder appears once every file is verified. Raises IntegrityError for a wrong or missing file, DataError if
        the artifact was removed meanwhile.
        """
        return self._fetch(artifact_path(manifest.stage, manifest.key), manifest, into, prefixes)

    def verify(self, manifest: Manifest) -> None:
        """Read every byte of an artifact and compare it with the manifest. The IntegrityError names a wrong file."""
        where = artifact_path(manifest.stage, manifest.key)
        _in_parallel(lambda file: self._read_verified(where, manifest, file, Path(os.devnull)), manifest.files)

    def faults(self, manifest: Manifest, checkpoint_step: int | None = None) -> list[str]:
        """Read every byte of an artifact, or of a checkpoint; return one line for each wrong file."""
        where = artifact_path(manifest.stage, manifest.key)
        if checkpoint_step is not None:
            where = checkpoint_path(manifest.stage, manifest.key, checkpoint_step)

        def fault(file: File) -> str | None:
            try:
                self._read_verified(where, manifest, file, Path(os.devnull))
            except IntegrityError as error:
                return str(error)
            return None

        return [text for text in _in_parallel(fault, manifest.files) if text]

    def checkpoint_manifest(self, stage: str, key: str, step: int) -> Manifest | None:
        """Return the manifest of a checkpoint, or None if the checkpoint is absent or incomplete."""
        return self._manifest(checkpoint_path(stage, key, step))

    def publish_checkpoint(self, step: int, folder: Path, draft: Manifest) -> Manifest:
        """Publish a training's state after `step` optimizer steps, then remove the older checkpoints."""
        published = self._publish(checkpoint_path(draft.stage, draft.key, step), folder, draft)
        for older in self.checkpoint_steps(draft.stage, draft.key):
            if older < step:
                self._remove(checkpoint_path(draft.stage, draft.key, older))
        return published

    def fetch_checkpoint(self, stage: str, key: str, into: Path) -> int | None:
        """Download the newest complete checkpoint into `into`; return its step, or None if there is none."""
        while found := self._newest_checkpoint(stage, key):
            step, manifest = found
            where = checkpoint_path(stage, key, step)
            try:
                self._fetch(where, manifest, into, ())
                return step
            except DataError:
                continue  # an earlier process of this training, still stopping, has published a newer checkpoint
        return None

    def remove_checkpoints(self, stage: str, key: str) -> None:
        """Remove all checkpoints of a training whose artifact is published."""
        for step in self.checkpoint_steps(stage, key):
            self._remove(checkpoint_path(stage, key, step))
        for entry in list(self.objects.unfinished(checkpoint_path(stage, key))):  # left by killed processes
            self.objects.delete(entry.path)

    # Runs: small files, replaced as a whole

    def read(self, path: str) -> bytes | None:
        """Return a file of a run, or None if it does not exist."""
        return self.objects.read(path)

    def write(self, path: str, data: bytes, *, retry: bool = True) -> None:
        """Create or replace a file of a run. Without `retry`, a failed request raises StoreError at once."""
        self.objects.write(path, data, retry=retry)

    def entries(self, prefix: str) -> Iterator[Entry]:
        """Yield all objects whose path starts with `prefix`."""
        return self.objects.entries(prefix)

    def now(self) -> datetime:
        """Return the time of the store's own clock, since this machine's clock may be wrong."""
        return self.objects.clock() or datetime.now(UTC)

    def remove(self, paths: Iterable[str]) -> None:
        """Delete objects, several in parallel, in no particular order."""
        _in_parallel(self.objects.delete, paths)

    # Implementation

    def _manifest(self, where: str) -> Manifest | None:
        data = self.objects.read(f"{where}/{MANIFEST}")
        if data is None:
            return None
        try:
            manifest = Manifest.from_bytes(data)
        except ValueError as error:
            raise IntegrityError(f"{self.uri}/{where}/{MANIFEST}: {error}; {self._remedy(where)}") from None
        if where.split("/")[1:3] != [manifest.stage, manifest.key]:
            raise IntegrityError(
                f"{self.uri}/{where}/{MANIFEST}: belongs to {manifest.stage} {manifest.key}; {self._remedy(where)}"
            )
        return manifest

    def _publish(self, where: str, folder: Path, draft: Manifest) -> Manifest:
        existing = self._manifest(where)
        if existing is not None:
            return existing
        attempt = secrets.token_hex(8)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        try:
            files = _in_parallel(lambda path: self._upload(f"{where}/{attempt}", folder, path), paths)
            own_manifest = draft.model_copy(update={"attempt": attempt, "files": tuple(files)})
        except BaseException:
            self._remove_quietly(f"{where}/{attempt}")
            raise
        try:
            is_winner = self.objects.create(f"{where}/{MANIFEST}", own_manifest.to_bytes())
        except (AccessError, DiskFullError):
            # An earlier attempt of this write may have succeeded although its answer was lost.
            with contextlib.suppress(LlamaRefineError):
                if self.objects.read(f"{where}/{MANIFEST}") is None:
                    self._remove_quietly(f"{where}/{attempt}")
            raise  # after a StoreError the manifest may still be written, so its files are kept
        if is_winner:
            return own_manifest
        self._remove_quietly(f"{where}/{attempt}")
        winner = self._manifest(where)
        if winner is None:
            raise IntegrityError(f"{self.uri}/{where}: its manifest vanished while it was published")
        return winner

    def _upload(self, where: str, folder: Path, path: Path) -> File:
        name = path.relative_to(folder).as_posix()
        try:
            safe_relative_path(name)
        except ValueError as error:
            raise DataError(f"{folder}: {error}, so the file cannot be published; rename it") from None
        tally = _Tally()
        self.objects.upload(f"{where}/{name}", path, tally.add)
        return File(path=name, size_bytes=tally.size_bytes, sha256=tally.sha256)

    def _fetch(self, where: str, manifest: Manifest, into: Path, prefixes: tuple[str, ...]) -> Path:
        partial = into.parent / f".fetching-{into.name}-{secrets.token_hex(4)}"
        try:
            partial.mkdir(parents=True)
            _in_parallel(
                lambda file: self._read_verified(where, manifest, file, partial / file.path), manifest.part(*prefixes)
            )
            partial.rename(into)
        except OSError as error:
            raise from_os_error(error) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return into

    def _read_verified(self, where: str, manifest: Manifest, file: File, target: Path) -> None:
        name = f"{self.uri}/{where}/{manifest.attempt}/{file.path}"
        tally = _Tally(limit_bytes=file.size_bytes)
        target.parent.mkdir(parents=True, exist_ok=True)
        wrong = None
        try:
            with target.open("wb") as into:
                if not self.objects.download(f"{where}/{manifest.attempt}/{file.path}", into, tally.add):
                    wrong = "is missing, though the manifest lists it"
        except _TooLongError:
            wrong = f"expected {file.size_bytes} bytes, found more"
        if wrong is None and tally.size_bytes != file.size_bytes:
            wrong = f"expected {file.size_bytes} bytes, found {tally.size_bytes}"
        if wrong is None and tally.sha256 != file.sha256:
            wrong = f"expected sha256 {file.sha256}, found {tally.sha256}"
        if wrong and self.objects.read(f"{where}/{MANIFEST}") is None:
            raise DataError(f"{self.uri}/{where}: was removed while it was read, by gc or by hand; run again")
        if wrong:
            raise IntegrityError(f"{name}: {wrong}; {self._remedy(where)}")

    def _remedy(self, where: str) -> str:
        folder = self.objects.local_path(where) or f"{self.uri}/{where}"
        return f"to recreate it, remove {folder} and run again"

    def _newest_checkpoint(self, stage: str, key: str) -> tuple[int, Manifest] | None:
        listed: list[int] = []
        # Look again as long as other processes change the list meanwhile.
        while (steps := self.checkpoint_steps(stage, key)) != listed:
            for step in reversed(steps):
                manifest = self._manifest(checkpoint_path(stage, key, step))
                if manifest is not None:
                    return step, manifest
            listed = steps
        return None

    def checkpoint_steps(self, stage: str, key: str) -> list[int]:
        """Return the steps of a training that have a checkpoint, complete or not, in ascending order."""
        prefix = checkpoint_path(stage, key) + "/"
        folders = {entry.path[len(prefix) :].split("/")[0] for entry in self.objects.entries(prefix)}
        return sorted(int(folder) for folder in folders if re.fullmatch(r"[0-9]+", folder))

    def _remove(self, where: str) -> None:
        """Remove an artifact or a checkpoint. Its manifest is deleted first, so it never exists without its files."""
        self.objects.delete(f"{where}/{MANIFEST}")
        for entry in list(self.objects.entries(f"{where}/")):
            self.objects.delete(entry.path)

    def _remove_quietly(self, where: str) -> None:
        """Delete an attempt's files, ignoring errors: no manifest lists them, so a remaining file is harmless."""
        try:
            for entry in list(self.objects.entries(f"{where}/")):
                self.objects.delete(entry.path)
        except Exception:
            return


class _TooLongError(Exception):
    """A file has more bytes than its manifest lists."""


class _Tally:
    """Computes size and sha256 of a stream of chunks; raises _TooLongError above `limit_bytes`."""

    def __init__(self, limit_bytes: int | None = None) -> None:
        self.size_bytes = 0
        self._limit_bytes = limit_bytes
        self._digest = hashlib.sha256()

    def add(self, chunk: bytes) -> None:
        self.size_bytes += len(chunk)
        self._digest.update(chunk)
        if self._limit_bytes is not None and self.size_bytes > self._limit_bytes:
            raise _TooLongError

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def _in_parallel(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Return `work(item)` for each item, in order, computed by several threads; the first error cancels the rest."""
    with ThreadPoolExecutor(_TRANSFERS) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
