"""Answers for prompts, from the base, from base + SFT, or from the merged model of a finished run.

    python -m llamarefine_jobs.infer --recipe recipe.yaml --store s3://bucket/prefix --model merged "Why is …?"

Each question is asked on its own: nothing is remembered from one to the next. Answers go to standard output,
everything else to standard error; with --answers they go to a file, which appears when the last one is there.
Only what the chosen model needs is downloaded. Nothing is published.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamarefine_jobs import entry
from llamarefine_jobs.contract.artifact import short
from llamarefine_jobs.contract.errors import DataError, RecipeError, from_os_error
from llamarefine_jobs.contract.prompt import question
from llamarefine_jobs.contract.recipe import Recipe, Rows
from llamarefine_jobs.contract.stages import STAGES
from llamarefine_jobs.data.reading import read_table
from llamarefine_jobs.models import adapters, backends
from llamarefine_jobs.models.encoding import encode_prompt, load_tokenizer
from llamarefine_jobs.models.scoring import Answer, generate
from llamarefine_jobs.process import sigterm
from llamarefine_jobs.recipe_file import load_recipe
from llamarefine_jobs.sources import pinning
from llamarefine_jobs.store import Store
from llamarefine_jobs.untrusted.control_characters import strip_control_characters, strip_for_stream

NEEDS = {"base": ("prepare",), "sft": ("prepare", "sft"), "merged": ("merge",)}
_STAGE = STAGES["infer"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Answer what the command line asks; ends the process with its exit code where something is wrong."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("TQDM_DISABLE", "1")  # bars of libraries, read when tqdm is imported
    with entry.exit_code("infer"):
        recipe = pinning.pin(load_recipe(options.recipe, options.set), check=False)
        questions = [*options.question, *(read_questions(options.prompts, recipe) if options.prompts else ())]
        if not questions and not options.interactive:
            raise RecipeError("expected a question, --prompts FILE or --interactive, found none of them")
        if options.answers:
            check_writable(options.answers)
        with entry.seeded_threads(recipe), loaded(options.model, recipe, Store(options.store)) as respondent:
            if questions:
                answers = respondent.answer(questions)
                show(questions, answers, options.answers, options.model)
            if options.interactive:
                converse(respondent)


@dataclass(frozen=True)
class Respondent:
    """A model that answers questions as its run's recipe says."""

    model: Any
    tokenizer: Any
    recipe: Recipe

    def answer(self, questions: Sequence[str]) -> list[Answer]:
        """An answer to each question; DataError, one line a question, where some are too long, before any is asked."""
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
            tick=_progress if len(prompts) > section.batch_rows else None,
        )

    def _check_lengths(self, prompts: Sequence[list[int]]) -> None:
        context = self.model.config.max_position_embeddings
        room = context - self.recipe.infer.max_new_tokens
        if too_long := [(place, len(ids)) for place, ids in enumerate(prompts, 1) if len(ids) > room]:
            raise DataError(
                "\n".join(
                    f"question {place} has {tokens} tokens and its answer up to {self.recipe.infer.max_new_tokens}, "
                    f"together more than the model's {context}; shorten it, or lower infer.max_new_tokens"
                    for place, tokens in too_long
                )
            )


@contextlib.contextmanager
def loaded(name: str, recipe: Recipe, store: Store) -> Iterator[Respondent]:
    """The model `name` of a run, downloaded into a folder that is removed afterwards."""
    parents = entry.find_parents("infer", recipe, store, NEEDS[name])
    # Before anything imports transformers or peft.
    backend = backends.choose_backend()
    _say(backends.describe(backend))
    with tempfile.TemporaryDirectory(prefix="llamarefine-infer-", dir=os.environ.get("LLAMAREFINE_WORK")) as folder:
        sigterm.STOP.cleanup_folder = Path(folder)
        inputs = entry.fetch_inputs(_STAGE, parents, store, Path(folder))
        _say(f"{name}, from " + ", ".join(f"{stage} {short(parent.key)}" for stage, parent in parents.items()))
        base = inputs["merge"] / "model" if name == "merged" else inputs["prepare"] / "base"
        # The merged model in the type it was rounded to, as it was evaluated: a coarser one rounds the DPO update away.
        model = backend.load(base, dtype=recipe.merge.dtype if name == "merged" else None)
        if name == "sft":
            model = adapters.attach_adapter(model, inputs["sft"] / "adapter")
        yield Respondent(model, load_tokenizer(base), recipe)


def read_questions(path: Path, recipe: Recipe) -> list[str]:
    """The questions of a file: the lines of .txt, else the column `prompt` or the one of the recipe's questions."""
    if path.suffix.lower() == ".txt":
        return _lines(path)
    columns = tuple(dict.fromkeys(("prompt", recipe.prepare.questions.question_column)))
    table = read_table(Rows(source=str(path.absolute())), "--prompts", path.parent, columns, optional=columns)
    if not set(columns) & set(table.columns):
        raise DataError(
            f"--prompts: {path} has no column {' or '.join(columns)}, only {', '.join(table.columns)}; rename one"
        )
    asked: list[str] = []
    for number, cells in enumerate(table.rows, 1):
        text = next((cell for cell in cells or () if cell), None)
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"--prompts: {path}: row {number} holds no question; expected text, found {text!r:.60}")
        asked.append(text)
    return asked


def check_writable(path: Path) -> None:
    """Raise before the work where its result could not be written."""
    if path.is_dir():
        raise DataError(f"{path}: is a folder; name a file for the answers")
    if not path.absolute().parent.is_dir():
        raise DataError(f"{path}: there is no folder {path.parent}; make it first")
    if not os.access(path.absolute().parent, os.W_OK):
        raise from_os_error(PermissionError(13, "Permission denied", str(path)))


def show(questions: Sequence[str], answers: Sequence[Answer], into: Path | None, model: str) -> None:
    """Print the answers, each below its question where there are several; or write them as rows of a file."""
    if into:
        write_answers(into, questions, answers, model)
        _say(f"{len(answers)} answers in {into}")
        return
    for asked, answer in zip(questions, answers, strict=True):
        _print(f"> {asked}\n{answer.text}\n" if len(questions) > 1 else answer.text)
    if cut := sum(not answer.stopped for answer in answers):
        _say(f"{cut} of {len(answers)} answers were cut at infer.max_new_tokens")


def write_answers(path: Path, questions: Sequence[str], answers: Sequence[Answer], model: str) -> None:
    """All rows or none: written beside `path`, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            for asked, said in zip(questions, answers, strict=True):
                row = {
                    "prompt": asked,
                    "answer": said.text,
                    "tokens": said.tokens,
                    "stopped": said.stopped,
                    "model": model,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def converse(respondent: Respondent) -> None:
    """Answer one line after the other until the input ends. Each line is a question of its own."""
    at_a_screen = sys.stdin.isatty() and sys.stdout.isatty()
    if at_a_screen:
        import readline  # noqa: F401  (gives `input` its line editing and history)
    try:
        _say("one question a line, each on its own; Ctrl-D ends")
        while True:
            line = input("> " if at_a_screen else "").strip()
            if line:
                _converse_once(respondent, line)
    except (EOFError, KeyboardInterrupt):
        _say("bye")


def _converse_once(respondent: Respondent, line: str) -> None:
    try:
        _print(respondent.answer([line])[0].text + "\n")
    except DataError as error:
        _say(str(error))


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
        "--prompts", type=Path, metavar="FILE", help="questions: .txt (one a line), .jsonl, .csv or .parquet"
    )
    parser.add_argument("--answers", type=Path, metavar="OUT.jsonl", help="write the answers here, not to the screen")
    parser.add_argument("--interactive", action="store_true", help="then read questions, one a line, until Ctrl-D")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="on top of the recipe; may repeat"
    )
    return parser


def _lines(path: Path) -> list[str]:
    try:
        found = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"--prompts: {path} is not UTF-8 (byte {error.start}); convert it") from None
    if not found:
        raise DataError(f"--prompts: {path} holds no question")
    return found


def _progress(done: int, of: int) -> None:
    _say(f"{done} of {of} answered")


def _print(text: str) -> None:
    print(strip_for_stream(text, sys.stdout), flush=True)


def _say(text: str) -> None:
    print(strip_control_characters(f"infer: {text}"), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
