"""Column names of a table, read from the first megabyte of its source.

The launcher's preflight check uses this module, so it needs no library that reads data sets; it uses pyarrow only if
that is installed. reading.py reads whole tables.
"""

import csv
import importlib.util
import io
import json
from collections.abc import Collection, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from llamarefine_jobs.contract.errors import DataError, from_os_error
from llamarefine_jobs.contract.recipe import Rows
from llamarefine_jobs.sources import locations
from llamarefine_jobs.sources.s3 import read_s3_head
from llamarefine_jobs.sources.web import read_head

HEAD_BYTES = 1 << 20
_FORMAT_BY_ENDING = {
    ".csv": "csv",
    ".tsv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}


def columns_of(rows: Rows, key: str) -> list[str] | None:
    """Return the columns that the first megabyte of a source shows; `key` names the source in the recipe.

    Returns None for sources that only prepare reads: built-in rows, Hub data sets, and Parquet files elsewhere.
    Raises DataError, AccessError or StoreError if the source cannot be read or does not begin with rows of its format.
    """
    where = locations.kind(rows.source)
    if where in (locations.Kind.BUILT_IN, locations.Kind.HUB):
        return None
    path = locations.local_path(rows.source) if where is locations.Kind.PATH else None
    name = path or PurePosixPath(unquote(urlsplit(rows.source).path))
    if path and not path.exists():
        raise DataError(f"{key}: there is no {path}")
    kind = rows.format if rows.format != "auto" else format_of(name, key)
    if kind == "parquet":
        return _parquet_columns(path, key) if path and importlib.util.find_spec("pyarrow") else None
    if kind not in ("csv", "jsonl"):
        return None
    head = _head(rows.source, where, path, key)
    text = head.decode("utf-8-sig", errors="replace")  # the head may end inside a character
    if kind == "jsonl":
        found = _jsonl_columns(text, is_whole=len(head) < HEAD_BYTES)
    else:
        found = _csv_columns(text, _required_columns(rows))
    if not found:
        raise DataError(f"{key}: {rows.source} does not begin with a {kind} row")
    return found


def format_of(path: PurePosixPath | Path, key: str) -> str:
    """Return the format that a file name's ending means; `hub` for a folder. Raises DataError for an unknown ending."""
    if isinstance(path, Path) and path.is_dir():
        return "hub"
    found = _FORMAT_BY_ENDING.get(path.suffix.lower())
    if found is None:
        raise DataError(
            f"{key}: {path.name} ends in none of {', '.join(_FORMAT_BY_ENDING)}; set its format with {key}.format"
        )
    return found


def missing_columns_error(key: str, source: str, missing: Sequence[str], present: Sequence[str]) -> DataError:
    """Return the error that names the columns that a source lacks and those that it has."""
    wanted, found = (", ".join(f"`{column}`" for column in columns) for columns in (missing, present))
    return DataError(f"{key}: {source} has no column {wanted}, only {found or 'none'}; name the right one under {key}")


def delimiter(text: str, columns: Collection[str]) -> str:
    """Return the delimiter (comma, semicolon or tab) with which the header has all `columns`; a comma if none has."""
    first_line = text.lstrip("\r\n").split("\n", 1)[0]
    for candidate in (",", ";", "\t"):
        try:
            header = next(csv.reader([first_line], delimiter=candidate), [])
        except csv.Error:
            continue
        if set(columns) <= set(header):
            return candidate
    return ","


def _required_columns(rows: Rows) -> set[str]:
    """Return the columns that the recipe's section names, without the prompt column, which is optional."""
    named = {name: value for name, value in rows if name.endswith("_column") and name != "prompt_column"}
    return set(named.values())


def _csv_columns(text: str, required: set[str]) -> list[str]:
    try:
        lines = csv.reader(io.StringIO(text.lstrip("\r\n"), newline=""), delimiter=delimiter(text, required))
        return next(lines, [])
    except csv.Error:
        return []


def _jsonl_columns(text: str, is_whole: bool) -> list[str]:
    """Return the keys of all rows. The last line may be incomplete, so it counts only if the text `is_whole`."""
    lines = text.split("\n")
    found: dict[str, None] = {}
    for line in lines if is_whole else lines[:-1]:
        try:
            row = json.loads(line) if line.strip() else {}
        except (ValueError, RecursionError):
            return []
        found |= dict.fromkeys(row) if isinstance(row, dict) else {}
    return list(found)


def _parquet_columns(path: Path, key: str) -> list[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        return list(parquet.read_schema(path).names)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{key}: {path} is not a Parquet file that can be read: {str(error).splitlines()[0]}") from None


def _head(source: str, where: locations.Kind, path: Path | None, key: str) -> bytes:
    if where is locations.Kind.HTTPS:
        return read_head(source, key, HEAD_BYTES)
    if where is locations.Kind.S3:
        return read_s3_head(source, key, HEAD_BYTES)
    assert path is not None
    try:
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)
    except OSError as error:
        raise from_os_error(error) from None
