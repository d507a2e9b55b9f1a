"""A Parquet file, a batch at a time, and no more of it than a machine can hold: a kilobyte may stand for terabytes."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

_BATCH_ROWS = 1024

CheckSize = Callable[[int, int], None]  # of (rows, bytes); raises where it is too much


def column_names(path: Path) -> list[str]:
    """The names of its columns; a pyarrow.ArrowException where it is no Parquet file."""
    from pyarrow import parquet

    names: list[str] = parquet.ParquetFile(path).schema_arrow.names
    return names


def batches(path: Path, columns: Sequence[str], check_size: CheckSize) -> Iterator[dict[str, list[Any]]]:
    """The cells of `columns` in batches of rows, once `check_size` has allowed what there is so far.

    What its footer promises is checked first, then what is found: a footer may lie, and a text that stands there once
    may be meant a million times. It stays one until it is known how much that is.
    """
    import pyarrow
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    promised = (group.column(place).total_uncompressed_size for group in groups for place in range(group.num_columns))
    check_size(file.metadata.num_rows, sum(promised))
    texts = [field.name for field in file.schema_arrow if field.type in (pyarrow.string(), pyarrow.large_string())]
    rows = size_bytes = 0
    for batch in parquet.ParquetFile(path, read_dictionary=texts).iter_batches(_BATCH_ROWS, columns=list(columns)):
        rows += len(batch)
        size_bytes += sum(_written_out_bytes(column) for column in batch.columns)
        check_size(rows, size_bytes)
        yield {name: _cells(batch[name]) for name in batch.schema.names}


def _cells(column: Any) -> list[Any]:
    decode = getattr(column, "dictionary_decode", None)
    found: list[Any] = (decode() if decode else column).to_pylist()
    return found


def _written_out_bytes(column: Any) -> int:
    """How long a column of a batch is with each of its texts written where it stands."""
    import pyarrow
    from pyarrow import compute

    if not pyarrow.types.is_dictionary(column.type):
        return int(column.nbytes)
    return compute.sum(compute.take(compute.binary_length(column.dictionary), column.indices)).as_py() or 0
