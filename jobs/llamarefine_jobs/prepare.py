"""Prepare: check the base model and the data, split the data, and publish both.

    python -m llamarefine_jobs.prepare --recipe recipe.yaml --store s3://bucket/prefix

Reads the recipe's sources. Writes base/ (safetensors, config, tokenizer), questions/ and preferences/ (train,
validation and test as JSON lines) and data_card.json. The card counts every row that was read. No question is in two
splits, and none is in the test split of one set and the training split of the other.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llamarefine_jobs import entry
from llamarefine_jobs.context import Context
from llamarefine_jobs.contract.prompt import answer
from llamarefine_jobs.contract.recipe import Rows
from llamarefine_jobs.data import data_card, docstrings
from llamarefine_jobs.data.columns import missing_columns_error
from llamarefine_jobs.data.reading import Table, check_unchanged, read_table
from llamarefine_jobs.data.row_sets import (
    RowSet,
    check_rows,
    drop_duplicates,
    fit_lengths,
    resolve_conflicts,
    take_evenly,
)
from llamarefine_jobs.data.rows import Row, is_dialogue, pair_row, question_row
from llamarefine_jobs.data.splits import SPLITS, assign_splits, group_rows
from llamarefine_jobs.models import tiny_llama
from llamarefine_jobs.models.base import describe_base, fetch_base, install_base, write_tokenizer_and_config
from llamarefine_jobs.sources.locations import DOCSTRINGS, TINY_LLAMA


def work(context: Context) -> None:
    """Write base/, questions/, preferences/ and data_card.json."""
    recipe, section = context.recipe, context.recipe.prepare

    # Data: both tables, read and checked row by row.
    question_table = _read_questions(context)
    pair_table = _read_pairs(context)
    questions = _check(context, "questions", question_table, question_row)
    preferences = _check(context, "preferences", pair_table, pair_row)

    # Splits: rows are grouped and split across both sets together.
    _group(questions, preferences, section.near_duplicate_similarity)
    for rows in (questions, preferences):
        drop_duplicates(rows)
    resolve_conflicts(questions, section.questions.conflicting_answers)
    _split(context, questions, preferences)

    # Base: its tokenizer decides which rows are too long. A tiny base sees the training splits only.
    is_tiny = section.base.source == TINY_LLAMA
    base, commit = context.output / "base", None
    if is_tiny:
        tokenizer = tiny_llama.train_tokenizer(_training_texts(questions, preferences), section.base.tiny.vocabulary)
    else:
        folder, commit = fetch_base(section.base, context.work)
        check_unchanged(section.base, "prepare.base")
        tokenizer = install_base(folder, base)
    for rows in (questions, preferences):
        fit_lengths(rows, tokenizer, recipe.max_length_tokens, section.too_long)
    if not is_tiny:  # a tiny base's tokenizer was trained on the training splits, so these must not change any more
        _split(context, questions, preferences)
    for rows in (questions, preferences):
        rows.require_splits()
    if is_tiny:
        context.metrics["pretraining"] = _pretrain(context, tokenizer, _training_texts(questions, preferences), base)

    # Rows and data card.
    for rows in (questions, preferences):
        _write(rows, context.output / rows.name)
    card = {
        "base": data_card.describe_source(section.base, commit) | describe_base(base),
        "questions": data_card.describe_set(questions, section.questions, question_table),
        "preferences": data_card.describe_set(preferences, section.preferences, pair_table),
        "rules": data_card.rules(recipe),
        "warnings": data_card.warnings(recipe, questions, preferences),
    }
    (context.output / "data_card.json").write_text(_json(card, indent=2) + "\n", encoding="utf-8")
    for rows in (questions, preferences):
        context.metrics[rows.name] = {"rows_read": rows.rows_read, "outcomes": rows.outcomes()}
        context.note(_summary(rows))
    for warning in card["warnings"]:
        context.note(f"note: {warning}")


def _read_questions(context: Context) -> Table:
    source = context.recipe.prepare.questions
    if source.source == DOCSTRINGS:
        return _built_in_table(source, "prepare.questions", list(docstrings.question_rows()))
    return read_table(source, "prepare.questions", context.work, (source.question_column, source.answer_column))


def _read_pairs(context: Context) -> Table:
    source = context.recipe.prepare.preferences
    if source.source == DOCSTRINGS:
        return _built_in_table(source, "prepare.preferences", list(docstrings.preference_rows()))
    columns = (source.prompt_column, source.chosen_column, source.rejected_column)
    table = read_table(source, "prepare.preferences", context.work, columns, optional=(source.prompt_column,))
    # Where chosen and rejected hold whole dialogues, as in Anthropic/hh-rlhf, there is no prompt column.
    if source.prompt_column not in table.columns and not any(cells and is_dialogue(cells[1]) for cells in table.rows):
        raise missing_columns_error("prepare.preferences", source.source, [source.prompt_column], table.columns)
    return table


def _built_in_table(source: Rows, key: str, rows: Sequence[tuple[str, ...]]) -> Table:
    check_unchanged(source, key)
    return Table("docstrings", list(rows), ())


def _check(context: Context, name: Any, table: Table, make: Callable[..., Row]) -> RowSet:
    section = context.recipe.prepare
    rows = RowSet(name, len(table.rows))
    check_rows(rows, take_evenly(rows, table.rows, section.max_rows), make, section.max_cell_bytes)
    return rows


def _group(questions: RowSet, preferences: RowSet, similarity: float) -> None:
    """Set the group of every row."""
    texts, dialogues = [row.user_turns[0] for row in questions.rows], [row.user_turns for row in preferences.rows]
    for rows, groups in zip((questions, preferences), group_rows(texts, dialogues, similarity), strict=True):
        rows.rows = [replace(row, group=group) for row, group in zip(rows.rows, groups, strict=True)]


def _split(context: Context, questions: RowSet, preferences: RowSet) -> None:
    """Set the split of every row to the split of its group. Raises DataError if a set has too few groups."""
    section = context.recipe.prepare
    sets = {rows.name: {row.group for row in rows.rows} for rows in (questions, preferences)}
    split_of = assign_splits(sets, context.recipe.seed, section.validation_fraction, section.test_fraction)
    for rows in (questions, preferences):
        rows.rows = [replace(row, split=split_of[row.group]) for row in rows.rows]


def _training_texts(questions: RowSet, preferences: RowSet) -> list[str]:
    return [text for rows in (questions, preferences) for row in rows.in_split("train") for text in row.texts]


def _pretrain(context: Context, tokenizer: Any, texts: Sequence[str], into: Path) -> dict[str, float]:
    tiny = context.recipe.prepare.base.tiny

    def report_step(step: int, steps: int, **figures: float) -> None:
        context.progress(step, steps, phase="pretrain", **figures)

    losses = tiny_llama.pretrain(tiny, tokenizer, texts, context.recipe.seed, into, report_step)
    write_tokenizer_and_config(into, tokenizer, {})
    return losses


def _write(rows: RowSet, folder: Path) -> None:
    folder.mkdir()
    for split in SPLITS:
        with (folder / f"{split}.jsonl").open("w", encoding="utf-8", newline="\n") as file:
            for row in rows.in_split(split):
                file.write(_json(_published(rows, row)) + "\n")


def _published(rows: RowSet, row: Row) -> dict[str, Any]:
    if rows.name == "questions":
        return {"messages": [*row.prompt, *answer(row.answers[0])], "group": row.group}
    chosen, rejected = row.answers
    return {"prompt": list(row.prompt), "chosen": chosen, "rejected": rejected, "group": row.group}


def _json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _summary(rows: RowSet) -> str:
    kept = ", ".join(f"{len(rows.in_split(split))} {split}" for split in SPLITS)
    reasons = ", ".join(f"{reason} {count}" for reason, count in rows.dropped.most_common())
    return f"{rows.name}: {rows.rows_read} rows read; kept {kept}" + (f"; dropped: {reasons}" if reasons else "")


if __name__ == "__main__":
    entry.main("prepare", work)
