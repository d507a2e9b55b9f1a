"""Infer: answer questions with the base, with base + SFT, or with the merged model of a finished run.

    python -m llamarefine_jobs.infer --recipe recipe.yaml --store s3://bucket/prefix --model merged "Why is …?"

Reads prepare's base/, sft's adapter/ or merge's model/: only what the chosen model needs is downloaded. Publishes
nothing. Each question is answered without the others as context. Answers go to standard output, everything else to
standard error. With --answers they go to a file, which is created when all answers are complete.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamarefine_jobs import entry
from llamarefine_jobs.contract.artifact import short
from llamarefine_jobs.contract.environment import WORK_FOLDER
from llamarefine_jobs.contract.errors import DataError, RecipeError, from_os_error
from llamarefine_jobs.contract.output import has_reader, outlive_readers
from llamarefine_jobs.contract.prompt import question
from llamarefine_jobs.contract.recipe import Recipe, Rows
from llamarefine_jobs.contract.stages import STAGES
from llamarefine_jobs.data.reading import read_table
from llamarefine_jobs.models import adapters, backends
from llamarefine_jobs.models.encoding import encode_prompt, load_tokenizer
from llamarefine_jobs.models.generation import Answer, generate, speed
from llamarefine_jobs.process import sigterm
from llamarefine_jobs.recipe_file import load_recipe
from llamarefine_jobs.sources import pinning
from llamarefine_jobs.store import Store
from llamarefine_jobs.untrusted.control_characters import strip_control_characters, strip_for_stream

NEEDS = {"base": ("prepare",), "sft": ("prepare", "sft"), "merged": ("merge",)}
_STAGE = STAGES["infer"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Answer the questions of the command line. After an error, end the process with the error's exit code."""
    options = _parser().parse_args(arguments)
    outlive_readers()
    os.environ.setdefault("TQDM_DISABLE", "1")  # turns off the libraries' progress bars; read when tqdm is imported
    with entry.exit_code("infer"):
        # Recipe and questions.
        recipe = pinning.pin(load_recipe(options.recipe, options.set), check=False)
        questions = [*options.question, *(read_questions(options.prompts, recipe) if options.prompts else ())]
        if not questions and not options.interactive:
            raise RecipeError("expected a question, --prompts FILE or --interactive, found none of them")
        if options.answers:
            check_writable(options.answers)

        # Model and answers.
        with entry.seeded_threads(recipe), load_respondent(options.model, recipe, Store(options.store)) as respondent:
            if questions:
                began_s = time.monotonic()
                answers = respondent.answer(questions)
                _log(f"generated {speed(answers, time.monotonic() - began_s)}")
                show(questions, answers, options.answers, options.model)
            if options.interactive:
                converse(respondent)


@dataclass(frozen=True)
class Respondent:
    """A loaded model that answers questions with the settings of its run's recipe."""

    model: Any
    tokenizer: Any
    recipe: Recipe

    def answer(self, questions: Sequence[str]) -> list[Answer]:
        """Return an answer to each question.

        Raises DataError, with one line for each question that is too long, before it generates any answer.
        """
        section = self.recipe.infer
        prompts = [encode_prompt(self.tokenizer, question(text)) for text in questions]
        self._check_lengths(prompts)
        return generate(
            self.model,
            self.tokenizer,
            prompts,
            max_new_tokens=section.max_new_tokens,
            batch_rows=section.batch_rows,
            temperature=section.temperature,
            top_p=section.top_p,
            on_batch=_progress if len(prompts) > section.batch_rows else None,
        )

    def _check_lengths(self, prompts: Sequence[list[int]]) -> None:
        positions = self.model.config.max_position_embeddings
        limit = positions - self.recipe.infer.max_new_tokens
        if too_long := [(place, len(ids)) for place, ids in enumerate(prompts, 1) if len(ids) > limit]:
            raise DataError(
                "\n".join(
                    f"question {place} has {tokens} tokens and its answer up to {self.recipe.infer.max_new_tokens}, "
                    f"together more than the model's {positions}; shorten it, or lower infer.max_new_tokens"
                    for place, tokens in too_long
                )
            )


@contextlib.contextmanager
def load_respondent(name: str, recipe: Recipe, store: Store) -> Iterator[Respondent]:
    """Yield the loaded model `name` of a run. Its files are downloaded into a folder that is removed afterwards."""
    parents = entry.find_parents("infer", recipe, store, NEEDS[name])
    backend = backends.inference_backend()
    _log(backends.describe_backend(backend))
    with tempfile.TemporaryDirectory(prefix="llamarefine-infer-", dir=os.environ.get(WORK_FOLDER)) as folder:
        sigterm.STOP.cleanup_folder = Path(folder)
        inputs = entry.fetch_inputs(_STAGE, parents, store, Path(folder))
        _log(f"{name}, from " + ", ".join(f"{stage} {short(parent.key)}" for stage, parent in parents.items()))
        base = inputs["merge"] / "model" if name == "merged" else inputs["prepare"] / "base"
        # The merged model has the type that it was rounded to, as in evaluate: a coarser type would lose DPO's update.
        model = backend.load(base, dtype=recipe.merge.dtype if name == "merged" else None)
        if name == "sft":
            model = adapters.attach_adapter(model, inputs["sft"] / "adapter")
        yield Respondent(model, load_tokenizer(base), recipe)


def read_questions(path: Path, recipe: Recipe) -> list[str]:
    """Return the questions of a file: the lines of a .txt file, else one column of a table.

    That column is `prompt` or the recipe's question column; in each row the first of the two that has text is used.
    """
    if path.suffix.lower() == ".txt":
        return _lines(path)
    columns = tuple(dict.fromkeys(("prompt", recipe.prepare.questions.question_column)))
    table = read_table(Rows(source=str(path.absolute())), "--prompts", path.parent, columns, optional=columns)
    if not set(columns) & set(table.columns):
        raise DataError(
            f"--prompts: {path} has no column {' or '.join(columns)}, only {', '.join(table.columns)}; rename one"
        )
    questions: list[str] = []
    for number, cells in enumerate(table.rows, 1):
        text = next((cell for cell in cells or () if cell), None)
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"--prompts: {path}: row {number} has no question; expected text, found {text!r:.60}")
        questions.append(text)
    return questions


def check_writable(path: Path) -> None:
    """Raise DataError or AccessError if the answers' file cannot be written. Called before the slow work."""
    if path.is_dir():
        raise DataError(f"{path} is a folder; name a file for the answers")
    if not path.absolute().parent.is_dir():
        raise DataError(f"{path}: the folder {path.parent} does not exist; create it first")
    if not os.access(path.absolute().parent, os.W_OK):
        raise from_os_error(PermissionError(13, "Permission denied", str(path)))


def show(questions: Sequence[str], answers: Sequence[Answer], into: Path | None, model: str) -> None:
    """Write the answers to the file `into`, or print them: several answers each below its question."""
    if into:
        write_answers(into, questions, answers, model)
        _log(f"wrote {len(answers)} answers to {into}")
        return
    for question_text, answer in zip(questions, answers, strict=True):
        _print(f"> {question_text}\n{answer.text}\n" if len(questions) > 1 else answer.text)
    if cut := sum(not answer.stopped for answer in answers):
        _log(f"{cut} of {len(answers)} answers were cut at infer.max_new_tokens")


def write_answers(path: Path, questions: Sequence[str], answers: Sequence[Answer], model: str) -> None:
    """Write one JSON line per answer to `path`. A temporary file is renamed at the end, so `path` is never partial."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for question_text, answer in zip(questions, answers, strict=True):
                row = {
                    "prompt": question_text,
                    "answer": answer.text,
                    "tokens": answer.tokens,
                    "stopped": answer.stopped,
                    "model": model,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def converse(respondent: Respondent) -> None:
    """Answer each line of standard input as a separate question, until the input ends or Ctrl-C is pressed."""
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if on_terminal:
        import readline  # noqa: F401  (adds line editing and history to `input`)
    try:
        _log("enter one question a line; each is answered separately; Ctrl-D ends")
        while has_reader(sys.stdout):
            line = input("> " if on_terminal else "").strip()
            if line:
                _answer_line(respondent, line)
    except (EOFError, KeyboardInterrupt):
        _log("bye")


def _answer_line(respondent: Respondent, line: str) -> None:
    try:
        _print(respondent.answer([line])[0].text + "\n")
    except DataError as error:
        _log(str(error))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llamarefine_jobs.infer",
        description="Answer questions with a model of a finished run. Publishes nothing.",
    )
    parser.add_argument("question", nargs="*", metavar="QUESTION")
    parser.add_argument("--recipe", type=Path, required=True, help="the recipe of the run, a YAML file")
    parser.add_argument("--store", required=True, help="file:///folder or s3://bucket/prefix")
    parser.add_argument("--model", choices=NEEDS, default="merged", help="which model answers (default: %(default)s)")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="file with questions: .txt (one a line), .jsonl, .csv or .parquet"
    )
    parser.add_argument("--answers", type=Path, metavar="OUT.jsonl", help="write the answers to this file")
    parser.add_argument(
        "--interactive", action="store_true", help="after that, read questions from standard input until Ctrl-D"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override a key of the recipe; can be repeated"
    )
    return parser


def _lines(path: Path) -> list[str]:
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"--prompts: {path} is not UTF-8 (byte {error.start}); convert it") from None
    if not found:
        raise DataError(f"--prompts: {path} has no question")
    return found


def _progress(done: int, of: int) -> None:
    _log(f"{done} of {of} answered")


def _print(text: str) -> None:
    print(strip_for_stream(text, sys.stdout), flush=True)


def _log(text: str) -> None:
    print(strip_control_characters(f"infer: {text}"), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
