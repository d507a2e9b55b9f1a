"""Parquet files, read batch by batch. The caller's limit is checked first: a kilobyte can unpack to terabytes."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llamarefine_jobs.contract.errors import DataError, first_line

_BATCH_ROWS = 1024

CheckSize = Callable[[int, int], None]  # called with (rows, bytes); raises if they exceed a limit


def column_names(path: Path) -> list[str]:
    """Return the names of the file's columns; raises pyarrow.ArrowException if it is not a Parquet file."""
    from pyarrow import parquet

    names: list[str] = parquet.ParquetFile(path).schema_arrow.names
    return names


@contextlib.contextmanager
def readable(make_error: Callable[[str], DataError]) -> Iterator[None]:
    """Turn pyarrow's errors for a malformed file into the error from `make_error`. Disk errors pass unchanged."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise make_error(f"is not a Parquet file that can be read: {first_line(error)}") from None


def batches(path: Path, columns: Sequence[str], check_size: CheckSize) -> Iterator[Any]:
    """Yield the rows of `columns` as pyarrow batches, each after `check_size` accepts the rows and bytes so far.

    The sizes in the footer are checked first, then the sizes of the batches, because a footer can be wrong and a
    dictionary-encoded text can be repeated a million times. Texts stay dictionary-encoded until their size is checked.
    """
    import pyarrow
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    groups = [file.metadata.row_group(number) for number in range(file.metadata.num_row_groups)]
    declared = (group.column(place).total_uncompressed_size for group in groups for place in range(group.num_columns))
    check_size(file.metadata.num_rows, sum(declared))
    texts = [field.name for field in file.schema_arrow if field.type in (pyarrow.string(), pyarrow.large_string())]
    rows = size_bytes = 0
    for batch in parquet.ParquetFile(path, read_dictionary=texts).iter_batches(_BATCH_ROWS, columns=list(columns)):
        rows += len(batch)
        size_bytes += sum(_decoded_bytes(column) for column in batch.columns)
        check_size(rows, size_bytes)
        yield batch


def cells(batch: Any) -> dict[str, list[Any]]:
    """Return the cells of a batch, by column."""
    return {name: _decoded(batch[name]).to_pylist() for name in batch.schema.names}


def _decoded(column: Any) -> Any:
    return column.dictionary_decode() if _is_dictionary(column) else column


def _is_dictionary(column: Any) -> bool:
    """Return whether a column is dictionary-encoded: each different text is stored once."""
    import pyarrow

    return bool(pyarrow.types.is_dictionary(column.type))


def _decoded_bytes(column: Any) -> int:
    """Return the size of a batch's column after dictionary decoding, without decoding it."""
    from pyarrow import compute

    if not _is_dictionary(column):
        return int(column.nbytes)
    return compute.sum(compute.take(compute.binary_length(column.dictionary), column.indices)).as_py() or 0
