"""Compute how many tokens a padded training processes per token of its rows: in random order, and sorted by length.

    PYTHONPATH=. python tests/bench/padding.py [--questions rows.csv] [--preferences pairs.jsonl] [--batch-rows 16]

Sorted by length, the rows of a step go from the longest to the shortest. Lengths are counted in characters without the
template; ratios of lengths are nearly the same in tokens. Without files, the rows are Python's docstrings. The row
orders are those of five epochs with seed 0.
"""

import argparse
import csv
import json
from pathlib import Path

from llamarefine_jobs.data.docstrings import question_rows
from llamarefine_jobs.training.batches import WholeBatches

_EPOCHS = 5


def main() -> None:
    options = _options()
    questions = list(question_rows())
    if options.questions:
        with options.questions.open(encoding="utf-8", newline="") as file:
            questions = [(row["question"], row["answer"]) for row in csv.DictReader(file)]
    pairs = [(question, answer, " ".join(answer.split()[::-1])) for question, answer in questions]
    if options.preferences:
        lines = options.preferences.read_text(encoding="utf-8").splitlines()
        pairs = [(row["prompt"], row["chosen"], row["rejected"]) for row in map(json.loads, lines)]
    sft = [(len(question) + len(answer),) for question, answer in questions]
    dpo = [(len(prompt) + len(chosen), len(prompt) + len(rejected)) for prompt, chosen, rejected in pairs]
    print("| micro_batch_rows | DPO, random | DPO, by length | SFT, random | SFT, by length |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    micro_rows = options.batch_rows
    while micro_rows > 1:
        cells = [
            processed_per_token(rows, options.batch_rows, micro_rows, by_length)
            for rows in (dpo, sft)
            for by_length in (False, True)
        ]
        print(f"| {micro_rows} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
        micro_rows //= 2


def processed_per_token(rows: list[tuple[int, ...]], batch_rows: int, micro_rows: int, by_length: bool) -> float:
    """Return the tokens processed per token of `rows`.

    A row holds the lengths of its sequences; all sequences of a micro-batch are padded to the longest one.
    """
    longest = [max(row) for row in rows]
    processed = needed = 0
    for epoch in range(_EPOCHS):
        order = list(WholeBatches(len(rows), batch_rows, 0, lambda epoch=epoch: epoch, longest if by_length else None))
        for start in range(0, len(order), micro_rows):
            micro = order[start : start + micro_rows]
            processed += max(longest[row] for row in micro) * sum(len(rows[row]) for row in micro)
            needed += sum(sum(rows[row]) for row in micro)
    return processed / needed


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=Path, help="CSV with the columns question and answer")
    parser.add_argument("--preferences", type=Path, help="JSON lines with prompt, chosen and rejected")
    parser.add_argument("--batch-rows", type=int, default=16)
    return parser.parse_args()


if __name__ == "__main__":
    main()
