"""Data set folders, such as a snapshot of a Hub data set, loaded with the `datasets` library.

The data set's card chooses the files that the library reads, and may name any path or URL. So the files are checked
before they are read: each must be in the folder and must not unpack to more than a limit.
"""

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llamarefine_jobs.contract.errors import DataError
from llamarefine_jobs.data.parquet import batches, column_names, readable
from llamarefine_jobs.sources.fingerprints import files_below

_LIMIT_BYTES = 8 << 30  # of one unpacked file
_CHUNK_BYTES = 1 << 20


def load_split(folder: Path, split: str, cache: Path) -> tuple[Any, Sequence[str]]:
    """Return the rows of `split`, or None if it does not exist, and the names of all splits.

    Raises ValueError, in one line, if the folder is not a data set. Raises DataError if the data set names a file
    outside the folder, an archive, or a file that unpacks to more than the limit.
    """
    import datasets

    datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(str(folder), cache_dir=str(cache))
        _check_files(folder, [str(file) for files in (builder.config.data_files or {}).values() for file in files])
        builder.download_and_prepare()
        found = builder.as_dataset()
    except (datasets.exceptions.DatasetsError, ValueError, FileNotFoundError, RuntimeError) as error:
        raise ValueError(str(error.__cause__ or error).splitlines()[0]) from None
    return found.get(split), list(found)


def _check_files(folder: Path, named: Sequence[str]) -> None:
    """Raise DataError if a named file is outside the folder, is an archive, or unpacks to more than the limit."""
    from datasets.utils.extract import Extractor

    own = {file.absolute() for file in files_below(folder)}
    for name in named:
        if Path(name).absolute() not in own:
            raise DataError(
                f"{folder.name} names {name}, which is not a file in it; correct `data_files` in the data set's card"
            )
        packed = Extractor.infer_extractor_format(name)
        if packed == "gzip":
            _check_gzip(Path(name))
        elif name.endswith((".parquet", ".geoparquet", ".gpq")):
            _check_parquet(Path(name))
        elif packed:
            raise DataError(f"{Path(name).name} is an archive ({packed}), and archives are not opened; unpack it first")


def _check_parquet(path: Path) -> None:
    def check_size(rows: int, size_bytes: int) -> None:
        if size_bytes > _LIMIT_BYTES:
            raise DataError(f"{path.name} unpacks to more than {_LIMIT_BYTES >> 30} GiB")

    with readable(lambda reason: DataError(f"{path.name} {reason}")):
        for _ in batches(path, column_names(path), check_size):
            pass


def _check_gzip(path: Path) -> None:
    unpacked_bytes = 0
    with gzip.open(path) as file:
        while chunk := file.read(_CHUNK_BYTES):
            unpacked_bytes += len(chunk)
            if unpacked_bytes > _LIMIT_BYTES:
                raise DataError(f"{path.name} unpacks to more than {_LIMIT_BYTES >> 30} GiB")
