"""Rows from CSV, JSON lines, Parquet or a Hub data set, wherever they lie, as written."""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from llamarefine_jobs.contract.errors import DataError
from llamarefine_jobs.contract.recipe import Rows, Source
from llamarefine_jobs.data.columns import delimiter, format_of, missing_columns_error
from llamarefine_jobs.data.dataset_folder import load_split
from llamarefine_jobs.data.parquet import batches, cells, column_names, readable
from llamarefine_jobs.sources import fingerprints, hub, locations, pinning
from llamarefine_jobs.sources.s3 import download_s3
from llamarefine_jobs.sources.web import download

Cells = tuple[Any, ...]
Found = tuple[Sequence[str], list[Cells | None]]  # all columns that are there, and the wanted cells of each row

# Those in wide use: among all that exist, a rare one often fits a little better and is wrong.
_ENCODINGS = ["utf_16", "utf_32", "cp1252", "cp1250", "cp1251", "shift_jis", "euc_jp", "euc_kr", "gb18030", "big5"]
_LONGEST_CELL = 2**31 - 1  # what fits the csv module on every platform
_LIMIT_BYTES = 8 << 30  # of a file as text, of a Parquet file's columns as they lie unpacked
_LIMIT_ROWS = 10_000_000
_DATA_FILES = ("*.parquet", "*.jsonl", "*.json", "*.csv", "*.tsv", "*.gz", "*.zst", "README.md")


@dataclass(frozen=True)
class Table:
    """The columns that were asked for, in that order. A row with cells beyond the header is None.

    A cell that is missing is None; a column that was optional and is not there is None throughout.
    """

    format: str
    rows: list[Cells | None]
    columns: Sequence[str]  # all that are there
    commit: str | None = None


def read_table(rows: Rows, key: str, work: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Table:
    """Read `columns` of the source that the recipe's `key` names. `optional` ones may be absent.

    Raises DataError where the source is not what it should be, or is no longer what was planned.
    """
    path, commit = _bring(rows, key, work)
    name = rows.format if rows.format != "auto" else format_of(path, key)
    wanted = _Wanted(key, rows.source, tuple(columns), frozenset(optional))
    match name:
        case "csv":
            there, found = _csv_rows(path, wanted)
        case "jsonl":
            there, found = _jsonl_rows(path, wanted)
        case "parquet":
            there, found = _parquet_rows(path, wanted)
        case _:
            there, found = _hub_rows(path, wanted, rows.split, work)
    if not found:
        raise DataError(f"{key}: {rows.source} has columns and no row")
    check_unchanged(rows, key)
    return Table(name, found, there, commit)


def check_unchanged(source: Source, key: str) -> None:
    """Raise DataError where `source` is no longer what its fingerprint says."""
    if source.fingerprint is None:
        return
    where = locations.kind(source.source, hub_id_allowed=key.endswith(".base"))
    if fingerprints.was_computed_elsewhere(where, source.fingerprint):
        return
    found = pinning.fingerprint(source.source, where, key)
    if found != source.fingerprint:
        raise DataError(f"{key}: {source.source} changed since the run was planned; submit the run again")


@dataclass(frozen=True)
class _Wanted:
    """What is asked of a table, and the names to complain with."""

    key: str
    source: str
    columns: tuple[str, ...]
    optional: frozenset[str]

    def error(self, text: str) -> DataError:
        return DataError(f"{self.key}: {self.source} {text}")

    def check(self, there: Sequence[str]) -> None:
        missing = [column for column in self.columns if column not in there and column not in self.optional]
        if missing:
            raise missing_columns_error(self.key, self.source, missing, there)
        twice = [column for column in self.columns if list(there).count(column) > 1]
        if twice:
            raise self.error(f"has the column `{twice[0]}` twice; rename one")

    def check_size(self, rows: int, size_bytes: int = 0) -> None:
        """Refuse more than is read at once."""
        if rows > _LIMIT_ROWS or size_bytes > _LIMIT_BYTES:
            raise self.error(
                f"holds {rows:,} rows and {size_bytes / 2**30:.1f} GiB, or more; expected at most {_LIMIT_ROWS:,} rows "
                f"and {_LIMIT_BYTES >> 30} GiB: give a part of it"
            )


def _bring(rows: Rows, key: str, work: Path) -> tuple[Path, str | None]:
    """The local file or folder of a source, and the commit of a Hub repository."""
    into = work / key
    match locations.kind(rows.source):
        case locations.Kind.HTTPS:
            return download(rows.source, into, key), None
        case locations.Kind.S3:
            return download_s3(rows.source, into, rows.fingerprint), None
        case locations.Kind.HUB:
            parts = urlsplit(rows.source)
            repository = parts.path.strip("/")
            if parts.netloc != "datasets" or repository.count("/") > 1 or not repository:
                raise DataError(f"{key}: expected hf://datasets/owner/name, found {rows.source}")
            folder = hub.snapshot(repository, rows.revision, "dataset", _DATA_FILES, key)
            return folder, folder.name
        case locations.Kind.PATH:
            return locations.local_path(rows.source), None
        case _:
            raise DataError(f"{key}: {rows.source} is not a source of these rows")


def _text(path: Path, wanted: _Wanted) -> str:
    """A text file's whole text; DataError with the encoding it seems to have where it is not UTF-8."""
    if path.is_dir():
        raise wanted.error("is a folder; expected a file")
    if path.stat().st_size > _LIMIT_BYTES:
        raise wanted.error(f"is over {_LIMIT_BYTES >> 30} GiB, and read as a whole; give a part of it, or Parquet")
    data = path.read_bytes()
    if not data.strip():
        raise wanted.error("is empty")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        guess = _encoding(data[max(0, error.start - 20_000) : error.start + 20_000])
        raise wanted.error(
            f"is not UTF-8 (line {line}, byte {error.start}); it looks like {guess}: "
            f"convert it with `iconv -f {guess} -t utf-8`"
        ) from None
    if "\x00" in text:
        line = text.count("\n", 0, text.index("\x00")) + 1
        raise wanted.error(f"holds a NUL byte in line {line}, and text has none: remove it, or convert from UTF-16")
    return text


def _encoding(sample: bytes) -> str:
    from charset_normalizer import from_bytes

    best = from_bytes(sample, cp_isolation=_ENCODINGS).best()
    return best.encoding.replace("_", "-") if best else "binary data"


def _csv_rows(path: Path, wanted: _Wanted) -> Found:
    text = _text(path, wanted)
    before = csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(
        io.StringIO(text, newline=""), strict=True, delimiter=delimiter(text, set(wanted.columns) - wanted.optional)
    )
    line = 1  # where the row that is being read begins
    header: list[str] = []
    places: list[int] = []
    found: list[Cells | None] = []
    try:
        for cells in reader:
            line = reader.line_num + 1
            if not cells:  # a blank line
                continue
            if not header:
                wanted.check(cells)
                header = cells
                places = [header.index(column) if column in header else len(header) for column in wanted.columns]
            elif len(cells) > len(header):
                found.append(None)
            else:
                padded = [*cells, *[None] * (len(header) + 1 - len(cells))]
                found.append(tuple(padded[place] for place in places))
            wanted.check_size(len(found))
    except csv.Error as error:
        raise wanted.error(
            f"is not well-formed CSV from line {line} on ({error}): a cell with a quote, a comma or a line's end in it "
            'stands in quotes, and a quote inside is written twice ("")'
        ) from None
    finally:
        csv.field_size_limit(before)
    return header, found


def _jsonl_rows(path: Path, wanted: _Wanted) -> Found:
    found: list[Cells | None] = []
    there: dict[str, None] = {}
    for number, line in enumerate(_text(path, wanted).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            row, reason = None, str(error)
        else:
            reason = "it is another value"
        if not isinstance(row, dict):
            if line.lstrip().startswith("["):
                reason = "it begins a JSON array; `jq -c '.[]'` makes lines of one"
            raise wanted.error(f"line {number} is not one JSON object: {reason}")
        there |= dict.fromkeys(row)
        found.append(tuple(row.get(column) for column in wanted.columns))
        wanted.check_size(number)
    wanted.check(list(there))
    return list(there), found


def _parquet_rows(path: Path, wanted: _Wanted) -> Found:
    rows: list[Cells | None] = []
    with readable(wanted.error):
        there = column_names(path)
        wanted.check(there)
        for batch in batches(path, [column for column in wanted.columns if column in there], wanted.check_size):
            found, absent = cells(batch), [None] * len(batch)
            rows.extend(zip(*(found.get(column, absent) for column in wanted.columns), strict=True))
    return there, rows


def _hub_rows(folder: Path, wanted: _Wanted, split: str, work: Path) -> Found:
    try:
        table, there = load_split(folder, split, work / "datasets")
    except DataError as error:
        raise wanted.error(f"is not read: {error}") from None
    except ValueError as error:
        raise wanted.error(f"is not a data set that can be read: {error}") from None
    if table is None:
        raise wanted.error(f"has no split `{split}`; it has {', '.join(there)}; choose one with {wanted.key}.split")
    wanted.check(table.column_names)
    wanted.check_size(len(table), table.data.nbytes)
    columns = [table[column][:] if column in table.column_names else [None] * len(table) for column in wanted.columns]
    return table.column_names, list(zip(*columns, strict=True))
