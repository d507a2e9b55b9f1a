"""The data card: what was read, what became of every row, and by which rules."""

import statistics
from typing import Any

from llamarefine_jobs.contract.recipe import Recipe, Rows, Source
from llamarefine_jobs.data import docstrings
from llamarefine_jobs.data.reading import Table
from llamarefine_jobs.data.row_sets import Row, RowSet
from llamarefine_jobs.data.splits import SPLITS, fold
from llamarefine_jobs.sources.locations import DOCSTRINGS, TINY_LLAMA

_SHOWN_CONFLICTS = 5
_SHOWN_CHARACTERS = 300
_FEW = 30


def describe_set(rows: RowSet, source: Rows, table: Table) -> dict[str, Any]:
    """One set's part of the card. The outcomes add up to the rows read."""
    outcomes = rows.outcomes()
    assert sum(outcomes.values()) == rows.rows_read, "a row was lost or counted twice"
    part: dict[str, Any] = {
        "source": describe_source(source, table.commit),
        "format": table.format,
        "rows_read": rows.rows_read,
        "outcomes": outcomes,
        "groups": {split: len({row.group for row in rows.of(split)}) for split in SPLITS},
        "answers_truncated": rows.truncated,
        "length_tokens": _percentiles([row.tokens for row in rows.rows]),
    }
    if rows.name == "questions":
        part["questions_with_conflicting_answers"] = len(rows.conflicts)
        part["conflict_examples"] = [
            {"question": _shown(asked), "answers": [_shown(text) for text in answers[:3]]}
            for asked, answers in list(rows.conflicts.items())[:_SHOWN_CONFLICTS]
        ]
    if source.source == DOCSTRINGS:
        part["made_by"] = list(docstrings.RULES)
    return part


def describe_source(source: Source, commit: str | None) -> dict[str, Any]:
    """Where something came from, as exactly as is known."""
    known = {"source": source.source, "revision": source.revision, "commit": commit, "fingerprint": source.fingerprint}
    return {name: value for name, value in known.items() if value is not None}


def rules(recipe: Recipe) -> dict[str, str]:
    """How rows were compared, split and cut, in words."""
    prepare = recipe.prepare
    return {
        "text": "kept as given, byte for byte; only to compare texts, case, spacing and outer punctuation are ignored",
        "groups": "questions that are equal, or whose word 3-grams have a Jaccard similarity of at least "
        f"{prepare.near_duplicate_similarity:g}, form a group over both sets, as do a dialogue and the questions in it",
        "split": f"by a hash of the group and the seed {recipe.seed}: {prepare.test_fraction:g} of the groups to test, "
        f"{prepare.validation_fraction:g} to validation; a group is never in two splits, so no question is in the test "
        "split of one set and the training split of the other",
        "duplicates": "of equal rows, and of near-duplicate questions with the same answer, the first stays",
        "conflicts": f"the same question with different answers: {prepare.questions.conflicting_answers}",
        "too_long": f"over {recipe.max_length_tokens} tokens: {prepare.too_long}"
        + (" the answer after the last sentence that fits" if prepare.too_long == "truncate" else ""),
    }


def warnings(recipe: Recipe, questions: RowSet, preferences: RowSet) -> list[str]:
    """What whoever reads the results should know."""
    said = []
    both = _asked(questions.rows) & _asked(preferences.rows)
    if both:
        said.append(f"{len(both)} questions are asked in both sets; each lies in the same split of both")
    for rows in (questions, preferences):
        count = len(rows.of("test"))
        if count < _FEW:
            said.append(f"{rows.name}: the test split has {count} rows; a difference measured there says little")
    if any(source.source == DOCSTRINGS for source in (recipe.prepare.questions, recipe.prepare.preferences)):
        said.append("rows were made from the standard library's docstrings: good to see the pipeline work, not to use")
    if recipe.prepare.base.source == TINY_LLAMA:
        said.append("the base is a tiny Llama trained on the spot: its answers are fluent nonsense")
    return said


def _asked(rows: list[Row]) -> set[str]:
    return {fold(row.asks[0]) for row in rows}


def _percentiles(lengths: list[int]) -> dict[str, int]:
    cuts = statistics.quantiles(lengths, n=100, method="inclusive") if len(lengths) > 1 else lengths * 99
    named = {"p5": cuts[4], "median": cuts[49], "p95": cuts[94], "p99": cuts[98]}
    return {"least": min(lengths), **{name: round(cut) for name, cut in named.items()}, "most": max(lengths)}


def _shown(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else text[:_SHOWN_CHARACTERS] + " …"
