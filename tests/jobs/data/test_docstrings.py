"""The demo's rows: enough of them, always the same, no question in both sets."""

import subprocess
import sys

from llamarefine_jobs.data import docstrings


def test_there_are_enough_rows_and_no_question_is_in_both_sets() -> None:
    questions, pairs = list(docstrings.question_rows()), list(docstrings.preference_rows())
    asked, prompted = {row[0] for row in questions}, {row[0] for row in pairs}
    assert len(asked) == len(questions) > 1500
    assert len(prompted) == len(pairs) > 300
    assert not asked & prompted


def test_an_answer_is_the_first_paragraph_of_a_docstring() -> None:
    import json
    import tempfile

    answers = dict([*docstrings.question_rows(), *((row[0], row[1]) for row in docstrings.preference_rows())])
    by_name = {question.split("`")[1]: answer for question, answer in answers.items()}
    for name, documented in (("json.dumps", json.dumps), ("tempfile.mkdtemp", tempfile.mkdtemp)):
        assert by_name[name] == " ".join((documented.__doc__ or "").strip().split("\n\n")[0].split())


def test_a_rejected_answer_is_no_longer_than_the_chosen_one_unless_that_is_short() -> None:
    for _, chosen, rejected in docstrings.preference_rows():
        assert len(rejected.split()) <= max(len(chosen.split()), 13)


def test_another_process_makes_the_same_rows() -> None:
    code = "from llamarefine_jobs.data import docstrings as d; print(ascii([*d.question_rows(), *d.preference_rows()]))"
    environment = {"PYTHONHASHSEED": "1"}
    ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == ascii([*docstrings.question_rows(), *docstrings.preference_rows()])
