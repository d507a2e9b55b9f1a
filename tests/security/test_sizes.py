"""A small file that expands to more data than a machine holds is refused before it is expanded."""

import resource
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from llamarefine_jobs.contract.errors import DataError
from llamarefine_jobs.contract.recipe import Rows
from llamarefine_jobs.data import reading
from llamarefine_jobs.data.reading import read_table


def read(path: Path) -> list[Any]:
    return list(
        read_table(Rows(source=str(path)), "prepare.questions", path.parent / "work", ("question", "answer")).rows
    )


def write_repeated_text(path: Path, times: int = 2000, length: int = 16 << 20) -> None:
    """Write 32 GiB of questions in less than a megabyte: the file holds the text once, and each row refers to it."""
    indices = pyarrow.array([0] * times, pyarrow.int32())
    texts = pyarrow.DictionaryArray.from_arrays(indices, pyarrow.array(["x" * length]))
    parquet.write_table(pyarrow.table({"question": texts, "answer": pyarrow.array(["a"] * times)}), path)
    assert path.stat().st_size < 1 << 20


@pytest.mark.parametrize("place", ["rows.parquet", "dataset/train.parquet"])
def test_a_parquet_file_that_repeats_a_text_too_often_is_refused(place: str, tmp_path: Path) -> None:
    path = tmp_path / place
    path.parent.mkdir(exist_ok=True)
    write_repeated_text(path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"8 GiB") as caught:
        read(path if path.parent == tmp_path else path.parent)
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 << 20, "less than 2 GiB more, in KiB"


def test_a_parquet_file_that_repeats_a_short_text_is_read(tmp_path: Path) -> None:
    write_repeated_text(tmp_path / "rows.parquet", times=3, length=5)
    assert read(tmp_path / "rows.parquet") == [("xxxxx", "a")] * 3


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("rows.csv", b"question,answer\n" + b"a,b\n" * 30),
        ("rows.jsonl", b'{"question": "a", "answer": "b"}\n' * 30),
        ("rows.parquet", b""),
    ],
)
def test_too_many_rows_are_refused(name: str, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_LIMIT_ROWS", 20)
    (tmp_path / name).write_bytes(data)
    if not data:
        cells = pyarrow.array(["a"] * 30)
        parquet.write_table(pyarrow.table({"question": cells, "answer": cells}), tmp_path / name)
    with pytest.raises(DataError, match="expected at most 20 rows"):
        read(tmp_path / name)
