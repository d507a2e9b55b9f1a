"""Reading: cells are read unchanged, and every error of a file is reported in one line."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamarefine_jobs.contract.errors import DataError, StoreError
from llamarefine_jobs.contract.recipe import Rows
from llamarefine_jobs.data import reading
from llamarefine_jobs.data.reading import Table, read_table
from llamarefine_jobs.sources import locations, pinning

texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x00"), max_size=40)


def read(path: Path, *columns: str, **settings: Any) -> Table:
    rows = Rows(source=str(path), **settings)
    return read_table(rows, "prepare.questions", path.parent / "work", columns or ("question", "answer"))


def write(folder: Path, name: str, data: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def refusal(path: Path, *columns: str, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(path, *columns, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@given(rows=st.lists(st.tuples(texts, texts), min_size=1, max_size=8), delimiter=st.sampled_from(",;\t"))
def test_csv_cells_are_read_unchanged(tmp_path_factory: Any, rows: list[tuple[str, str]], delimiter: str) -> None:
    sheet = io.StringIO(newline="")
    csv.writer(sheet, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([("question", "answer"), *rows])
    path = write(tmp_path_factory.mktemp("csv"), "rows.csv", sheet.getvalue())
    assert read(path).rows == rows


@given(rows=st.lists(st.tuples(texts, texts), min_size=1, max_size=8), escaped=st.booleans())
def test_json_lines_are_read_unchanged(tmp_path_factory: Any, rows: list[tuple[str, str]], escaped: bool) -> None:
    lines = "".join(json.dumps({"question": q, "answer": a}, ensure_ascii=escaped) + "\n" for q, a in rows)
    path = write(tmp_path_factory.mktemp("jsonl"), "rows.jsonl", lines)
    assert read(path).rows == rows


def test_the_requested_columns_of_a_parquet_file_are_read(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    turns = [[{"role": "user", "content": "hi"}], None]
    parquet.write_table(pyarrow.table({"answer": ["a", None], "x": [1, 2], "question": turns}), path)
    assert read(path).rows == [(turns[0], "a"), (None, None)]


def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path: Path) -> None:
    assert read(write(tmp_path, "rows.csv", b"\xef\xbb\xbfquestion,answer\nq,a\n")).rows == [("q", "a")]


def test_missing_cells_are_none_and_a_row_with_too_many_cells_is_none(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.csv", "question,answer\nq\n\nq,a,b\nq,a\n")
    assert read(path).rows == [("q", None), None, ("q", "a")]


def test_the_error_for_a_missing_column_lists_the_columns_of_the_file(tmp_path: Path) -> None:
    for path in (
        write(tmp_path, "rows.csv", "index,Question,text\n1,q,a\n"),
        write(tmp_path, "rows.jsonl", '{"index": 1, "Question": "q", "text": "a"}\n'),
    ):
        message = refusal(path)
        assert "`question`, `answer`" in message
        assert "`index`, `Question`, `text`" in message


def test_a_column_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    assert "`answer` twice" in refusal(write(tmp_path, "rows.csv", "question,answer,answer\nq,a,b\n"))


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
@pytest.mark.parametrize("data", [b"", b" \n\n"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str, data: bytes) -> None:
    assert "is empty" in refusal(write(tmp_path, name, data))


def test_a_file_with_only_a_header_is_refused(tmp_path: Path) -> None:
    assert "no row" in refusal(write(tmp_path, "rows.csv", "question,answer\n"))


@pytest.mark.parametrize(
    ("encoding", "named"),
    [("cp1251", "cp1251"), ("utf-16", "utf-16"), ("shift_jis", "shift-jis"), ("euc_kr", "euc-kr")],
)
def test_the_error_for_a_file_that_is_not_utf_8_names_its_encoding(tmp_path: Path, encoding: str, named: str) -> None:
    sentences = {
        "cp1251": "Что такое общая память? Это память, которую видят все потоки блока.",
        "utf-16": "What is shared memory? It is memory that all threads of a block see.",
        "shift_jis": "共有メモリとは何ですか。ブロック内のすべてのスレッドが見るメモリです。",
        "euc_kr": "공유 메모리는 무엇입니까? 블록의 모든 스레드가 보는 메모리입니다.",
    }
    text = "question,answer\n" + f"{sentences[encoding]},{sentences[encoding]}\n" * 20
    message = refusal(write(tmp_path, "rows.csv", text.encode(encoding)))
    assert "is not UTF-8 (line" in message
    assert f"`iconv -f {named} -t utf-8`" in message


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl"])
def test_the_error_for_a_nul_byte_names_its_line(tmp_path: Path, name: str) -> None:
    assert "NUL byte in line 3" in refusal(write(tmp_path, name, b"question,answer\nq,a\nq\x00,a\n"))


def test_the_error_for_an_unbalanced_quote_names_the_first_line_of_its_row(tmp_path: Path) -> None:
    assert "from line 3 on" in refusal(write(tmp_path, "rows.csv", 'question,answer\nq,a\n"q,a\nq,a\nq,a\n'))
    assert "from line 4 on" in refusal(write(tmp_path, "more.csv", 'question,answer\nq,"a\nb"\n"q"x,a\nq,a\n'))


def test_a_cell_of_ten_megabytes_is_read(tmp_path: Path) -> None:
    long = "x" * 10_000_000
    limit = csv.field_size_limit()
    assert read(write(tmp_path, "rows.csv", f"question,answer\nq,{long}\n")).rows == [("q", long)]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    ("line", "expected"),
    [('{"question": ', "line 2"), ("[1]", "JSON array"), ("3", "not one JSON object"), ("[" * 100_000, "line 2")],
)
def test_the_error_for_bad_json_names_its_line(tmp_path: Path, line: str, expected: str) -> None:
    assert expected in refusal(write(tmp_path, "rows.jsonl", '{"question": "q", "answer": "a"}\n' + line + "\n"))


def test_a_malformed_parquet_file_is_refused(tmp_path: Path) -> None:
    assert "not a Parquet file" in refusal(write(tmp_path, "rows.parquet", b"PAR1 no"))


def test_a_file_with_an_unknown_ending_needs_a_format(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.txt", "question,answer\nq,a\n")
    assert "prepare.questions.format" in refusal(path)
    assert read(path, format="csv").rows == [("q", "a")]


def test_a_data_set_folder_is_read_by_split(tmp_path: Path) -> None:
    folder = tmp_path / "dataset"
    (folder / "data").mkdir(parents=True)
    write(
        folder / "data", "train-00000.jsonl", '{"question": "q1", "answer": "a1"}\n{"question": "q2", "answer": "a2"}\n'
    )
    write(folder / "data", "test-00000.jsonl", '{"question": "q3", "answer": "a3"}\n')
    assert read(folder).rows == [("q1", "a1"), ("q2", "a2")]
    assert read(folder, split="test").rows == [("q3", "a3")]
    assert "it has train, test" in refusal(folder, split="validation")
    assert "`prompt`" in refusal(folder, "prompt")


def test_an_unreachable_hub_is_a_store_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    rows = Rows(source="hf://datasets/nobody-here/nothing")
    with pytest.raises(StoreError, match="cannot be reached"):
        read_table(rows, "prepare.preferences", tmp_path, ("prompt",))
    with pytest.raises(DataError, match="hf://datasets/owner/name"):
        read_table(Rows(source="hf://models/x"), "prepare.preferences", tmp_path, ("prompt",))


def test_a_source_that_changed_after_it_was_pinned_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, "rows.csv", "question,answer\nq,a\n")
    pinned = pinning.fingerprint(str(path), locations.Kind.PATH, "prepare.questions")
    assert read(path, fingerprint=pinned).rows == [("q", "a")]
    path.write_text("question,answer\nq,b\n")
    assert "changed" in refusal(path, fingerprint=pinned)


def test_rows_in_a_bucket_are_read(tmp_path: Path, s3_uri: str) -> None:
    from llamarefine_jobs.store.uri import open_objects

    open_objects(s3_uri).write("rows.csv", b"question,answer\nq,a\n")
    rows = Rows(source=f"{s3_uri}/rows.csv")
    assert reading.read_table(rows, "prepare.questions", tmp_path, ("answer",)).rows == [("a",)]
