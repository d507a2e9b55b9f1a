"""A Parquet file, a batch at a time, and no more of it than a machine can hold: a kilobyte may stand for terabytes."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llamarefine_jobs.contract.errors import DataError, first_line

_BATCH_ROWS = 1024

CheckSize = Callable[[int, int], None]  # of (rows, bytes); raises where it is too much


def column_names(path: Path) -> list[str]:
    """The names of its columns; a pyarrow.ArrowException where it is no Parquet file."""
    from pyarrow import parquet

    names: list[str] = parquet.ParquetFile(path).schema_arrow.names
    return names


@contextlib.contextmanager
def readable(refuse: Callable[[str], DataError]) -> Iterator[None]:
    """Turn what says that a file is none into the error that `refuse` makes; the disk's own errors are left."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise refuse(f"is not a Parquet file that can be read: {first_line(error)}") from None


def batches(path: Path, columns: Sequence[str], check_size: CheckSize) -> Iterator[Any]:
    """The rows of `columns` in pyarrow's batches, once `check_size` has allowed what there is so far.

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
        yield batch


def cells(batch: Any) -> dict[str, list[Any]]:
    """The cells of a batch, by column."""
    return {name: _decoded(batch[name]).to_pylist() for name in batch.schema.names}


def _decoded(column: Any) -> Any:
    return column.dictionary_decode() if _is_dictionary(column) else column


def _is_dictionary(column: Any) -> bool:
    """Whether each text of a column stands there once."""
    import pyarrow

    return bool(pyarrow.types.is_dictionary(column.type))


def _written_out_bytes(column: Any) -> int:
    """How long a column of a batch is with each of its texts written where it stands."""
    from pyarrow import compute

    if not _is_dictionary(column):
        return int(column.nbytes)
    return compute.sum(compute.take(compute.binary_length(column.dictionary), column.indices)).as_py() or 0
