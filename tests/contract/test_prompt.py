"""The chat template: every prompt is a prefix of its conversation, and every answer ends with EOS."""

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


# The options are those of transformers.
ENVIRONMENT = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
ENVIRONMENT.globals["raise_exception"] = refuse
TEMPLATE = ENVIRONMENT.from_string(CHAT_TEMPLATE)


def render(messages: list[Any], *, add_generation_prompt: bool = False) -> str:
    return TEMPLATE.render(messages=messages, eos_token=EOS, add_generation_prompt=add_generation_prompt)


@given(TURNS, TEXT)
def test_a_conversation_is_its_prompt_then_the_answer_then_eos(turns: list[Any], text: str) -> None:
    prompt = render(turns, add_generation_prompt=True)
    assert render([*turns, *answer(text)]) == prompt + text + EOS


@given(TURNS)
def test_every_turn_is_rendered_unchanged_and_ends_with_eos(turns: list[Any]) -> None:
    expected = "\n".join(f"<|{turn['role']}|>\n{turn['content']}{EOS}" for turn in turns)
    assert render(turns) == expected


def test_an_unknown_role_is_refused() -> None:
    with pytest.raises(jinja2.TemplateError, match="the role critic"):
        render([{"role": "critic", "content": "x"}])


def test_a_question_has_tinyllamas_format() -> None:
    assert render(question("What is CUDA?"), add_generation_prompt=True) == (
        "<|user|>\nWhat is CUDA?</s>\n<|assistant|>\n"
    )


def test_the_digest_is_the_templates() -> None:
    assert hashlib.sha256(CHAT_TEMPLATE.encode()).hexdigest() == TEMPLATE_SHA256
