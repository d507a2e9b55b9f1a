"""Whether a bucket, or a folder, does what the store needs: tried with one small object, which is removed again."""

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from rich.filesize import decimal

from llamarefine_jobs.contract.errors import LlamaRefineError
from llamarefine_jobs.store.objects import Objects
from llamarefine_jobs.store.uri import open_objects
from llamarefine_k8s.runs.checks import Check, fail, ok, warning

_SKEW_S = 60.0  # S3 refuses requests that are 15 minutes off
_SMALL_DISK_BYTES = 10e9


def check_store(uri: str) -> Iterator[Check]:
    """Put, put only where nothing is, get, list, delete; a bucket's clock, a folder's room."""
    name = "bucket" if uri.startswith("s3://") else "store"
    try:
        objects = open_objects(uri)
        if objects.root:
            with _as_it_was(objects.root):
                yield _rounds(name, objects)
            yield _room(objects.root)
        else:
            yield _rounds(name, objects)
        yield from _clock(objects)
    except LlamaRefineError as error:
        yield fail(name, str(error))


def _rounds(name: str, objects: Objects) -> Check:
    path, data = f"check/{secrets.token_hex(8)}", secrets.token_bytes(1024)
    if not objects.create(path, data):
        return fail(name, f"{objects.uri}: a put of a new object said that it is there", "choose another store")
    try:
        if objects.create(path, b"other"):
            return fail(
                name,
                f"{objects.uri}: a second conditional put replaced the first: If-None-Match is not honoured",
                "two runs that make one artifact at a time could not be told apart; choose another store",
            )
        if objects.read(path) != data:
            return fail(name, f"{objects.uri}: an object came back with other bytes", "choose another store")
        if [entry.path for entry in objects.entries(path)] != [path]:
            return fail(name, f"{objects.uri}: an object is not in the listing", "choose another store")
    finally:
        objects.delete(path)
    if objects.read(path) is not None:
        return fail(name, f"{objects.uri}: an object is still there after it was deleted", "grant its deletion")
    return ok(name, f"{objects.uri}: put, conditional put, get, list and delete work from here")


@contextlib.contextmanager
def _as_it_was(folder: Path) -> Iterator[None]:
    """Leave no folder that was not there."""
    absent = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        yield
    finally:
        for each in absent:
            with contextlib.suppress(OSError):
                each.rmdir()


def _clock(objects: Objects) -> Iterator[Check]:
    there = objects.clock()
    skew_s = (datetime.now(UTC) - there).total_seconds() if there else 0.0
    if abs(skew_s) > _SKEW_S:
        late = "behind" if skew_s < 0 else "ahead of"
        text = f"this machine is {abs(skew_s):.0f} s {late} the bucket, which refuses requests that are 900 s off"
        yield warning("clock", text, "set the clock right (NTP)")


def _room(root: Path) -> Check:
    folder = next(each for each in (root, *root.parents) if each.exists())
    rooms = {place: shutil.disk_usage(place).free for place in (folder, Path(_work()))}
    place = min(rooms, key=lambda each: rooms[each])
    if rooms[place] < _SMALL_DISK_BYTES:
        text = f"{decimal(rooms[place])} free at {place}; a billion parameters need several GB there"
        return warning("disk", text, "free some, or name another folder by --store or LLAMAREFINE_WORK")
    return ok("disk", f"{decimal(rooms[place])} free at {place}")


def _work() -> str:
    """Where stages work on this machine."""
    return os.environ.get("LLAMAREFINE_WORK") or tempfile.gettempdir()
