"""The prepare stage: it turns real files into an artifact, and gives the same bytes for the same recipe."""

import csv
import hashlib
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from llamarefine_jobs import entry
from llamarefine_jobs.contract.artifact import Manifest
from llamarefine_jobs.contract.errors import DataError
from llamarefine_jobs.data.splits import SPLITS, fold
from llamarefine_jobs.models.encoding import encode, load_tokenizer
from llamarefine_jobs.prepare import work
from llamarefine_jobs.recipe_file import parse_recipe
from llamarefine_jobs.sources.pinning import pin
from llamarefine_jobs.store import Store

DATA = Path(__file__).parents[4] / "shared" / "data"
QUESTIONS, PAIRS = DATA / "NvidiaDocumentationQandApairs.csv", DATA / "preferences-hh-style.jsonl"
real_data = pytest.mark.skipif(
    not (QUESTIONS.is_file() and PAIRS.is_file()),
    reason=f"{DATA} does not exist: the first user's files are not published",
)

RECIPE = """\
name: small
seed: 5
cpu_threads: 1
max_length_tokens: 192
prepare:
  base: {source: tiny-llama, tiny: {hidden_size: 32, intermediate_size: 64, layers: 1, vocabulary: 512, steps: 30}}
  questions: {source: python-docstrings}
  preferences: {source: python-docstrings}
  max_rows: 200
"""


def prepare(store: Path, *overrides: str) -> tuple[Manifest, Path]:
    """Run prepare; return the manifest and the folder of its artifact."""
    recipe = pin(parse_recipe(RECIPE, "small", overrides))
    manifest = entry.run("prepare", work, recipe, Store(str(store)))
    return manifest, store / manifest.folder


def read(folder: Path, name: str) -> dict[str, list[dict[str, Any]]]:
    return {
        split: [json.loads(line) for line in (folder / name / f"{split}.jsonl").read_text("utf-8").splitlines()]
        for split in SPLITS
    }


def user_turns(row: dict[str, Any]) -> list[str]:
    return [turn["content"] for turn in row.get("prompt", row.get("messages")) if turn["role"] == "user"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Path]:
    return prepare(tmp_path_factory.mktemp("demo") / "store")


def test_the_same_recipe_gives_the_same_bytes(demo: tuple[Manifest, Path], tmp_path: Path) -> None:
    again, _ = prepare(tmp_path / "elsewhere")
    assert again.files == demo[0].files
    assert {"base/model.safetensors", "base/tokenizer.json"} <= {file.path for file in again.files}


def test_another_seed_gives_another_base_and_other_splits(demo: tuple[Manifest, Path], tmp_path: Path) -> None:
    before = {file.path: file.sha256 for file in demo[0].files}
    other = {file.path: file.sha256 for file in prepare(tmp_path / "store", "seed=6")[0].files}
    for path in ("base/model.safetensors", "questions/test.jsonl", "preferences/test.jsonl"):
        assert other[path] != before[path]


def test_training_the_tiny_llama_lowers_its_loss(demo: tuple[Manifest, Path]) -> None:
    losses = demo[0].metrics["pretraining"]
    assert losses["last_loss"] < losses["first_loss"] - 0.5


def test_the_base_loads_with_plain_transformers(demo: tuple[Manifest, Path]) -> None:
    from transformers import AutoModelForCausalLM

    base = demo[1] / "base"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), load_tokenizer(base)
    assert model.config.vocab_size == len(tokenizer) == 512
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    )


def test_the_tokenizer_never_saw_held_out_text(tmp_path: Path) -> None:
    """A word that occurs only in the test split is in no token; in the training split it becomes a token."""
    rows = [{"question": f"Question number {n}?", "answer": f"Answer {n}."} for n in range(60)]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    source = f"prepare.questions.source={path}"
    _, folder = prepare(tmp_path / "store", source)
    held_out = {row["messages"][0]["content"] for row in read(folder, "questions")["test"]}
    train = {row["messages"][0]["content"] for row in read(folder, "questions")["train"]}
    for selected, is_token in ((held_out, False), (train, True)):
        marked = [row | {"answer": "zyzzyva " * 6} if row["question"] in selected else row for row in rows]
        path.write_text("\n".join(map(json.dumps, marked)))
        _, folder = prepare(tmp_path / "store", source)
        assert {row["messages"][0]["content"] for row in read(folder, "questions")["test"]} == held_out
        assert ("Ġzyzzyva" in load_tokenizer(folder / "base").get_vocab()) is is_token


def test_a_question_in_both_sets_is_in_the_same_split_of_both(tmp_path: Path) -> None:
    questions, pairs = tmp_path / "q.jsonl", tmp_path / "p.jsonl"
    numbers = range(120)
    questions.write_text("\n".join(json.dumps({"question": f"What is {n}?", "answer": f"A {n}."}) for n in numbers))
    pairs.write_text(
        "\n".join(json.dumps({"prompt": f"what is  {n}", "chosen": f"A {n}.", "rejected": "No."}) for n in numbers)
    )
    _, folder = prepare(
        tmp_path / "store", f"prepare.questions.source={questions}", f"prepare.preferences.source={pairs}"
    )
    one, other = read(folder, "questions"), read(folder, "preferences")
    for split in SPLITS:
        assert {row["group"] for row in one[split]} == {row["group"] for row in other[split]}
    card = json.loads((folder / "data_card.json").read_text())
    assert "120 questions are asked in both sets" in card["warnings"][0]


@real_data
def test_the_first_users_files_are_split_without_overlap(tmp_path: Path) -> None:
    manifest, folder = prepare(
        tmp_path / "store",
        f"prepare.questions.source={QUESTIONS}",
        f"prepare.preferences.source={PAIRS}",
        "prepare.max_rows=null",
        "prepare.too_long=truncate",
        "prepare.base.tiny.steps=1",
    )
    card = json.loads((folder / "data_card.json").read_text())
    with QUESTIONS.open(encoding="utf-8", newline="") as file:
        written = [(row["question"], row["answer"]) for row in csv.DictReader(file)]
    kept = read(folder, "questions")

    # Counts: every row has an outcome, and the known duplicates and conflicts are found.
    for name, read_rows in (("questions", 7108), ("preferences", 300)):
        outcomes = card[name]["outcomes"]
        assert card[name]["rows_read"] == sum(outcomes.values()) == read_rows
        assert {split: outcomes[f"kept: {split}"] for split in SPLITS} == {
            split: len(rows) for split, rows in read(folder, name).items()
        }
        assert manifest.metrics[name] == {"rows_read": read_rows, "outcomes": outcomes}
    assert card["questions"]["outcomes"]["exact duplicate"] == 683
    # Without any punctuation 875 questions would repeat and 169 would conflict, but one of these is C against C++.
    assert len(written) - len({fold(question) for question, _ in written}) == 874
    assert card["questions"]["questions_with_conflicting_answers"] == 168

    # Text: the same bytes as in the file; an answer may be cut after a whole sentence.
    by_question: defaultdict[str, list[str]] = defaultdict(list)
    for question, answer in written:
        by_question[question].append(answer)
    for row in [row for rows in kept.values() for row in rows]:
        question, answer = (turn["content"] for turn in row["messages"])
        assert any(original.startswith(answer) for original in by_question[question])

    # Splits: no question, group or near duplicate is in two splits, across both sets.
    split_of: dict[str, str] = {}
    for name in ("questions", "preferences"):
        for split, rows in read(folder, name).items():
            for row in rows:
                for key in (f"group {row['group']}", f"question {fold(user_turns(row)[0])}"):
                    assert split_of.setdefault(key, split) == split
    assert_no_near_duplicates_across(kept, 0.9)

    # Lengths: every kept pair fits.
    tokenizer = load_tokenizer(folder / "base")
    for row in read(folder, "preferences")["test"]:
        assert all(len(encode(tokenizer, row["prompt"], row[side])) <= 192 for side in ("chosen", "rejected"))


def assert_no_near_duplicates_across(kept: dict[str, list[dict[str, Any]]], similarity: float) -> None:
    """Compare every pair of questions that share a 3-gram, with other code than the code under test."""
    holders: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    entries: list[tuple[str, set[tuple[str, ...]]]] = []
    for split, rows in kept.items():
        for row in rows:
            words = fold(user_turns(row)[0]).split()
            entries.append((split, {tuple(words[start : start + 3]) for start in range(max(1, len(words) - 2))}))
    for place, (split, grams) in enumerate(entries):
        shared: defaultdict[int, int] = defaultdict(int)
        for gram in grams:
            for other in holders[gram]:
                shared[other] += 1
            holders[gram].append(place)
        for other, count in shared.items():
            if count / (len(grams) + len(entries[other][1]) - count) >= similarity:
                assert entries[other][0] == split


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("question,answer\nWhat?,That.\n", "too few different questions are left after the checks (1)"),
        ("question,answer\n" + "What?,That.\n" * 50, "too few different questions are left after the checks (1)"),
        ("question,answer\n" + 'What?,""\n' * 3, "none of the 3 rows can be used: empty answer (3)"),
        ("q,a\nWhat?,That.\n", "has no column `question`, `answer`, only `q`, `a`"),
        (
            "question,answer\n" + "".join(f"What {n}?,{'so on ' * 200}\n" for n in range(9)),
            "over max_length_tokens (9)",
        ),
    ],
)
def test_unusable_rows_are_refused_in_one_line_and_nothing_is_published(
    tmp_path: Path, rows: str, message: str
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(rows)
    with pytest.raises(DataError) as caught:
        prepare(tmp_path / "store", f"prepare.questions.source={path}")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not [file for file in (tmp_path / "store").rglob("*") if file.is_file()]


def test_the_error_for_pairs_without_a_prompt_column_lists_the_files_columns(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"instruction": "What?", "chosen": "That.", "rejected": "No."}))
    with pytest.raises(DataError, match="no column `prompt`, only `instruction`, `chosen`, `rejected`"):
        prepare(tmp_path / "store", f"prepare.preferences.source={path}")


def test_the_process_exits_with_the_code_of_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b"question,answer\nq,\xff\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("{source: python-docstrings}", "{source: rows.csv}", 1))
    command = [sys.executable, "-m", "llamarefine_jobs.prepare", "--recipe", "recipe.yaml", "--store", "store"]
    completed = subprocess.run(command, cwd=tmp_path, env=os.environ, capture_output=True, text=True)
    assert completed.returncode == DataError.exit_code
    assert "is not UTF-8 (line 2, byte 18)" in completed.stderr
    assert "Traceback" not in completed.stderr


def test_the_tiny_base_does_not_depend_on_the_hash_seed(demo: tuple[Manifest, Path], tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "llamarefine_jobs.prepare", "--recipe", "recipe.yaml", "--store", "store"]
    subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONHASHSEED": "7"}, check=True, capture_output=True)
    (weights,) = tmp_path.rglob("model.safetensors")
    expected = {file.path: file.sha256 for file in demo[0].files}["base/model.safetensors"]
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == expected
