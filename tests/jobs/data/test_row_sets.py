"""Rows: every one is kept or counted out for one reason, and what is kept is as it was given."""

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
from llamarefine_jobs.data.row_sets import Row, RowSet
from llamarefine_jobs.data.splits import fold, group_rows
from llamarefine_jobs.models import tiny_llama
from llamarefine_jobs.models.encoding import encode


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_llama.train_tokenizer(["What is a warp? A warp is a group of threads."], 300)


def questions(*table: Sequence[Any] | None, max_cell_bytes: int = 1000) -> RowSet:
    return rows_of("questions", row_sets.question_row, table, max_cell_bytes)


def pairs(*table: Sequence[Any] | None, max_cell_bytes: int = 1000) -> RowSet:
    return rows_of("preferences", row_sets.pair_row, table, max_cell_bytes)


def rows_of(name: Any, make: Callable[..., Row], table: Sequence[Any], max_cell_bytes: int) -> RowSet:
    rows = RowSet(name, len(table))
    row_sets.check_rows(rows, table, make, max_cell_bytes)
    groups, _ = group_rows([row.asks[0] for row in rows.rows], [], 0.9)
    rows.rows = [replace(row, group=group, split="train") for row, group in zip(rows.rows, groups, strict=True)]
    return rows


def accounted(rows: RowSet) -> int:
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
def test_every_question_read_is_accounted_for(table: list[Any], policy: str, too_long: str, most: int) -> None:
    table = [*table, ("A question of its own", "with an answer.")]
    tokenizer = tiny_llama.train_tokenizer(["a"], 300)
    rows = RowSet("questions", len(table))
    with contextlib.suppress(DataError):  # where none is left, all are counted out
        row_sets.check_rows(rows, row_sets.take_evenly(rows, table, most), row_sets.question_row, 1000)
        groups, _ = group_rows([row.asks[0] for row in rows.rows], [], 0.9)
        rows.rows = [replace(row, group=group, split="train") for row, group in zip(rows.rows, groups, strict=True)]
        row_sets.drop_duplicates(rows)
        row_sets.resolve_conflicts(rows, policy)
        row_sets.fit_lengths(rows, tokenizer, 120, too_long)
    assert accounted(rows) == len(table)
    given_cells = [cells for cells in table if cells is not None]
    for row in rows.rows:
        assert row.tokens <= 120
        asked, answered = row.texts
        assert any(str(cells[0]) == asked and str(cells[1]).startswith(answered) for cells in given_cells)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (None, "more cells than columns"),
        ((None, "a"), "missing question"),
        (("q", math.nan), "missing answer"),
        (("q", " \n"), "empty answer"),
        (("q", "a\x00"), "NUL bytes"),
        (("q", "\ud800"), "broken Unicode"),
        (("q", "é" * 501), "cell over max_cell_bytes"),
        (("q", b"a"), "cell that is neither text nor a list of messages"),
        (("q", question("a")), "answer that is not text"),
    ],
)
def test_a_question_that_cannot_be_used_has_its_reason(row: Any, reason: str) -> None:
    assert questions(GOOD, row).dropped == {reason: 1}


def test_a_cell_of_ten_megabytes_is_counted_not_kept() -> None:
    assert questions(GOOD, ("q", "x" * 10_000_000), max_cell_bytes=1_000_000).dropped == {"cell over max_cell_bytes": 1}


def test_numbers_are_text_as_python_writes_them() -> None:
    assert questions(("How many?", 32), ("Which?", 1.5)).rows[0].answers == ("32",)


def test_no_row_that_can_be_used_says_why() -> None:
    with pytest.raises(DataError, match=r"none of the 2 rows can be used: empty answer \(2\)"):
        questions(("q", ""), ("r", " "))


def test_a_table_of_nothing_but_duplicates_keeps_one() -> None:
    rows = questions(*[GOOD] * 5)
    row_sets.drop_duplicates(rows)
    assert rows.dropped == {"exact duplicate": 4}


def test_of_near_duplicates_with_one_answer_the_first_stays_as_it_was_written() -> None:
    rows = questions(
        ("What is a Warp?", "32 threads."), ("what is a  warp", "32 threads"), ("What is a warp?", "A thing.")
    )
    row_sets.drop_duplicates(rows)
    assert [row.texts for row in rows.rows] == [["What is a Warp?", "32 threads."], ["What is a warp?", "A thing."]]
    assert rows.dropped == {"near duplicate": 1}


@pytest.mark.parametrize(("policy", "kept"), [("keep_first", "12x"), ("keep_all", "1234x"), ("drop", "x")])
def test_conflicting_answers_are_reported_and_settled(policy: str, kept: str) -> None:
    rows = questions(("A b?", "1"), ("C d?", "2"), ("a b", "3"), ("C  d?", "4"), ("E?", "x"))
    row_sets.resolve_conflicts(rows, policy)
    assert "".join(row.answers[0] for row in rows.rows) == kept
    assert rows.conflicts == {"A b?": ["1", "3"], "C d?": ["2", "4"]}
    assert accounted(rows) == 5


def test_answers_that_differ_only_in_spelling_are_no_conflict() -> None:
    rows = questions(("A b?", "It is one."), ("a b?", "it is  one"))
    row_sets.resolve_conflicts(rows, "drop")
    assert not rows.conflicts


OTHER_PROMPT = "chosen and rejected do not answer the same prompt"
DIALOGUE = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: What is a warp?\n\n"
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "What is a warp?"},
]


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ((DIALOGUE, "Assistant: yes", "Assistant: no"), TURNS),
        ((DIALOGUE + "Assistant:", "yes", "\n\nAssistant: no"), TURNS),
        ((None, DIALOGUE + "Assistant: yes", DIALOGUE + "Assistant: no"), TURNS),
        ((DIALOGUE, DIALOGUE + "Assistant: yes", DIALOGUE + "Assistant: no"), TURNS),
        ((TURNS, [said("assistant", "yes")], [said("assistant", "no")]), TURNS),
        (("Which?", [*question("Which?"), said("assistant", "yes")], "no"), question("Which?")),
        (("The Human: asks", "yes", "no"), question("The Human: asks")),
        (
            ([said("system", "Be brief."), *question("Which?")], "yes", "no"),
            [said("system", "Be brief."), *question("Which?")],
        ),
    ],
)
def test_a_pair_is_read_in_every_usual_form(row: Any, prompt: list[Any]) -> None:
    assert [(row.prompt, row.answers) for row in pairs(row).rows] == [(prompt, ("yes", "no"))]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (("q", "same", "same "), "equal chosen and rejected"),
        (("q", "yes", None), "missing rejected"),
        (("q", "", "no"), "empty chosen"),
        (("q", "Assistant: ", "no"), "empty chosen"),
        (("q", "\n\nHuman: yes", "no"), "chosen that does not end with an Assistant turn"),
        ((None, DIALOGUE, DIALOGUE), "chosen that does not end with an Assistant turn"),
        (("q", "Assistant: a\n\nHuman: b\n\nAssistant: c", "no"), "chosen that goes on with further turns"),
        ((None, "yes", "no"), "missing prompt"),
        (("\n\nHuman: \n\n", "yes", "no"), "missing prompt"),
        (("\n\nHuman: q\n\nAssistant: a", "yes", "no"), "prompt that does not end with a question"),
        ((None, DIALOGUE + "Assistant: yes", "\n\nHuman: x\n\nAssistant: no"), OTHER_PROMPT),
        (([{"role": "user"}], "yes", "no"), "message without text"),
    ],
)
def test_a_pair_that_cannot_be_used_has_its_reason(row: Any, reason: str) -> None:
    assert pairs(("q", "good", "bad"), row).dropped == {reason: 1}


def test_a_pair_that_turns_an_earlier_one_round_is_left_out() -> None:
    rows = pairs(("Which?", "yes", "no"), ("which", "No.", "Yes."), ("Which?", "yes", "no"))
    row_sets.drop_duplicates(rows)
    assert rows.dropped == {"turns an earlier pair round": 1, "exact duplicate": 1}


def test_what_is_too_long_is_dropped_or_cut_after_a_whole_sentence(tokenizer: Any) -> None:
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


def test_text_that_the_model_would_read_as_a_token_is_left_out(tokenizer: Any) -> None:
    rows = questions(GOOD, ("What ends an answer?", "The token </s> does."))
    row_sets.fit_lengths(rows, tokenizer, 100, "drop")
    assert rows.dropped == {"special token in the text": 1}


def test_max_rows_are_taken_evenly() -> None:
    rows = RowSet("questions", 10)
    assert row_sets.take_evenly(rows, [(str(number),) for number in range(10)], 4) == [("0",), ("2",), ("5",), ("7",)]
    assert rows.dropped == {"not taken (max_rows)": 6}


def test_folding_is_only_for_comparison() -> None:
    assert fold("  What IS it?") == "what is it"
    assert questions(("  What IS it?", "\tThis\r\n")).rows[0].texts == ["  What IS it?", "\tThis\r\n"]
