"""Infer: each of a run's three models answers, reproducibly, and only answers go to standard output."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoTokenizer

from llamarefine_jobs import entry, infer, merge
from llamarefine_jobs.contract.prompt import question
from llamarefine_jobs.models import backends
from llamarefine_jobs.recipe_file import to_yaml
from tests.jobs import merging

QUESTIONS = ["What is alpha beta 1?", "What is gamma?", "Is it 7?"]
NEW_TOKENS = 12
MODELS = ["base", "sft", "merged"]

Ask = Callable[..., list[str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> merging.Run:
    """Return a merged run. Its adapters are strong, so the three models answer differently."""
    folder = tmp_path_factory.mktemp("run")
    strong = {"size": 0.5}
    run = merging.make_run(folder, "merge.dtype=float32", f"infer.max_new_tokens={NEW_TOKENS}", sft=strong, dpo=strong)
    run.merge()
    (folder / "recipe.yaml").write_text(to_yaml(run.recipe))
    return run


@pytest.fixture(scope="module")
def arguments(run: merging.Run) -> list[str]:
    recipe = run.folders["sft"].parent / "recipe.yaml"
    return ["--recipe", str(recipe), "--store", run.store.uri]


@pytest.fixture
def ask(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Ask:
    """Return a function that runs infer and returns the lines of its standard output."""

    def ask(*more: str) -> list[str]:
        infer.main([*arguments, *more])
        return capsys.readouterr().out.splitlines()

    return ask


@pytest.fixture
def refuse(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Any, str]]:
    """Return a function that runs infer, which must fail, and returns its exit code and its error message."""

    def refuse(*more: str) -> tuple[Any, str]:
        with pytest.raises(SystemExit) as exited:
            infer.main([*arguments, *more])
        printed = capsys.readouterr()
        assert printed.out == ""
        assert "Traceback" not in printed.err
        return exited.value.code, printed.err.split("infer: error: ")[1].rstrip("\n")

    return refuse


def answer_by_transformers(run: merging.Run, name: str, question_text: str) -> str:
    """Return the answer of a run's model when transformers and peft are used directly."""
    merged = run.model(entry.run("merge", merge.work, run.recipe, run.store))
    folder = merged if name == "merged" else run.base
    model, tokenizer = merging.load(folder), AutoTokenizer.from_pretrained(folder)
    if name == "sft":
        model = PeftModel.from_pretrained(model, run.adapter("sft"))
    inputs = tokenizer.apply_chat_template(
        question(question_text), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def read_answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("model", "dtype"), [("base", None), ("merged", "float32")])
def test_on_cuda_the_merged_model_is_loaded_in_the_type_that_evaluate_uses(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, model: str, dtype: str | None
) -> None:
    """In bf16 its answers would differ from the report's by rounding. On a CPU every model is loaded in fp32."""
    requested_dtypes = []
    load = backends.TransformersBackend.load

    def record_dtype(self: backends.TransformersBackend, folder: Path, **options: Any) -> Any:
        requested_dtypes.append(options.get("dtype"))
        return load(self, folder, **options)

    monkeypatch.setattr(backends.TransformersBackend, "load", record_dtype)
    ask("--model", model, QUESTIONS[0])
    assert requested_dtypes == [dtype]


def test_each_model_answers_as_with_plain_transformers_and_peft(run: merging.Run, ask: Ask, tmp_path: Path) -> None:
    answers = {}
    for name in MODELS:
        ask("--model", name, "--answers", str(tmp_path / f"{name}.jsonl"), *QUESTIONS)
        answers[name] = [row["answer"] for row in read_answers(tmp_path / f"{name}.jsonl")]
        assert answers[name] == [answer_by_transformers(run, name, text) for text in QUESTIONS]
    assert answers["base"] != answers["sft"] != answers["merged"] != answers["base"]


def test_the_answers_file_has_a_row_for_each_question(ask: Ask, tmp_path: Path) -> None:
    into = tmp_path / "answers.jsonl"
    assert ask("--answers", str(into), *QUESTIONS) == []
    rows = read_answers(into)
    assert [row["prompt"] for row in rows] == QUESTIONS
    assert all(row.keys() == {"prompt", "answer", "tokens", "stopped", "model"} for row in rows)
    assert all(row["model"] == "merged" and (row["stopped"] or row["tokens"] == NEW_TOKENS) for row in rows)
    before = into.read_bytes()
    ask("--answers", str(into), *QUESTIONS)
    assert into.read_bytes() == before, "at temperature 0 the same question must have the same answer"
    assert list(tmp_path.iterdir()) == [into]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("asked.txt", "What is gamma?\n\nIs it 7?\n"),
        ("asked.jsonl", '{"prompt": "What is gamma?"}\n{"prompt": "Is it 7?", "id": 3}\n'),
        ("asked.csv", 'id,question\n1,What is gamma?\n2,"Is it 7?"\n'),
    ],
)
def test_questions_are_read_from_a_file(name: str, text: str, ask: Ask, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    ask("--prompts", str(tmp_path / name), "--answers", str(tmp_path / "out.jsonl"))
    assert [row["prompt"] for row in read_answers(tmp_path / "out.jsonl")] == ["What is gamma?", "Is it 7?"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("asked.txt", "\n\n", "has no question"),
        ("asked.csv", "id,text\n1,hello\n", "has no column prompt or question, only id, text"),
        ("asked.jsonl", '{"prompt": 7}\n', "row 1 has no question; expected text, found 7"),
        ("asked.jsonl", "What is gamma?\n", "line 1 is not one JSON object"),
        ("asked.pdf", "What is gamma?\n", "asked.pdf ends in none of .csv"),
        (None, "", "cannot read .*: No such file"),
    ],
)
def test_a_file_without_questions_is_refused(
    name: str | None, text: str, message: str, refuse: Callable[..., tuple[Any, str]], tmp_path: Path
) -> None:
    path = tmp_path / (name or "missing.txt")
    if name:
        path.write_text(text)
    code, error = refuse("--prompts", str(path))
    assert code == 11
    assert "\n" not in error
    assert re.search(message, error), error


def test_only_what_the_chosen_model_needs_is_downloaded(run: merging.Run, arguments: list[str], tmp_path: Path) -> None:
    """Each model runs from a store without the files of the other stages."""
    for name, needed in infer.NEEDS.items():
        store = shutil.copytree(run.store.uri.removeprefix("file://"), tmp_path / name)
        for file in store.rglob("*"):
            if file.is_file() and file.name != "manifest.json" and file.relative_to(store).parts[1] not in needed:
                file.unlink()
        infer.main([*arguments[:2], "--store", str(store), "--model", name, QUESTIONS[0]])


def test_a_model_that_is_not_published_yet_is_a_data_error(
    run: merging.Run, arguments: list[str], tmp_path: Path
) -> None:
    store = shutil.copytree(run.store.uri.removeprefix("file://"), tmp_path / "store")
    shutil.rmtree(store / "artifacts" / "merge")
    infer.main([*arguments[:2], "--store", str(store), "--model", "sft", QUESTIONS[0]])
    with pytest.raises(SystemExit) as exited:
        infer.main([*arguments[:2], "--store", str(store), "--model", "merged", QUESTIONS[0]])
    assert exited.value.code == 11


def test_questions_that_are_too_long_are_listed_before_any_answer_is_generated(
    refuse: Callable[..., tuple[Any, str]], tmp_path: Path
) -> None:
    code, error = refuse(
        "--answers", str(tmp_path / "out.jsonl"), "--set", "infer.max_new_tokens=2040", QUESTIONS[0], "?"
    )
    lines = error.splitlines()
    assert code == 11
    assert re.fullmatch(
        r"question 1 has \d+ tokens and its answer up to 2040, together more than the model's 2048; "
        r"shorten it, or lower infer.max_new_tokens",
        lines[0],
    )
    assert lines[1].startswith("question 2 ")
    assert list(tmp_path.iterdir()) == []


def test_a_command_without_questions_is_refused_before_a_model_is_loaded(
    refuse: Callable[..., tuple[Any, str]],
) -> None:
    assert refuse() == (10, "expected a question, --prompts FILE or --interactive, found none of them")


def test_an_answers_file_that_cannot_be_written_is_refused_before_a_model_is_loaded(
    refuse: Callable[..., tuple[Any, str]], tmp_path: Path
) -> None:
    assert refuse("--answers", str(tmp_path / "no" / "out.jsonl"), "Why?")[0] == 11
    assert refuse("--answers", str(tmp_path), "Why?") == (11, f"{tmp_path} is a folder; name a file for the answers")


def test_each_line_of_an_interactive_session_is_answered_separately(
    run: merging.Run, arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is gamma?\n\n" + "long " * 3000 + "\nWhat is gamma?\n"))
    infer.main([*arguments, "--interactive"])
    printed = capsys.readouterr()
    answer = answer_by_transformers(run, "merged", "What is gamma?")
    assert printed.out == f"{answer}\n\n{answer}\n\n"
    assert "infer: question 1 has" in printed.err
    assert printed.err.endswith("infer: bye\n")


def test_the_speed_of_generating_is_logged(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    infer.main([*arguments, *QUESTIONS])
    lines = capsys.readouterr().err.splitlines()
    expected = re.compile(r"infer: generated 3 answers, \d+ tokens in [\d.]+ s, \d+ tokens/s")
    assert sum(bool(expected.fullmatch(line)) for line in lines) == 1


def test_decoding_at_a_temperature_is_seeded_by_the_recipe(ask: Ask) -> None:
    at_high_temperature = ("--set", "infer.temperature=5.0", *QUESTIONS)
    assert ask(*at_high_temperature) == ask(*at_high_temperature) != ask(*QUESTIONS)


def test_in_a_pipe_only_the_answer_goes_to_standard_output(
    run: merging.Run, arguments: list[str], tmp_path: Path
) -> None:
    """Ctrl-C while infer waits for the next question ends it in the same way as the end of the input."""
    process = subprocess.Popen(
        [sys.executable, "-m", "llamarefine_jobs.infer", *arguments, "--interactive", QUESTIONS[0]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"LLAMAREFINE_WORK": str(tmp_path)},
    )
    assert process.stderr
    log_lines = []
    for line in process.stderr:
        log_lines.append(line)
        if "one question a line" in line:
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "infer: bye\n"), log_lines
    assert out.strip() == answer_by_transformers(run, "merged", QUESTIONS[0]).strip()
    assert all(line.startswith("infer: ") for line in log_lines)
    assert list(tmp_path.iterdir()) == []
