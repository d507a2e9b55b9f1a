"""Rows: usable cells become a prompt and its answers, unchanged; every other row has a reason."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamarefine_jobs.contract.prompt import question
from llamarefine_jobs.data.rows import (
    Row,
    UnusableError,
    check_cells,
    is_dialogue,
    pair_row,
    parse_dialogue,
    question_row,
)

# A turn may contain anything except what separates turns: a paragraph that begins with a mark, or a blank last line.
contents = (
    st.lists(
        st.sampled_from(["Human: no", "says Assistant:", "é\u2028", "\n", " ", "x", "Human", ":", "\t"]), max_size=6
    )
    .map("".join)
    .filter(lambda text: text.strip() and "\n\n" not in f"\n{text}\n" and not text.startswith((" ", "\n")))
)


@given(
    st.lists(contents, min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from(["\n\n", "\n\nAssistant:", "\n\nAssistant: "]),
)
def test_dialogue_text_is_parsed_into_its_turns_unchanged(turns: list[str], leading: bool, end: str) -> None:
    turns = turns if len(turns) % 2 else turns[:-1] or turns
    marks = ["Human", "Assistant"] * len(turns)
    text = "\n\n".join(f"{mark}: {turn}" for mark, turn in zip(marks, turns, strict=False))
    found = parse_dialogue(("\n\n" if leading else "") + text + end)
    assert [turn["content"] for turn in found] == turns
    assert [turn["role"] for turn in found] == ["user", "assistant"] * (len(turns) // 2) + ["user"] * (len(turns) % 2)


def test_an_answer_keeps_its_paragraphs_and_trailing_spaces() -> None:
    text = "First.\n\nSecond: the Human: said\nAssistant: twice. \n\n"
    assert parse_dialogue(f"Assistant: {text}") == [{"role": "assistant", "content": text}]


@pytest.mark.parametrize("text", ["What would a Human: say?", " Human: hello", "\n\n\nHuman: x", "human: x", ""])
def test_marks_that_do_not_open_a_paragraph_are_text(text: str) -> None:
    assert not is_dialogue(text)


def read_question(cells: Any) -> Row:
    return question_row(*check_cells(cells, 1000))


def read_pair(cells: Any) -> Row:
    return pair_row(*check_cells(cells, 1000))


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        (None, "more cells than columns"),
        ((None, "a"), "missing question"),
        (("q", math.nan), "missing answer"),
        (("q", " \n"), "empty answer"),
        (("q", "a\x00"), "NUL bytes"),
        (("q", "\ud800"), "broken Unicode"),
        (("q", "é" * 501), "cell over max_cell_bytes"),
        (("q", "x" * 10_000_000), "cell over max_cell_bytes"),
        (("q", b"a"), "cell that is neither text nor a list of messages"),
        (("q", question("a")), "answer that is not text"),
    ],
)
def test_an_unusable_question_has_a_reason(cells: Any, reason: str) -> None:
    with pytest.raises(UnusableError) as caught:
        read_question(cells)
    assert str(caught.value) == reason


def test_numbers_become_text_as_python_writes_them() -> None:
    assert read_question(("How many?", 32)).answers == ("32",)
    assert read_question(("Which?", 1.5)).answers == ("1.5",)


def test_the_text_of_cells_is_unchanged() -> None:
    assert read_question(("  What IS it?", "\tThis\r\n")).texts == ["  What IS it?", "\tThis\r\n"]


OTHER_PROMPT = "chosen and rejected do not answer the same prompt"
DIALOGUE = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: What is a warp?\n\n"
TURNS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "What is a warp?"},
]


def message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


@pytest.mark.parametrize(
    ("cells", "prompt"),
    [
        ((DIALOGUE, "Assistant: yes", "Assistant: no"), TURNS),
        ((DIALOGUE + "Assistant:", "yes", "\n\nAssistant: no"), TURNS),
        ((None, DIALOGUE + "Assistant: yes", DIALOGUE + "Assistant: no"), TURNS),
        ((DIALOGUE, DIALOGUE + "Assistant: yes", DIALOGUE + "Assistant: no"), TURNS),
        ((TURNS, [message("assistant", "yes")], [message("assistant", "no")]), TURNS),
        (("Which?", [*question("Which?"), message("assistant", "yes")], "no"), question("Which?")),
        (("The Human: asks", "yes", "no"), question("The Human: asks")),
        (
            ([message("system", "Be brief."), *question("Which?")], "yes", "no"),
            [message("system", "Be brief."), *question("Which?")],
        ),
    ],
)
def test_a_pair_can_be_text_a_dialogue_or_messages(cells: Any, prompt: list[Any]) -> None:
    row = read_pair(cells)
    assert (row.prompt, row.answers) == (prompt, ("yes", "no"))


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        (("q", "same", "same "), "equal chosen and rejected"),
        (("q", "yes", None), "missing rejected"),
        (("q", "", "no"), "empty chosen"),
        (("q", "Assistant: ", "no"), "empty chosen"),
        (("q", "\n\nHuman: yes", "no"), "chosen that does not end with an Assistant turn"),
        ((None, DIALOGUE, DIALOGUE), "chosen that does not end with an Assistant turn"),
        (("q", "Assistant: a\n\nHuman: b\n\nAssistant: c", "no"), "chosen with further turns after the answer"),
        ((None, "yes", "no"), "missing prompt"),
        (("\n\nHuman: \n\n", "yes", "no"), "missing prompt"),
        (("\n\nHuman: q\n\nAssistant: a", "yes", "no"), "prompt that does not end with a question"),
        ((None, DIALOGUE + "Assistant: yes", "\n\nHuman: x\n\nAssistant: no"), OTHER_PROMPT),
        (([{"role": "user"}], "yes", "no"), "message without text"),
    ],
)
def test_an_unusable_pair_has_a_reason(cells: Any, reason: str) -> None:
    with pytest.raises(UnusableError) as caught:
        read_pair(cells)
    assert str(caught.value) == reason
