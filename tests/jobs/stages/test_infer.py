"""Infer: the three models of a run answer, the same each time, and only the answers go to standard output."""

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

ASKED = ["What is alpha beta 1?", "What is gamma?", "Is it 7?"]
NEW_TOKENS = 12
MODELS = ["base", "sft", "merged"]

Ask = Callable[..., list[str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> merging.Run:
    """A merged run. Its adapters are strong, so the three models answer differently."""
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
    """Run infer; the lines of its standard output."""

    def ask(*more: str) -> list[str]:
        infer.main([*arguments, *more])
        return capsys.readouterr().out.splitlines()

    return ask


@pytest.fixture
def refuse(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[Any, str]]:
    """Run infer; its exit code and its last words."""

    def refuse(*more: str) -> tuple[Any, str]:
        with pytest.raises(SystemExit) as end:
            infer.main([*arguments, *more])
        printed = capsys.readouterr()
        assert printed.out == ""
        assert "Traceback" not in printed.err
        return end.value.code, printed.err.split("infer: error: ")[1].rstrip("\n")

    return refuse


def plainly(run: merging.Run, name: str, asked: str) -> str:
    """What the model answers when transformers and peft are used directly."""
    merged = run.model(entry.run("merge", merge.work, run.recipe, run.store))
    folder = merged if name == "merged" else run.base
    model, tokenizer = merging.load(folder), AutoTokenizer.from_pretrained(folder)
    if name == "sft":
        model = PeftModel.from_pretrained(model, run.adapter("sft"))
    inputs = tokenizer.apply_chat_template(
        question(asked), add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def written(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("model", "dtype"), [("base", None), ("merged", "float32")])
def test_on_cuda_the_merged_model_answers_in_the_type_it_was_evaluated_in(
    ask: Ask, monkeypatch: pytest.MonkeyPatch, model: str, dtype: str | None
) -> None:
    """In bf16 they would be answers of another rounding than the report's. A CPU loads in fp32, whatever is asked."""
    asked_for = []
    load = backends.TransformersBackend.load

    def spy(self: backends.TransformersBackend, folder: Path, **options: Any) -> Any:
        asked_for.append(options.get("dtype"))
        return load(self, folder, **options)

    monkeypatch.setattr(backends.TransformersBackend, "load", spy)
    ask("--model", model, ASKED[0])
    assert asked_for == [dtype]


def test_each_model_answers_as_it_does_when_loaded_plainly(run: merging.Run, ask: Ask, tmp_path: Path) -> None:
    answers = {}
    for name in MODELS:
        ask("--model", name, "--answers", str(tmp_path / f"{name}.jsonl"), *ASKED)
        answers[name] = [row["answer"] for row in written(tmp_path / f"{name}.jsonl")]
        assert answers[name] == [plainly(run, name, asked) for asked in ASKED]
    assert answers["base"] != answers["sft"] != answers["merged"] != answers["base"]


def test_the_answers_file_says_who_answered_what_and_how_long(ask: Ask, tmp_path: Path) -> None:
    into = tmp_path / "answers.jsonl"
    assert ask("--answers", str(into), *ASKED) == []
    rows = written(into)
    assert [row["prompt"] for row in rows] == ASKED
    assert all(row.keys() == {"prompt", "answer", "tokens", "stopped", "model"} for row in rows)
    assert all(row["model"] == "merged" and (row["stopped"] or row["tokens"] == NEW_TOKENS) for row in rows)
    before = into.read_bytes()
    ask("--answers", str(into), *ASKED)
    assert into.read_bytes() == before, "at temperature 0 the same question has the same answer"
    assert list(tmp_path.iterdir()) == [into]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("asked.txt", "What is gamma?\n\nIs it 7?\n"),
        ("asked.jsonl", '{"prompt": "What is gamma?"}\n{"prompt": "Is it 7?", "id": 3}\n'),
        ("asked.csv", 'id,question\n1,What is gamma?\n2,"Is it 7?"\n'),
    ],
)
def test_questions_come_from_a_file(name: str, text: str, ask: Ask, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    ask("--prompts", str(tmp_path / name), "--answers", str(tmp_path / "out.jsonl"))
    assert [row["prompt"] for row in written(tmp_path / "out.jsonl")] == ["What is gamma?", "Is it 7?"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("asked.txt", "\n\n", "holds no question"),
        ("asked.csv", "id,text\n1,hello\n", "has no column prompt or question, only id, text"),
        ("asked.jsonl", '{"prompt": 7}\n', "row 1 holds no question; expected text, found 7"),
        ("asked.jsonl", "What is gamma?\n", "line 1 is not one JSON object"),
        ("asked.pdf", "What is gamma?\n", "asked.pdf ends in none of .csv"),
        (None, "", "cannot read .*: No such file"),
    ],
)
def test_a_file_without_questions_is_refused(
    name: str | None, text: str, words: str, refuse: Callable[..., tuple[Any, str]], tmp_path: Path
) -> None:
    path = tmp_path / (name or "missing.txt")
    if name:
        path.write_text(text)
    code, said = refuse("--prompts", str(path))
    assert code == 11
    assert "\n" not in said
    assert re.search(words, said), said


def test_only_what_the_chosen_model_needs_is_downloaded(run: merging.Run, arguments: list[str], tmp_path: Path) -> None:
    """Where the bytes of the others are gone, or wrong, nobody notices."""
    for name, needed in infer.NEEDS.items():
        store = shutil.copytree(run.store.uri.removeprefix("file://"), tmp_path / name)
        for file in store.rglob("*"):
            if file.is_file() and file.name != "manifest.json" and file.relative_to(store).parts[1] not in needed:
                file.unlink()
        infer.main([*arguments[:2], "--store", str(store), "--model", name, ASKED[0]])


def test_a_model_that_is_not_there_yet_is_named(run: merging.Run, arguments: list[str], tmp_path: Path) -> None:
    store = shutil.copytree(run.store.uri.removeprefix("file://"), tmp_path / "store")
    shutil.rmtree(store / "artifacts" / "merge")
    infer.main([*arguments[:2], "--store", str(store), "--model", "sft", ASKED[0]])
    with pytest.raises(SystemExit) as end:
        infer.main([*arguments[:2], "--store", str(store), "--model", "merged", ASKED[0]])
    assert end.value.code == 11


def test_questions_too_long_for_the_model_are_named_before_any_is_asked(
    refuse: Callable[..., tuple[Any, str]], tmp_path: Path
) -> None:
    code, said = refuse("--answers", str(tmp_path / "out.jsonl"), "--set", "infer.max_new_tokens=2040", ASKED[0], "?")
    lines = said.splitlines()
    assert code == 11
    assert re.fullmatch(
        r"question 1 has \d+ tokens and its answer up to 2040, together more than the model's 2048; "
        r"shorten it, or lower infer.max_new_tokens",
        lines[0],
    )
    assert lines[1].startswith("question 2 ")
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_ask_is_said_before_anything_is_loaded(refuse: Callable[..., tuple[Any, str]]) -> None:
    assert refuse() == (10, "expected a question, --prompts FILE or --interactive, found none of them")


def test_answers_that_could_not_be_written_are_refused_before_anything_is_loaded(
    refuse: Callable[..., tuple[Any, str]], tmp_path: Path
) -> None:
    assert refuse("--answers", str(tmp_path / "no" / "out.jsonl"), "Why?")[0] == 11
    assert refuse("--answers", str(tmp_path), "Why?") == (11, f"{tmp_path}: is a folder; name a file for the answers")


def test_each_line_of_a_conversation_is_a_question_of_its_own(
    run: merging.Run, arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is gamma?\n\n" + "long " * 3000 + "\nWhat is gamma?\n"))
    infer.main([*arguments, "--interactive"])
    printed = capsys.readouterr()
    answer = plainly(run, "merged", "What is gamma?")
    assert printed.out == f"{answer}\n\n{answer}\n\n"
    assert "infer: question 1 has" in printed.err
    assert printed.err.endswith("infer: bye\n")


def test_sampling_is_seeded_by_the_recipe(ask: Ask) -> None:
    hot = ("--set", "infer.temperature=5.0", *ASKED)
    assert ask(*hot) == ask(*hot) != ask(*ASKED)


def test_in_a_pipe_only_the_answer_goes_to_standard_output(
    run: merging.Run, arguments: list[str], tmp_path: Path
) -> None:
    """And Ctrl-C while waiting for the next question ends it as the input's end does."""
    process = subprocess.Popen(
        [sys.executable, "-m", "llamarefine_jobs.infer", *arguments, "--interactive", ASKED[0]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"LLAMAREFINE_WORK": str(tmp_path)},
    )
    assert process.stderr
    noted = []
    for line in process.stderr:
        noted.append(line)
        if "one question a line" in line:
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "infer: bye\n"), noted
    assert out.strip() == plainly(run, "merged", ASKED[0]).strip()
    assert all(line.startswith("infer: ") for line in noted)
    assert list(tmp_path.iterdir()) == []
