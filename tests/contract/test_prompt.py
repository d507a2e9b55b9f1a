"""The one chat template: a prompt is where its conversation begins, and every answer ends with EOS."""

import hashlib
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment

from llamarefine_jobs.contract.prompt import CHAT_TEMPLATE, TEMPLATE_SHA256, Message, answer, question

EOS = "</s>"
TEXT = st.text(max_size=30)
TURNS = st.lists(
    st.builds(Message, role=st.sampled_from(["system", "user", "assistant"]), content=TEXT), min_size=1, max_size=6
)


def refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


ENVIRONMENT = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)  # as transformers makes it
ENVIRONMENT.globals["raise_exception"] = refuse
TEMPLATE = ENVIRONMENT.from_string(CHAT_TEMPLATE)


def render(messages: list[Any], *, add_generation_prompt: bool = False) -> str:
    return TEMPLATE.render(messages=messages, eos_token=EOS, add_generation_prompt=add_generation_prompt)


@given(TURNS, TEXT)
def test_a_prompt_is_a_prefix_of_its_conversation_and_the_rest_is_the_answer_and_eos(
    turns: list[Any], text: str
) -> None:
    prompt = render(turns, add_generation_prompt=True)
    assert render([*turns, *answer(text)]) == prompt + text + EOS


@given(TURNS)
def test_every_turn_is_written_once_as_it_is_and_ends_with_eos(turns: list[Any]) -> None:
    expected = "\n".join(f"<|{turn['role']}|>\n{turn['content']}{EOS}" for turn in turns)
    assert render(turns) == expected


def test_an_unknown_role_is_refused() -> None:
    with pytest.raises(jinja2.TemplateError, match="the role critic"):
        render([{"role": "critic", "content": "x"}])


def test_a_question_reads_as_tinyllama_knows_it() -> None:
    assert render(question("What is CUDA?"), add_generation_prompt=True) == (
        "<|user|>\nWhat is CUDA?</s>\n<|assistant|>\n"
    )


def test_the_digest_is_that_of_the_template() -> None:
    assert hashlib.sha256(CHAT_TEMPLATE.encode()).hexdigest() == TEMPLATE_SHA256
