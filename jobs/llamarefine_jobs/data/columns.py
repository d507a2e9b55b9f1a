"""The columns of a table: how they are found, how a missing one is told. Without reading the table, from its head."""

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
    """The columns of the source that the recipe's `key` names, as far as its head shows them.

    None where only prepare can tell: built-in rows, the Hub, a Parquet file that is not on this machine. Raises
    DataError, AccessError or StoreError where the source is not there, or its head is not what it should be.
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
    text = head.decode("utf-8-sig", errors="replace")  # the cut may fall into a character
    found = _jsonl_columns(text, len(head) < HEAD_BYTES) if kind == "jsonl" else _csv_columns(text, _wanted(rows))
    if not found:
        raise DataError(f"{key}: {rows.source} begins with no row of {kind}")
    return found


def format_of(path: PurePosixPath | Path, key: str) -> str:
    """The format that a file's ending says, `hub` for a folder; DataError where it says none."""
    if isinstance(path, Path) and path.is_dir():
        return "hub"
    found = _FORMAT_BY_ENDING.get(path.suffix.lower())
    if found is None:
        raise DataError(
            f"{key}: {path.name} ends in none of {', '.join(_FORMAT_BY_ENDING)}; say what it is with {key}.format"
        )
    return found


def missing_columns_error(key: str, source: str, missing: Sequence[str], there: Sequence[str]) -> DataError:
    """The error that says which columns a source lacks and which it has."""
    wanted, found = (", ".join(f"`{column}`" for column in columns) for columns in (missing, there))
    return DataError(f"{key}: {source} has no column {wanted}, only {found or 'none'}; name the right one under {key}")


def delimiter(text: str, columns: Collection[str]) -> str:
    """The delimiter under which the header has `columns`; a comma where none does."""
    first_line = text.lstrip("\r\n").split("\n", 1)[0]
    for each in (",", ";", "\t"):
        try:
            header = next(csv.reader([first_line], delimiter=each), [])
        except csv.Error:
            continue
        if set(columns) <= set(header):
            return each
    return ","


def _wanted(rows: Rows) -> set[str]:
    """The columns that a recipe's section names, but for the prompt's, which may be absent."""
    named = {name: value for name, value in rows if name.endswith("_column") and name != "prompt_column"}
    return set(named.values())


def _csv_columns(text: str, wanted: set[str]) -> list[str]:
    try:
        lines = csv.reader(io.StringIO(text.lstrip("\r\n"), newline=""), delimiter=delimiter(text, wanted))
        return next(lines, [])
    except csv.Error:
        return []


def _jsonl_columns(text: str, is_whole: bool) -> list[str]:
    """The keys of the rows whose lines are whole."""
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
