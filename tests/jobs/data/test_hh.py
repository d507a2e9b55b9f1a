"""HH-style dialogues: turns apart, their text untouched."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamarefine_jobs.data import hh

# Turns may hold anything but what parts turns: a paragraph that opens with a mark, or a blank line at an end.
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
def test_a_prompt_gives_its_turns_as_they_were_written(turns: list[str], leading: bool, end: str) -> None:
    turns = turns if len(turns) % 2 else turns[:-1] or turns
    marks = ["Human", "Assistant"] * len(turns)
    text = "\n\n".join(f"{mark}: {turn}" for mark, turn in zip(marks, turns, strict=False))
    found = hh.parse(("\n\n" if leading else "") + text + end)
    assert [turn["content"] for turn in found] == turns
    assert [turn["role"] for turn in found] == ["user", "assistant"] * (len(turns) // 2) + ["user"] * (len(turns) % 2)


def test_an_answer_keeps_its_paragraphs_and_its_last_spaces() -> None:
    text = "First.\n\nSecond: the Human: said\nAssistant: twice. \n\n"
    assert hh.parse(f"Assistant: {text}") == [{"role": "assistant", "content": text}]


@pytest.mark.parametrize("text", ["What would a Human: say?", " Human: hello", "\n\n\nHuman: x", "human: x", ""])
def test_words_that_open_no_paragraph_are_text(text: Any) -> None:
    assert not hh.is_dialogue(text)
