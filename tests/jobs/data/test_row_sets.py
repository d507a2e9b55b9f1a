"""Row sets: every row is kept unchanged or dropped for one counted reason."""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamarefine_jobs.contract.errors import DataError
from llamarefine_jobs.contract.prompt import question
from llamarefine_jobs.data import row_sets
from llamarefine_jobs.data.row_sets import RowSet
from llamarefine_jobs.data.rows import Row, pair_row, question_row
from llamarefine_jobs.data.splits import fold, group_rows
from llamarefine_jobs.models import tiny_llama
from llamarefine_jobs.models.encoding import encode


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_llama.train_tokenizer(["What is a warp? A warp is a group of threads."], 300)


def questions(*table: Sequence[Any] | None, max_cell_bytes: int = 1000) -> RowSet:
    return make_row_set("questions", question_row, table, max_cell_bytes)


def pairs(*table: Sequence[Any] | None, max_cell_bytes: int = 1000) -> RowSet:
    return make_row_set("preferences", pair_row, table, max_cell_bytes)


def make_row_set(name: Any, make: Callable[..., Row], table: Sequence[Any], max_cell_bytes: int) -> RowSet:
    rows = RowSet(name, len(table))
    row_sets.check_rows(rows, table, make, max_cell_bytes)
    groups, _ = group_rows([row.user_turns[0] for row in rows.rows], [], 0.9)
    rows.rows = [replace(row, group=group, split="train") for row, group in zip(rows.rows, groups, strict=True)]
    return rows


def count_outcomes(rows: RowSet) -> int:
    return sum(rows.outcomes().values())


GOOD = ("q", "a")

cells = st.one_of(
    st.none(),
    st.sampled_from(
        ["What is a warp?", "what is a  WARP", "Yes.", "No.", "", "  ", "\x00", "</s>", "\ud800", "w " * 600]
    ),
    st.sampled_from([math.nan, 1.5, 3, True, b"bytes", ["x"], {"role": "user"}]),
    st.text(max_size=30),
)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.tuples(cells, cells)), max_size=12),
    st.sampled_from(["keep_first", "keep_all", "drop"]),
    st.sampled_from(["drop", "truncate"]),
    st.integers(1, 12),
)
def test_every_row_has_exactly_one_outcome(table: list[Any], policy: str, too_long: str, most: int) -> None:
    table = [*table, ("A usable question", "with an answer.")]
    tokenizer = tiny_llama.train_tokenizer(["a"], 300)
    rows = RowSet("questions", len(table))
    with contextlib.suppress(DataError):  # raised when no row is left; then all rows are counted as dropped
        row_sets.check_rows(rows, row_sets.take_evenly(rows, table, most), question_row, 1000)
        groups, _ = group_rows([row.user_turns[0] for row in rows.rows], [], 0.9)
        rows.rows = [replace(row, group=group, split="train") for row, group in zip(rows.rows, groups, strict=True)]
        row_sets.drop_duplicates(rows)
        row_sets.resolve_conflicts(rows, policy)
        row_sets.fit_lengths(rows, tokenizer, 120, too_long)
    assert count_outcomes(rows) == len(table)
    given_cells = [cells for cells in table if cells is not None]
    for row in rows.rows:
        assert row.tokens <= 120
        question_text, answer_text = row.texts
        assert any(str(cells[0]) == question_text and str(cells[1]).startswith(answer_text) for cells in given_cells)


def test_unusable_rows_are_dropped_and_counted_by_reason() -> None:
    rows = questions(GOOD, None, ("q", " "), ("q", ""), ("q", "x" * 10_000_000), max_cell_bytes=1_000_000)
    assert [row.texts for row in rows.rows] == [list(GOOD)]
    assert rows.dropped == {"more cells than columns": 1, "empty answer": 2, "cell over max_cell_bytes": 1}
    assert pairs(("q", "good", "bad"), ("q", "same", "same ")).dropped == {"equal chosen and rejected": 1}


def test_the_error_for_no_usable_row_lists_the_reasons() -> None:
    with pytest.raises(DataError, match=r"none of the 2 rows can be used: empty answer \(2\)"):
        questions(("q", ""), ("r", " "))


def test_of_equal_rows_the_first_is_kept() -> None:
    rows = questions(*[GOOD] * 5)
    row_sets.drop_duplicates(rows)
    assert rows.dropped == {"exact duplicate": 4}


def test_of_near_duplicates_with_one_answer_the_first_is_kept_unchanged() -> None:
    rows = questions(
        ("What is a Warp?", "32 threads."), ("what is a  warp", "32 threads"), ("What is a warp?", "A thing.")
    )
    row_sets.drop_duplicates(rows)
    assert [row.texts for row in rows.rows] == [["What is a Warp?", "32 threads."], ["What is a warp?", "A thing."]]
    assert rows.dropped == {"near duplicate": 1}


@pytest.mark.parametrize(("policy", "kept"), [("keep_first", "12x"), ("keep_all", "1234x"), ("drop", "x")])
def test_conflicting_answers_are_recorded_and_resolved_by_the_policy(policy: str, kept: str) -> None:
    rows = questions(("A b?", "1"), ("C d?", "2"), ("a b", "3"), ("C  d?", "4"), ("E?", "x"))
    row_sets.resolve_conflicts(rows, policy)
    assert "".join(row.answers[0] for row in rows.rows) == kept
    assert rows.conflicts == {"A b?": ["1", "3"], "C d?": ["2", "4"]}
    assert count_outcomes(rows) == 5


def test_answers_that_differ_only_in_case_or_spacing_do_not_conflict() -> None:
    rows = questions(("A b?", "It is one."), ("a b?", "it is  one"))
    row_sets.resolve_conflicts(rows, "drop")
    assert not rows.conflicts


def test_a_pair_that_swaps_an_earlier_pairs_answers_is_dropped() -> None:
    rows = pairs(("Which?", "yes", "no"), ("which", "No.", "Yes."), ("Which?", "yes", "no"))
    row_sets.drop_duplicates(rows)
    assert rows.dropped == {"swaps chosen and rejected of an earlier pair": 1, "exact duplicate": 1}


def test_a_row_that_is_too_long_is_dropped_or_cut_after_a_whole_sentence(tokenizer: Any) -> None:
    answer = "A warp is 32 threads. It runs in step.\nSteps:\n1. One! " + "and so on " * 40
    table = [("What is a warp?", "Short."), ("What is a warp then?", answer), ("Why?", "no end " * 60)]
    limit = len(encode(tokenizer, question(table[1][0]), answer[:38])) + 3
    cut = questions(*table)
    row_sets.fit_lengths(cut, tokenizer, limit, "truncate")
    assert [row.answers[0] for row in cut.rows] == ["Short.", "A warp is 32 threads. It runs in step."]
    assert cut.truncated == 1
    assert cut.dropped == {"over max_length_tokens, and no sentence of the answer fits": 1}
    dropped = questions(*table)
    row_sets.fit_lengths(dropped, tokenizer, limit, "drop")
    assert [row.answers[0] for row in dropped.rows] == ["Short."]
    assert dropped.dropped == {"over max_length_tokens": 2}


def test_a_row_with_a_special_token_in_its_text_is_dropped(tokenizer: Any) -> None:
    rows = questions(GOOD, ("What ends an answer?", "The token </s> does."))
    row_sets.fit_lengths(rows, tokenizer, 100, "drop")
    assert rows.dropped == {"special token in the text": 1}


def test_max_rows_takes_rows_at_equal_distances() -> None:
    rows = RowSet("questions", 10)
    assert row_sets.take_evenly(rows, [(str(number),) for number in range(10)], 4) == [("0",), ("2",), ("5",), ("7",)]
    assert rows.dropped == {"not taken (max_rows)": 6}


def test_rows_that_are_folded_for_comparison_keep_their_text() -> None:
    assert fold("  What IS it?") == "what is it"
    rows = questions(("  What IS it?", "\tThis\r\n"))
    row_sets.drop_duplicates(rows)
    assert rows.rows[0].texts == ["  What IS it?", "\tThis\r\n"]
