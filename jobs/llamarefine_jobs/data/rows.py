r"""Rows: the cells of a table, checked and turned into a prompt with its answers.

A question has one answer, a preference pair a chosen and a rejected one. A cell holds plain text, a list of messages or
a dialogue as text, in the format of Anthropic's HH data sets:

    "\n\nHuman: question\n\nAssistant: answer\n\nHuman: question\n\n"

The text of a row is the text of its cells, byte for byte.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llamarefine_jobs.contract.prompt import Message, answer, question
from llamarefine_jobs.data.reading import Cells

_ROLES = ("system", "user", "assistant")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
_HH_OPENING = re.compile(r"\n{0,2}(?:Human|Assistant):")
_HH_MARK = re.compile(r"(?:\A\n{0,2}|\n\n)(Human|Assistant):[ ]?")


class UnusableError(ValueError):
    """Raised for a row that cannot be used. The message is the reason that the data card counts the row under."""


@dataclass(frozen=True)
class Row:
    """A prompt and its answers: one answer for a question, chosen and rejected for a preference pair."""

    prompt: Sequence[Message]
    answers: tuple[str, ...]
    group: str = ""  # rows that ask the same share a group
    tokens: int = 0  # of the prompt with its longest answer
    split: str = ""

    @property
    def user_turns(self) -> list[str]:
        """The texts of the prompt's user messages, in order."""
        return [message["content"] for message in self.prompt if message["role"] == "user"]

    @property
    def texts(self) -> list[str]:
        """The texts of all messages of the prompt, then of all answers."""
        return [*(message["content"] for message in self.prompt), *self.answers]


def question_row(question_cell: Any, answer_cell: Any) -> Row:
    """Return the row of a question and its answer, given cells from `check_cells`.

    Raises UnusableError if a cell is missing, empty or not text.
    """
    return Row(question(_require_text(question_cell, "question")), (_require_text(answer_cell, "answer"),))


def pair_row(prompt_cell: Any, chosen_cell: Any, rejected_cell: Any) -> Row:
    """Return the row of a preference pair, given cells from `check_cells`: text, dialogues as text, or message lists.

    Without a prompt cell, the chosen and the rejected dialogue must agree in all turns but the last. Raises
    UnusableError unless the cells are two different answers to one prompt that ends with a user's turn.
    """
    before_chosen, chosen = _split_final_answer(chosen_cell, "chosen")
    before_rejected, rejected = _split_final_answer(rejected_cell, "rejected")
    prompt = before_chosen if prompt_cell is None else _turns(prompt_cell)
    if any(before and before != prompt for before in (before_chosen, before_rejected)):
        raise UnusableError("chosen and rejected do not answer the same prompt")
    if not any(message["content"].strip() for message in prompt if message["role"] == "user"):
        raise UnusableError("missing prompt")
    if prompt[-1]["role"] != "user" or not all(message["content"].strip() for message in prompt):
        raise UnusableError("prompt that does not end with a question")
    if chosen.split() == rejected.split():
        raise UnusableError("equal chosen and rejected")
    return Row(prompt, (chosen, rejected))


def check_cells(cells: Cells | None, max_bytes: int) -> Cells:
    """Return the cells of a table's row, each as text, as a list of messages, or as None where it is missing.

    Raises UnusableError for any other value, for text that is too long or broken, and for None, which stands for a row
    with more cells than the header.
    """
    if cells is None:
        raise UnusableError("more cells than columns")
    return tuple(_check_cell(cell, max_bytes) for cell in cells)


def is_dialogue(cell: Any) -> bool:
    """Return whether a cell holds several turns: a list of messages, or text that begins with an HH mark."""
    return isinstance(cell, list) or (isinstance(cell, str) and _HH_OPENING.match(cell) is not None)


def parse_dialogue(text: str) -> list[Message]:
    """Return the turns of a dialogue in the HH format, with their text unchanged.

    A turn begins where `Human:` or `Assistant:` opens the text or a paragraph; anywhere else these words are text. The
    blank line before the next turn is not part of the turn. A last mark without text is not a turn.
    """
    marks = list(_HH_MARK.finditer(text))
    ends = [*(mark.start() for mark in marks), len(text)][1:]
    turns: list[Message] = []
    for mark, end in zip(marks, ends, strict=True):
        content = text[mark.end() : end]
        turns.append({"role": _HH_ROLES[mark[1]], "content": content})  # type: ignore[typeddict-item]
    if turns and turns[-1]["role"] == "user":
        turns[-1]["content"] = turns[-1]["content"].removesuffix("\n\n")
    if turns and not turns[-1]["content"].strip():
        turns.pop()
    return turns


def _check_cell(cell: Any, max_bytes: int) -> Any:
    match cell:
        case None:
            return None
        case float() if math.isnan(cell):
            return None
        case bool() | int() | float():
            return str(cell)
        case str():
            return _check_text(cell, max_bytes)
        case list() if cell and all(isinstance(turn, dict) and turn.get("role") in _ROLES for turn in cell):
            return [{"role": turn["role"], "content": _message_text(turn, max_bytes)} for turn in cell]
        case _:
            raise UnusableError("cell that is neither text nor a list of messages")


def _message_text(message: dict[str, Any], max_bytes: int) -> str:
    if not isinstance(message.get("content"), str):
        raise UnusableError("message without text")
    return _check_text(message["content"], max_bytes)


def _check_text(text: str, max_bytes: int) -> str:
    try:
        size_bytes = len(text.encode())
    except UnicodeEncodeError:
        raise UnusableError("broken Unicode") from None
    if size_bytes > max_bytes:
        raise UnusableError("cell over max_cell_bytes")
    if "\x00" in text:
        raise UnusableError("NUL bytes")
    return text


def _require_text(cell: Any, role: str) -> str:
    if cell is None:
        raise UnusableError(f"missing {role}")
    if not isinstance(cell, str):
        raise UnusableError(f"{role} that is not text")
    if not cell.strip():
        raise UnusableError(f"empty {role}")
    return cell


def _turns(cell: Any) -> list[Message]:
    """Return the messages of a prompt cell: plain text is one question."""
    if isinstance(cell, list):
        return cell
    return parse_dialogue(cell) if is_dialogue(cell) else question(cell)


def _split_final_answer(cell: Any, role: str) -> tuple[list[Message], str]:
    """Return the turns before the last one (none for plain text) and the text of the last, which must be an answer."""
    if isinstance(cell, str) and not is_dialogue(cell):
        cell = answer(_require_text(cell, role))
    if cell is None:
        raise UnusableError(f"missing {role}")
    turns: list[Message] = parse_dialogue(cell) if isinstance(cell, str) else cell
    if not turns:
        raise UnusableError(f"empty {role}")
    if not any(turn["role"] == "assistant" for turn in turns) or turns[-1]["role"] != "assistant":
        raise UnusableError(f"{role} that does not end with an Assistant turn")
    if turns[0]["role"] == "assistant" and len(turns) > 1:
        raise UnusableError(f"{role} with further turns after the answer")
    return turns[:-1], _require_text(turns[-1]["content"], role)
