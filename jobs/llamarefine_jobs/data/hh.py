r"""Dialogues written as text, in the manner of Anthropic's HH data sets.

    "\n\nHuman: question\n\nAssistant: answer\n\nHuman: question\n\n"

A turn begins where `Human:` or `Assistant:` opens the text or a paragraph; inside a line the words
are text. Nothing of a turn is changed but for the blank line that parts it from the next.
"""

import re

from llamarefine_jobs.contract.prompt import Message

_OPENING = re.compile(r"\n{0,2}(?:Human|Assistant):")
_MARK = re.compile(r"(?:\A\n{0,2}|\n\n)(Human|Assistant):[ ]?")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_dialogue(text: str) -> bool:
    """Whether `text` opens with a turn's mark."""
    return _OPENING.match(text) is not None


def parse(text: str) -> list[Message]:
    """The turns of a dialogue. An open end (a mark with nothing behind it) is no turn."""
    marks = list(_MARK.finditer(text))
    ends = [*(mark.start() for mark in marks), len(text)][1:]
    turns: list[Message] = []
    for mark, end in zip(marks, ends, strict=True):
        content = text[mark.end() : end]
        turns.append({"role": _ROLES[mark[1]], "content": content})  # type: ignore[typeddict-item]
    if turns and turns[-1]["role"] == "user":
        turns[-1]["content"] = turns[-1]["content"].removesuffix("\n\n")
    if turns and not turns[-1]["content"].strip():
        turns.pop()
    return turns
