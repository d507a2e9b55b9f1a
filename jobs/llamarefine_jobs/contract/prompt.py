"""The chat template that SFT, DPO, evaluate, infer and the served model all use.

It renders turns in the format of TinyLlama-Chat (``<|user|>`` newline, text, EOS), with one
difference: the newline between turns comes before a turn, not after EOS. So a rendered
conversation ends exactly at the answer's EOS, and every prompt is a prefix of its conversation.
"""

import hashlib
from typing import Literal, TypedDict

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('a message has the role ' + message['role'] + '; system, user and assistant exist') -}}"
    "{%- endif -%}"
    "{{- ('' if loop.first else '\\n') + '<|' + message['role'] + '|>\\n' + message['content'] + eos_token -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '\\n<|assistant|>\\n' -}}{%- endif -%}"
)

TEMPLATE_SHA256 = hashlib.sha256(CHAT_TEMPLATE.encode()).hexdigest()


class Message(TypedDict):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


def question(text: str) -> list[Message]:
    """Return a conversation of one user turn."""
    return [{"role": "user", "content": text}]


def answer(text: str) -> list[Message]:
    """Return an assistant turn, as a list of one message."""
    return [{"role": "assistant", "content": text}]
