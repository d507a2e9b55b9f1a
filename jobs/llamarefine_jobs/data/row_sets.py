"""Rows of a table to checked, de-duplicated sets that fit the model. Text stays as given, byte for byte.

Every row that was read ends in one outcome: kept, or left out for one reason, the first that holds.
"""

import math
import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from llamarefine_jobs.contract.errors import DataError
from llamarefine_jobs.contract.prompt import Message, answer, question
from llamarefine_jobs.data import hh
from llamarefine_jobs.data.reading import Cells
from llamarefine_jobs.data.splits import SPLITS, fold
from llamarefine_jobs.models.encoding import encode

_ROLES = ("system", "user", "assistant")
_SENTENCE_END = re.compile(r"(?<!\d)[.!?…。！？][\"'”’)\]`]*(?=\s|$)|(?<=\S)(?=\n)")  # not the dot of "1."


class UnusableError(ValueError):
    """A row that is left out; the text is the reason it is counted under."""


@dataclass(frozen=True)
class Row:
    """A prompt and what follows it: a question's one answer, or a pair's chosen and rejected."""

    prompt: Sequence[Message]
    answers: tuple[str, ...]
    group: str = ""  # rows that ask the same share it
    tokens: int = 0  # of the prompt with its longest answer
    split: str = ""

    @property
    def asks(self) -> list[str]:
        """The user's turns, the first of them first."""
        return [message["content"] for message in self.prompt if message["role"] == "user"]

    @property
    def texts(self) -> list[str]:
        """Every text of the row, in order."""
        return [*(message["content"] for message in self.prompt), *self.answers]


class RowSet:
    """One set: the rows that are still in, and how many are out for which reason."""

    def __init__(self, name: Literal["questions", "preferences"], rows_read: int) -> None:
        self.name = name
        self.rows_read = rows_read
        self.rows: list[Row] = []
        self.dropped: Counter[str] = Counter()
        self.conflicts: dict[str, list[str]] = {}
        self.truncated = 0

    def sift(self, judge: Callable[[Any], Row], candidates: Sequence[Any] | None = None) -> None:
        """Put what `judge` makes of each row in its place; where it raises UnusableError, count the row out."""
        kept = []
        for candidate in self.rows if candidates is None else candidates:
            try:
                kept.append(judge(candidate))
            except UnusableError as reason:
                self.dropped[str(reason)] += 1
        self.rows = kept
        if not kept:
            reasons = ", ".join(f"{reason} ({count})" for reason, count in self.dropped.most_common())
            raise DataError(f"prepare.{self.name}: none of the {self.rows_read} rows can be used: {reasons}")

    def of(self, split: str) -> list[Row]:
        """The rows of a split, in the order they were read."""
        return [row for row in self.rows if row.split == split]

    def require_splits(self) -> None:
        """Raise DataError where a split has no row."""
        for split in SPLITS:
            if not self.of(split):
                reasons = ", ".join(f"{reason} ({count})" for reason, count in self.dropped.most_common())
                raise DataError(
                    f"prepare.{self.name}: none of the {self.rows_read} rows is left for {split}; left out: {reasons}; "
                    "give more rows, or raise max_length_tokens, or set prepare.too_long to truncate"
                )

    def outcomes(self) -> dict[str, int]:
        """How many rows ended where; the numbers add up to `rows_read`."""
        return {f"kept: {split}": len(self.of(split)) for split in SPLITS} | dict(sorted(self.dropped.items()))


def question_row(asked: Any, answered: Any) -> Row:
    """The row of a question and its answer."""
    return Row(question(_filled(asked, "question")), (_filled(answered, "answer"),))


def pair_row(prompt: Any, chosen: Any, rejected: Any) -> Row:
    """The row of a preference pair: HH-style text, plain text or lists of messages, each cell for itself.

    Without a prompt, the chosen and the rejected dialogue must share all but their last turn.
    """
    before_chosen, chosen_text = _final_answer(chosen, "chosen")
    before_rejected, rejected_text = _final_answer(rejected, "rejected")
    asked = before_chosen if prompt is None else _dialogue(prompt)
    if any(before and before != asked for before in (before_chosen, before_rejected)):
        raise UnusableError("chosen and rejected do not answer the same prompt")
    if not any(message["content"].strip() for message in asked if message["role"] == "user"):
        raise UnusableError("missing prompt")
    if asked[-1]["role"] != "user" or not all(message["content"].strip() for message in asked):
        raise UnusableError("prompt that does not end with a question")
    if chosen_text.split() == rejected_text.split():
        raise UnusableError("equal chosen and rejected")
    return Row(asked, (chosen_text, rejected_text))


def check_rows(rows: RowSet, table: Sequence[Cells | None], make: Callable[..., Row], max_cell_bytes: int) -> None:
    """Make a row of each of the table's rows that has usable cells."""

    def judge(cells: Cells | None) -> Row:
        if cells is None:
            raise UnusableError("more cells than columns")
        return make(*(_checked(cell, max_cell_bytes) for cell in cells))

    rows.sift(judge, table)


def take_evenly(rows: RowSet, table: Sequence[Cells | None], most: int | None) -> Sequence[Cells | None]:
    """At most so many rows of a table, taken at equal distances."""
    if most is None or len(table) <= most:
        return table
    rows.dropped["not taken (max_rows)"] = len(table) - most
    return [table[place * len(table) // most] for place in range(most)]


def drop_duplicates(rows: RowSet) -> None:
    """Of rows that are equal, or whose question is nearly and whose answer is all but equal, keep the first.

    All but equal is equal after `fold`. A pair that turns an earlier one round goes too: nobody
    knows which of the two was meant.
    """
    exact: set[tuple[str, ...]] = set()
    folded: set[tuple[Any, ...]] = set()

    def judge(row: Row) -> Row:
        context = tuple(fold(message["content"]) for message in row.prompt[1:])
        answers = tuple(fold(text) for text in row.answers)
        if tuple(row.texts) in exact:
            raise UnusableError("exact duplicate")
        if (row.group, context, answers) in folded:
            raise UnusableError("near duplicate")
        if len(set(answers)) == 2 and (row.group, context, answers[::-1]) in folded:
            raise UnusableError("turns an earlier pair round")
        exact.add(tuple(row.texts))
        folded.add((row.group, context, answers))
        return row

    rows.sift(judge)


def resolve_conflicts(questions: RowSet, policy: str) -> None:
    """Note every question that has several answers, and keep of its rows what `policy` says."""
    answers: defaultdict[str, list[str]] = defaultdict(list)
    for row in questions.rows:
        answers[fold(row.asks[0])].append(row.answers[0])
    conflicting = {asked for asked, texts in answers.items() if len({fold(text) for text in texts}) > 1}
    met: set[str] = set()

    def judge(row: Row) -> Row:
        asked = fold(row.asks[0])
        if asked not in conflicting:
            return row
        is_first = asked not in met
        met.add(asked)
        if is_first:
            questions.conflicts[row.asks[0]] = answers[asked]
        if policy == "drop" or (policy == "keep_first" and not is_first):
            raise UnusableError("conflicting answer")
        return row

    questions.sift(judge)


def fit_lengths(rows: RowSet, tokenizer: Any, limit_tokens: int, too_long: str) -> None:
    """Leave out what is over `limit_tokens`, or cut its answers at the last sentence's end that fits.

    A cut answer is still whole sentences, so the EOS behind it is one the model may learn. A row
    that holds a special token as text goes too: the model would read it as the token.
    """
    marks = [mark for mark in tokenizer.get_added_vocab() if mark.strip()]

    def judge(row: Row) -> Row:
        if any(mark in text for text in row.texts for mark in marks):
            raise UnusableError("special token in the text")
        measured = _measured(tokenizer, row)
        if measured.tokens <= limit_tokens:
            return measured
        if too_long == "drop":
            raise UnusableError("over max_length_tokens")
        cut = replace(row, answers=tuple(_cut(tokenizer, row.prompt, text, limit_tokens) for text in row.answers))
        if len(row.answers) > 1 and len(set(cut.answers)) == 1:
            raise UnusableError("over max_length_tokens, and equal once cut")
        rows.truncated += 1
        return _measured(tokenizer, cut)

    rows.sift(judge)


def _measured(tokenizer: Any, row: Row) -> Row:
    try:
        return replace(row, tokens=max(len(encode(tokenizer, row.prompt, text)) for text in row.answers))
    except DataError:
        raise UnusableError("beginning of the answer melts into the prompt's last token") from None


def _cut(tokenizer: Any, prompt: Sequence[Message], text: str, limit_tokens: int) -> str:
    ends = [found.end() for found in _SENTENCE_END.finditer(text)] + [len(text)]
    fitting = bisect_right(ends, limit_tokens, key=lambda end: len(encode(tokenizer, prompt, text[:end])))
    if fitting == 0:
        raise UnusableError("over max_length_tokens, and no sentence of the answer fits")
    return text[: ends[fitting - 1]]


def _checked(cell: Any, max_bytes: int) -> Any:
    """A cell as text, as a list of messages, or None where it is missing; UnusableError where it is neither."""
    match cell:
        case None:
            return None
        case float() if math.isnan(cell):
            return None
        case bool() | int() | float():
            return str(cell)
        case str():
            return _checked_text(cell, max_bytes)
        case list() if cell and all(isinstance(turn, dict) and turn.get("role") in _ROLES for turn in cell):
            return [{"role": turn["role"], "content": _message_text(turn, max_bytes)} for turn in cell]
        case _:
            raise UnusableError("cell that is neither text nor a list of messages")


def _message_text(turn: dict[str, Any], max_bytes: int) -> str:
    if not isinstance(turn.get("content"), str):
        raise UnusableError("message without text")
    return _checked_text(turn["content"], max_bytes)


def _checked_text(text: str, max_bytes: int) -> str:
    try:
        size_bytes = len(text.encode())
    except UnicodeEncodeError:
        raise UnusableError("broken Unicode") from None
    if size_bytes > max_bytes:
        raise UnusableError("cell over max_cell_bytes")
    if "\x00" in text:
        raise UnusableError("NUL bytes")
    return text


def _filled(cell: Any, role: str) -> str:
    if cell is None:
        raise UnusableError(f"missing {role}")
    if not isinstance(cell, str):
        raise UnusableError(f"{role} that is not text")
    if not cell.strip():
        raise UnusableError(f"empty {role}")
    return cell


def is_dialogue(cell: Any) -> bool:
    """Whether a cell holds turns: a list of messages, or text that opens with a turn's mark."""
    return isinstance(cell, list) or (isinstance(cell, str) and hh.is_dialogue(cell))


def _dialogue(cell: Any) -> list[Message]:
    if isinstance(cell, list):
        return cell
    return hh.parse(cell) if is_dialogue(cell) else question(cell)


def _final_answer(cell: Any, role: str) -> tuple[list[Message], str]:
    """The turns before the last, where the cell has them, and the last, which must be an answer."""
    if isinstance(cell, str) and not is_dialogue(cell):
        cell = answer(_filled(cell, role))
    if cell is None:
        raise UnusableError(f"missing {role}")
    turns: list[Message] = hh.parse(cell) if isinstance(cell, str) else cell
    if not turns:
        raise UnusableError(f"empty {role}")
    if not any(turn["role"] == "assistant" for turn in turns) or turns[-1]["role"] != "assistant":
        raise UnusableError(f"{role} that does not end with an Assistant turn")
    if turns[0]["role"] == "assistant" and len(turns) > 1:
        raise UnusableError(f"{role} that goes on with further turns")
    return turns[:-1], _filled(turns[-1]["content"], role)
