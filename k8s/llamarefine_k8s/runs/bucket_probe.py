"""Checks that a bucket, or a folder, does what the store needs, with one small object that is deleted again."""

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from rich.filesize import decimal

from llamarefine_jobs.contract.environment import WORK_FOLDER
from llamarefine_jobs.contract.errors import LlamaRefineError
from llamarefine_jobs.store.objects import Objects
from llamarefine_jobs.store.uri import open_objects
from llamarefine_k8s.runs.checks import Check, fail, ok, warning

_SKEW_S = 60.0  # S3 refuses requests that are 15 minutes off
_SMALL_DISK_BYTES = 10e9


def check_store(uri: str) -> Iterator[Check]:
    """Check put, conditional put, get, list and delete; also the clock for a bucket, the free space for a folder.

    An object store that refuses or cannot be reached is a failed check; nothing is raised.
    """
    name = "bucket" if uri.startswith("s3://") else "store"
    try:
        objects = open_objects(uri)
        if objects.root:
            with _remove_new_folders(objects.root):
                yield _check_operations(name, objects)
            yield _check_free_space(objects.root)
        else:
            yield _check_operations(name, objects)
        yield from _check_clock(objects)
    except LlamaRefineError as error:
        yield fail(name, str(error))


def _check_operations(name: str, objects: Objects) -> Check:
    path, data = f"check/{secrets.token_hex(8)}", secrets.token_bytes(1024)
    if not objects.create(path, data):
        return fail(
            name,
            f"{objects.uri}: a put of a new object reported that it exists",
            "choose another store",
        )
    try:
        if objects.create(path, b"other"):
            return fail(
                name,
                f"{objects.uri}: a second conditional put replaced the first: If-None-Match is not honoured",
                "two runs that make the same artifact at once would overwrite each other; choose another store",
            )
        if objects.read(path) != data:
            return fail(name, f"{objects.uri}: an object was read back with other bytes", "choose another store")
        if [entry.path for entry in objects.entries(path)] != [path]:
            return fail(name, f"{objects.uri}: a new object is missing from the listing", "choose another store")
    finally:
        objects.delete(path)
    if objects.read(path) is not None:
        return fail(name, f"{objects.uri}: an object still exists after it was deleted", "allow its deletion")
    return ok(name, f"{objects.uri}: put, conditional put, get, list and delete work from here")


@contextlib.contextmanager
def _remove_new_folders(folder: Path) -> Iterator[None]:
    """At the end, remove `folder` and those of its parents that did not exist before, if they are empty."""
    absent = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        yield
    finally:
        for each in absent:
            with contextlib.suppress(OSError):
                each.rmdir()


def _check_clock(objects: Objects) -> Iterator[Check]:
    there = objects.clock()
    skew_s = (datetime.now(UTC) - there).total_seconds() if there else 0.0
    if abs(skew_s) > _SKEW_S:
        late = "behind" if skew_s < 0 else "ahead of"
        text = f"this machine is {abs(skew_s):.0f} s {late} the bucket, which refuses requests that are 900 s off"
        yield warning("clock", text, "correct the clock (NTP)")


def _check_free_space(root: Path) -> Check:
    folder = next(each for each in (root, *root.parents) if each.exists())
    free_bytes = {place: shutil.disk_usage(place).free for place in (folder, Path(_work_folder()))}
    place = min(free_bytes, key=lambda each: free_bytes[each])
    if free_bytes[place] < _SMALL_DISK_BYTES:
        text = f"{decimal(free_bytes[place])} free at {place}; a billion parameters need several GB there"
        return warning("disk", text, "free some space, or choose another folder by --store or LLAMAREFINE_WORK")
    return ok("disk", f"{decimal(free_bytes[place])} free at {place}")


def _work_folder() -> str:
    """Return the folder in which stages keep their working files on this machine."""
    return os.environ.get(WORK_FOLDER) or tempfile.gettempdir()
