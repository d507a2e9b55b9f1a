"""The demo's rows: there are enough, they are always the same, and no question is in both sets."""

import subprocess
import sys

from llamarefine_jobs.data import docstrings


def test_there_are_enough_rows_and_no_question_is_in_both_sets() -> None:
    questions, pairs = list(docstrings.question_rows()), list(docstrings.preference_rows())
    question_texts, prompts = {row[0] for row in questions}, {row[0] for row in pairs}
    assert len(question_texts) == len(questions) > 1500
    assert len(prompts) == len(pairs) > 300
    assert not question_texts & prompts


def test_an_answer_is_the_first_paragraph_of_a_docstring() -> None:
    import json
    import tempfile

    answers = dict([*docstrings.question_rows(), *((row[0], row[1]) for row in docstrings.preference_rows())])
    by_name = {question.split("`")[1]: answer for question, answer in answers.items()}
    for name, documented in (("json.dumps", json.dumps), ("tempfile.mkdtemp", tempfile.mkdtemp)):
        assert by_name[name] == " ".join((documented.__doc__ or "").strip().split("\n\n")[0].split())


def test_a_rejected_answer_is_longer_only_than_a_short_chosen_one() -> None:
    for _, chosen, rejected in docstrings.preference_rows():
        assert len(rejected.split()) <= max(len(chosen.split()), 13)


def test_another_process_makes_the_same_rows() -> None:
    code = "from llamarefine_jobs.data import docstrings as d; print(ascii([*d.question_rows(), *d.preference_rows()]))"
    environment = {"PYTHONHASHSEED": "1"}
    completed = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert completed.stdout.strip() == ascii([*docstrings.question_rows(), *docstrings.preference_rows()])
