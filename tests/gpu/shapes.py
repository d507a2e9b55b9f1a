"""What prepare leaves, at a tiny shape and at TinyLlama's: random weights of the right shape, real text."""

import csv
import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.jobs import tiny

HOW = "LLAMAREFINE_GPU_TESTS"  # without a card: cpu, or interpreter
INTERPRETED = os.environ.get(HOW) == "interpreter"
_AT_THE_END = ("sft.evaluate_every_steps=50", "dpo.evaluate_every_steps=50")
CSV = "LLAMAREFINE_GPU_CSV"  # questions and answers, in columns of these names; else Python's docstrings


@dataclass(frozen=True)
class Shape:
    """A model's shape, and a training of it that is long enough to tell right from wrong."""

    name: str
    vocabulary: int
    config: dict[str, Any]
    rows: int
    settings: tuple[str, ...] = ()
    needs_cuda: bool = True


TINY = Shape(
    "tiny",
    vocabulary=400,
    # Heads of 64, as the fast kernels want them.
    config={"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1},
    rows=20 if INTERPRETED else 80,
    settings=("max_length_tokens=1024", *(_AT_THE_END if INTERPRETED else ())),
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
    """So many questions with answers, or all there are: of the CSV that the environment names, else of docstrings.

    The interpreter takes milliseconds for a token, and gets short ones.
    """
    from llamarefine_jobs.data.docstrings import question_rows

    if INTERPRETED:
        return [(f"what is {number}", f"it is {number}") for number in range(count)]
    if path := os.environ.get(CSV):
        with Path(path).open(encoding="utf-8", newline="") as file:
            rows = [(row["question"], row["answer"]) for row in csv.DictReader(file)]
        return [row for row in rows if all(row)][:count]
    return list(itertools.islice(question_rows(), count))


def write_prepared(folder: Path, shape: Shape, rows: list[tuple[str, str]]) -> Path:
    """base/, questions/ and preferences/: of eight rows one validates and one tests."""
    import torch

    texts = [f"<|user|>\n{asked}\n<|assistant|>\n{said}" for asked, said in rows]  # as the template writes them
    tokenizer = tiny.make_tokenizer(texts, shape.vocabulary)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = tiny.make_model(shape.vocabulary, **shape.config)
    dtype = torch.bfloat16 if shape.needs_cuda else torch.float32
    model.to(dtype).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    held_out = max(2, len(rows) // 8)
    splits = {"validation": rows[:held_out], "test": rows[held_out : 2 * held_out], "train": rows[2 * held_out :]}
    tiny.write_splits(folder, splits)
    return folder
