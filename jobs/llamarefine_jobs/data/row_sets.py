"""Row sets: from the rows of a table to checked rows without duplicates and conflicts that fit the model.

Every row that was read has exactly one outcome: it is kept, or it is dropped for the first reason that applies.
"""

import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal

from llamarefine_jobs.contract.errors import DataError
from llamarefine_jobs.contract.prompt import Message
from llamarefine_jobs.data.reading import Cells
from llamarefine_jobs.data.rows import Row, UnusableError, check_cells
from llamarefine_jobs.data.splits import SPLITS, fold
from llamarefine_jobs.models.encoding import encode

_SENTENCE_END = re.compile(r"(?<!\d)[.!?…。！？][\"'”’)\]`]*(?=\s|$)|(?<=\S)(?=\n)")  # not the dot of "1."


class RowSet:
    """The questions or the preference pairs: the rows that are kept, and how many were dropped for which reason."""

    def __init__(self, name: Literal["questions", "preferences"], rows_read: int) -> None:
        self.name = name
        self.rows_read = rows_read
        self.rows: list[Row] = []
        self.dropped: Counter[str] = Counter()
        self.conflicts: dict[str, list[str]] = {}  # question -> its different answers
        self.truncated = 0

    def keep_usable(self, check: Callable[[Any], Row], candidates: Sequence[Any] | None = None) -> None:
        """Replace the rows by the results of `check` for each candidate, by default for each row.

        A candidate for which `check` raises UnusableError is dropped and counted under that reason.
        Raises DataError, with all reasons, when no row is left.
        """
        kept = []
        for candidate in self.rows if candidates is None else candidates:
            try:
                kept.append(check(candidate))
            except UnusableError as reason:
                self.dropped[str(reason)] += 1
        self.rows = kept
        if not kept:
            reasons = ", ".join(f"{reason} ({count})" for reason, count in self.dropped.most_common())
            raise DataError(f"prepare.{self.name}: none of the {self.rows_read} rows can be used: {reasons}")

    def in_split(self, split: str) -> list[Row]:
        """Return the rows of a split, in the order in which they were read."""
        return [row for row in self.rows if row.split == split]

    def require_splits(self) -> None:
        """Raise DataError if a split has no row."""
        for split in SPLITS:
            if not self.in_split(split):
                reasons = ", ".join(f"{reason} ({count})" for reason, count in self.dropped.most_common())
                raise DataError(
                    f"prepare.{self.name}: none of the {self.rows_read} rows is left for {split}; dropped: {reasons}; "
                    "give more rows, raise max_length_tokens, or set prepare.too_long to truncate"
                )

    def outcomes(self) -> dict[str, int]:
        """Return the number of rows with each outcome. The numbers add up to `rows_read`."""
        kept = {f"kept: {split}": len(self.in_split(split)) for split in SPLITS}
        return kept | dict(sorted(self.dropped.items()))


def check_rows(rows: RowSet, table: Sequence[Cells | None], make: Callable[..., Row], max_cell_bytes: int) -> None:
    """Fill `rows` with the row that `make` returns for each of the table's rows with usable cells."""
    rows.keep_usable(lambda cells: make(*check_cells(cells, max_cell_bytes)), table)


def take_evenly(rows: RowSet, table: Sequence[Cells | None], most: int | None) -> Sequence[Cells | None]:
    """Return at most `most` rows of the table, at equal distances, and count the others as dropped."""
    if most is None or len(table) <= most:
        return table
    rows.dropped["not taken (max_rows)"] = len(table) - most
    return [table[place * len(table) // most] for place in range(most)]


def drop_duplicates(rows: RowSet) -> None:
    """Keep only the first of equal rows, and of rows of one group whose answers are equal after `fold`.

    A pair is dropped, too, if it swaps the chosen and the rejected answer of an earlier pair, because nothing tells
    which of the two pairs is right.
    """
    exact: set[tuple[str, ...]] = set()
    folded: set[tuple[Any, ...]] = set()

    def check(row: Row) -> Row:
        later_turns = tuple(fold(message["content"]) for message in row.prompt[1:])
        answers = tuple(fold(text) for text in row.answers)
        if tuple(row.texts) in exact:
            raise UnusableError("exact duplicate")
        if (row.group, later_turns, answers) in folded:
            raise UnusableError("near duplicate")
        if len(set(answers)) == 2 and (row.group, later_turns, answers[::-1]) in folded:
            raise UnusableError("swaps chosen and rejected of an earlier pair")
        exact.add(tuple(row.texts))
        folded.add((row.group, later_turns, answers))
        return row

    rows.keep_usable(check)


def resolve_conflicts(questions: RowSet, policy: str) -> None:
    """Record every question that has different answers, and keep those of its rows that `policy` allows.

    `policy` is the recipe's conflicting_answers: keep_first, keep_all or drop.
    """
    answers: defaultdict[str, list[str]] = defaultdict(list)
    for row in questions.rows:
        answers[fold(row.user_turns[0])].append(row.answers[0])
    conflicting = {folded for folded, texts in answers.items() if len({fold(text) for text in texts}) > 1}
    seen: set[str] = set()

    def check(row: Row) -> Row:
        folded = fold(row.user_turns[0])
        if folded not in conflicting:
            return row
        is_first = folded not in seen
        seen.add(folded)
        if is_first:
            questions.conflicts[row.user_turns[0]] = answers[folded]
        if policy == "drop" or (policy == "keep_first" and not is_first):
            raise UnusableError("conflicting answer")
        return row

    questions.keep_usable(check)


def fit_lengths(rows: RowSet, tokenizer: Any, limit_tokens: int, too_long: str) -> None:
    """Drop rows over `limit_tokens`, or, if `too_long` is truncate, cut answers after the last sentence that fits.

    A truncated answer still ends with a whole sentence, so the EOS after it is right. Rows whose text contains the name
    of a special token are dropped, too, because the tokenizer would read that name as the token.
    """
    special_tokens = [token for token in tokenizer.get_added_vocab() if token.strip()]

    def check(row: Row) -> Row:
        if any(token in text for text in row.texts for token in special_tokens):
            raise UnusableError("special token in the text")
        counted = _with_token_count(tokenizer, row)
        if counted.tokens <= limit_tokens:
            return counted
        if too_long == "drop":
            raise UnusableError("over max_length_tokens")
        cut = replace(row, answers=tuple(_cut(tokenizer, row.prompt, text, limit_tokens) for text in row.answers))
        if len(row.answers) > 1 and len(set(cut.answers)) == 1:
            raise UnusableError("over max_length_tokens, and chosen equals rejected when truncated")
        rows.truncated += 1
        return _with_token_count(tokenizer, cut)

    rows.keep_usable(check)


def _with_token_count(tokenizer: Any, row: Row) -> Row:
    try:
        return replace(row, tokens=max(len(encode(tokenizer, row.prompt, text)) for text in row.answers))
    except DataError:
        raise UnusableError("answer that shares a token with the prompt") from None


def _cut(tokenizer: Any, prompt: Sequence[Message], text: str, limit_tokens: int) -> str:
    ends = [found.end() for found in _SENTENCE_END.finditer(text)] + [len(text)]
    fitting = bisect_right(ends, limit_tokens, key=lambda end: len(encode(tokenizer, prompt, text[:end])))
    if fitting == 0:
        raise UnusableError("over max_length_tokens, and no sentence of the answer fits")
    return text[: ends[fitting - 1]]
