"""Tables of rows, read unchanged from CSV, JSON lines, Parquet or a Hub data set: local, on the web or in a bucket."""

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
Found = tuple[Sequence[str], list[Cells | None]]  # all columns of the table, and the requested cells of each row

# Only encodings in wide use are guessed: among all encodings, a rare one often fits a little better and is wrong.
_ENCODINGS = ["utf_16", "utf_32", "cp1252", "cp1250", "cp1251", "shift_jis", "euc_jp", "euc_kr", "gb18030", "big5"]
_LONGEST_CELL = 2**31 - 1  # the highest limit that the csv module accepts on every platform
_LIMIT_BYTES = 8 << 30  # of a text file, of the unpacked columns of a Parquet file
_LIMIT_ROWS = 10_000_000
_DATA_FILES = ("*.parquet", "*.jsonl", "*.json", "*.csv", "*.tsv", "*.gz", "*.zst", "README.md")


@dataclass(frozen=True)
class Table:
    """The requested columns of a source.

    Each row has one cell per requested column, in the order of the request. A missing cell is None, and so are all
    cells of a missing optional column. A row with more cells than the header is None.
    """

    format: str
    rows: list[Cells | None]
    columns: Sequence[str]  # all columns of the source
    commit: str | None = None


def read_table(rows: Rows, key: str, work: Path, columns: Sequence[str], optional: Sequence[str] = ()) -> Table:
    """Read `columns` of a source; those in `optional` may be missing. `key` names the source in the recipe.

    Raises DataError if the source is not a well-formed table with these columns, exceeds the limits, or has changed
    since the run was planned.
    """
    path, commit = _fetch(rows, key, work)
    name = rows.format if rows.format != "auto" else format_of(path, key)
    request = _Request(key, rows.source, tuple(columns), frozenset(optional))
    match name:
        case "csv":
            present, found = _csv_rows(path, request)
        case "jsonl":
            present, found = _jsonl_rows(path, request)
        case "parquet":
            present, found = _parquet_rows(path, request)
        case _:
            present, found = _hub_rows(path, request, rows.split, work)
    if not found:
        raise DataError(f"{key}: {rows.source} has columns but no row")
    check_unchanged(rows, key)
    return Table(name, found, present, commit)


def check_unchanged(source: Source, key: str) -> None:
    """Raise DataError if `source` does not match its fingerprint any more."""
    if source.fingerprint is None:
        return
    where = locations.kind(source.source, hub_id_allowed=key.endswith(".base"))
    if fingerprints.was_computed_elsewhere(where, source.fingerprint):
        return
    found = pinning.fingerprint(source.source, where, key)
    if found != source.fingerprint:
        raise DataError(f"{key}: {source.source} changed since the run was planned; submit the run again")


@dataclass(frozen=True)
class _Request:
    """The requested columns of a source, and the names that its errors use."""

    key: str
    source: str
    columns: tuple[str, ...]
    optional: frozenset[str]

    def error(self, text: str) -> DataError:
        return DataError(f"{self.key}: {self.source} {text}")

    def check(self, present: Sequence[str]) -> None:
        """Raise DataError if a required column is missing, or a requested column occurs twice."""
        missing = [column for column in self.columns if column not in present and column not in self.optional]
        if missing:
            raise missing_columns_error(self.key, self.source, missing, present)
        twice = [column for column in self.columns if list(present).count(column) > 1]
        if twice:
            raise self.error(f"has the column `{twice[0]}` twice; rename one")

    def check_size(self, rows: int, size_bytes: int = 0) -> None:
        """Raise DataError if the rows or their size exceed the limits."""
        if rows > _LIMIT_ROWS or size_bytes > _LIMIT_BYTES:
            raise self.error(
                f"has at least {rows:,} rows and {size_bytes / 2**30:.1f} GiB; expected at most {_LIMIT_ROWS:,} rows "
                f"and {_LIMIT_BYTES >> 30} GiB: give a part of it"
            )


def _fetch(rows: Rows, key: str, work: Path) -> tuple[Path, str | None]:
    """Download a remote source; return its local file or folder, and the commit of a Hub repository."""
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
            raise DataError(f"{key}: {rows.source} cannot be read as rows")


def _text(path: Path, request: _Request) -> str:
    """Return the text of a file. Raises DataError if it is not UTF-8; the error names the encoding it seems to have."""
    if path.is_dir():
        raise request.error("is a folder; expected a file")
    if path.stat().st_size > _LIMIT_BYTES:
        raise request.error(f"is over {_LIMIT_BYTES >> 30} GiB, the limit of text files; give a part of it or Parquet")
    data = path.read_bytes()
    if not data.strip():
        raise request.error("is empty")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        guess = _guess_encoding(data[max(0, error.start - 20_000) : error.start + 20_000])
        raise request.error(
            f"is not UTF-8 (line {line}, byte {error.start}); it looks like {guess}: "
            f"convert it with `iconv -f {guess} -t utf-8`"
        ) from None
    if "\x00" in text:
        line = text.count("\n", 0, text.index("\x00")) + 1
        raise request.error(f"has a NUL byte in line {line}, which text never has: remove it, or convert from UTF-16")
    return text


def _guess_encoding(sample: bytes) -> str:
    from charset_normalizer import from_bytes

    best = from_bytes(sample, cp_isolation=_ENCODINGS).best()
    return best.encoding.replace("_", "-") if best else "binary data"


def _csv_rows(path: Path, request: _Request) -> Found:
    text = _text(path, request)
    previous_limit = csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(
        io.StringIO(text, newline=""), strict=True, delimiter=delimiter(text, set(request.columns) - request.optional)
    )
    line = 1  # the first line of the row that is being read
    header: list[str] = []
    places: list[int] = []
    found: list[Cells | None] = []
    try:
        for cells in reader:
            line = reader.line_num + 1
            if not cells:  # a blank line
                continue
            if not header:
                request.check(cells)
                header = cells
                places = [header.index(column) if column in header else len(header) for column in request.columns]
            elif len(cells) > len(header):
                found.append(None)
            else:
                padded = [*cells, *[None] * (len(header) + 1 - len(cells))]
                found.append(tuple(padded[place] for place in places))
            request.check_size(len(found))
    except csv.Error as error:
        raise request.error(
            f"is not well-formed CSV from line {line} on ({error}): put cells that contain a quote, a comma or a line "
            'break in quotes, and write a quote inside them twice ("")'
        ) from None
    finally:
        csv.field_size_limit(previous_limit)
    return header, found


def _jsonl_rows(path: Path, request: _Request) -> Found:
    found: list[Cells | None] = []
    present: dict[str, None] = {}
    for number, line in enumerate(_text(path, request).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            row, reason = None, str(error)
        else:
            reason = "it is a JSON value of another type"
        if not isinstance(row, dict):
            if line.lstrip().startswith("["):
                reason = "it begins a JSON array; convert the array to lines with `jq -c '.[]'`"
            raise request.error(f"line {number} is not one JSON object: {reason}")
        present |= dict.fromkeys(row)
        found.append(tuple(row.get(column) for column in request.columns))
        request.check_size(number)
    request.check(list(present))
    return list(present), found


def _parquet_rows(path: Path, request: _Request) -> Found:
    rows: list[Cells | None] = []
    with readable(request.error):
        present = column_names(path)
        request.check(present)
        for batch in batches(path, [column for column in request.columns if column in present], request.check_size):
            found, missing = cells(batch), [None] * len(batch)
            rows.extend(zip(*(found.get(column, missing) for column in request.columns), strict=True))
    return present, rows


def _hub_rows(folder: Path, request: _Request, split: str, work: Path) -> Found:
    try:
        table, splits = load_split(folder, split, work / "datasets")
    except DataError as error:
        raise request.error(f"is refused: {error}") from None
    except ValueError as error:
        raise request.error(f"is not a data set that can be read: {error}") from None
    if table is None:
        raise request.error(f"has no split `{split}`; it has {', '.join(splits)}; choose one with {request.key}.split")
    request.check(table.column_names)
    request.check_size(len(table), table.data.nbytes)
    columns = [table[column][:] if column in table.column_names else [None] * len(table) for column in request.columns]
    return table.column_names, list(zip(*columns, strict=True))
