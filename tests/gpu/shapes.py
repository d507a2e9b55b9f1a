"""Prepare artifacts of a tiny shape and of TinyLlama's shape, with random weights and real text."""

import csv
import itertools
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.jobs import tiny

HOW = "LLAMAREFINE_GPU_TESTS"  # cpu or interpreter: run the tests without a card
INTERPRETED = os.environ.get(HOW) == "interpreter"
_VALIDATE_ONCE = ("sft.evaluate_every_steps=50", "dpo.evaluate_every_steps=50")
BACKEND = os.environ.get("LLAMAREFINE_GPU_BACKEND", "packed")  # the recipe's sft.backend and dpo.backend in all tests
FOLDER = "LLAMAREFINE_GPU_FOLDER"  # where tests/gpu/run keeps the prepared artifacts that all its parts share
CSV = "LLAMAREFINE_GPU_CSV"  # path of a CSV with the columns question and answer; default: Python's docstrings


@dataclass(frozen=True)
class Shape:
    """The shape of a model, and the rows and overrides of a training that is long enough to show whether it works."""

    name: str
    vocabulary: int
    config: dict[str, Any]
    rows: int
    settings: tuple[str, ...] = ()
    needs_cuda: bool = True


TINY = Shape(
    "tiny",
    vocabulary=400,
    # 64 dimensions per head, which the fast kernels need.
    config={"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1},
    rows=20 if INTERPRETED else 80,
    settings=("max_length_tokens=1024", *(_VALIDATE_ONCE if INTERPRETED else ())),
    needs_cuda=False,
)
TINYLLAMA = Shape(
    "tinyllama",
    vocabulary=32_000,
    config={
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
    },
    rows=400,
    settings=("max_length_tokens=1024", "sft.learning_rate=0.0005", "dpo.learning_rate=0.0002"),
)
SHAPES = {shape.name: shape for shape in (TINY, TINYLLAMA)}


def read_rows(count: int) -> list[tuple[str, str]]:
    """Return up to `count` questions with answers, from the CSV that the environment names or else from docstrings.

    For the interpreter, which takes milliseconds per token, they are short made-up ones.
    """
    from llamarefine_jobs.data.docstrings import question_rows

    if INTERPRETED:
        return [(f"what is {number}", f"it is {number}") for number in range(count)]
    if path := os.environ.get(CSV):
        with Path(path).open(encoding="utf-8", newline="") as file:
            rows = [(row["question"], row["answer"]) for row in csv.DictReader(file)]
        return [row for row in rows if all(row)][:count]
    return list(itertools.islice(question_rows(), count))


def prepared_folder(shape: Shape, folder: Path) -> Path:
    """Return a folder with a prepare artifact of this shape: a shared one that exists already, or else a new one.

    The shared ones are in the folder that the environment variable FOLDER names.
    """
    name = f"{shape.name}-{shape.rows}"
    shared = Path(os.environ[FOLDER]) if FOLDER in os.environ else folder
    if (shared / name).exists():
        return shared / name
    shared.mkdir(parents=True, exist_ok=True)
    written = write_prepared(Path(tempfile.mkdtemp(dir=shared)), shape, read_rows(shape.rows))
    try:
        written.rename(shared / name)
    except OSError:  # another process was faster
        shutil.rmtree(written)
    return shared / name


def write_prepared(
    folder: Path, shape: Shape, rows: list[tuple[str, str]], *, validation: float = 1 / 8, test: float = 1 / 8
) -> Path:
    """Write base/, questions/ and preferences/, with these fractions of the rows for validation and for the test."""
    import torch

    texts = [f"<|user|>\n{question}\n<|assistant|>\n{answer}" for question, answer in rows]  # as in the chat template
    tokenizer = tiny.make_tokenizer(texts, shape.vocabulary)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = tiny.make_model(shape.vocabulary, **shape.config)
    dtype = torch.bfloat16 if shape.needs_cuda else torch.float32
    model.to(dtype).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    validated, tested = (max(2, round(len(rows) * fraction)) for fraction in (validation, test))
    held_out = validated + tested
    splits = {"validation": rows[:validated], "test": rows[validated:held_out], "train": rows[held_out:]}
    tiny.write_splits(folder, splits)
    return folder
