"""Evaluation: base, base + SFT and merged, side by side on rows that no training saw.

    python -m llamarefine_jobs.evaluate --recipe recipe.yaml --store s3://bucket/prefix

Reads prepare's test splits and base/, sft's adapter/ and merge's model/; writes report.html,
report.md and report.json. The merged model is loaded alone, as its users will load it. A gate that
fails is written into the report and does not fail the stage: whoever runs it reads it there.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llamarefine_jobs import entry
from llamarefine_jobs.context import Context
from llamarefine_jobs.contract.errors import DivergedError
from llamarefine_jobs.contract.recipe import Evaluate
from llamarefine_jobs.models import adapters, backends
from llamarefine_jobs.models.encoding import Encoded, Row, encode_pairs, encode_questions, load_tokenizer, read_rows
from llamarefine_jobs.models.scoring import Score, Tick, generate, score
from llamarefine_jobs.report import comparison
from llamarefine_jobs.report.metrics import MODELS, HeldOut, Measured, check_gates, compare

Item = TypeVar("Item")


def work(context: Context) -> None:
    """Measure the three models and write the report."""
    # Backend: before anything imports trl, transformers or peft.
    backend = backends.choose_backend()
    context.backend, context.accelerator = backend.name, backend.accelerator
    context.note(backends.describe(backend))
    recipe, section = context.recipe, context.recipe.evaluate

    # Data: the test splits, tokenised as in training.
    rows = read_test_rows(context.inputs["prepare"], section)
    tokenizer = load_tokenizer(context.inputs["prepare"] / "base")
    examinee = Examinee(context, tokenizer, encode_rows(tokenizer, rows))
    context.note(f"{len(rows.questions)} test questions, {len(rows.asked)} to answer; {len(rows.pairs)} test pairs")

    # Models: one in memory at a time.
    measured, types = {}, {}
    for name in MODELS:
        model = load(name, context, backend)
        types[name] = str(model.dtype).removeprefix("torch.")
        measured[name] = examinee.measure(name, model)
        del model
        backends.free_memory()

    # Comparison.
    metrics = compare(measured, held_out(rows), section, beta=recipe.dpo.beta, seed=recipe.seed)
    gates = check_gates(section.gates, metrics)
    context.metrics |= {
        "values": {metric["name"]: _values(metric) for metric in metrics},
        "gates_passed": all(gate["passed"] for gate in gates),
    }

    # Report.
    findings = comparison.Findings(
        metrics=metrics,
        gates=gates,
        examples=examples(rows, measured, section.shown_examples),
        data_card=json.loads((context.inputs["prepare"] / "data_card.json").read_text(encoding="utf-8")),
        facts=comparison.Facts(
            questions_there=rows.questions_there,
            pairs_there=rows.pairs_there,
            types=types,
            chosen_tokens=[score.tokens for score in measured["base"].chosen],
            rejected_tokens=[score.tokens for score in measured["base"].rejected],
        ),
    )
    comparison.write(comparison.build(context, findings), context.output)


@dataclass(frozen=True)
class Rows:
    """What is measured: test questions, those of them that are answered, test pairs; and how many there were."""

    questions: list[Row]
    asked: list[Row]
    pairs: list[Row]
    questions_there: int
    pairs_there: int


@dataclass(frozen=True)
class EncodedRows:
    """The tokens of the rows; `prompts` are those of the questions that are answered."""

    questions: list[Encoded]
    prompts: list[list[int]]
    chosen: list[Encoded]
    rejected: list[Encoded]


class Examinee:
    """The examination that every model takes, with its progress."""

    def __init__(self, context: Context, tokenizer: Any, rows: EncodedRows) -> None:
        self.context, self.tokenizer, self.rows = context, tokenizer, rows
        self.done = 0
        a_model = len(rows.questions) + len(rows.prompts) + len(rows.chosen) + len(rows.rejected)
        self.steps = a_model * len(MODELS)
        self.began_s = self.told_s = time.monotonic()

    def measure(self, name: str, model: Any) -> Measured:
        """What `model` makes of the rows; DivergedError where it gives no number."""
        batch_rows, pad_id = self.context.recipe.evaluate.batch_rows, self.tokenizer.pad_token_id

        def scores(of: str, rows: list[Encoded]) -> list[Score]:
            return finite(name, of, score(model, pad_id, rows, batch_rows, self._ticker(f"{name}:{of}")))

        return Measured(
            answers=scores("answers", self.rows.questions),
            chosen=scores("chosen", self.rows.chosen),
            rejected=scores("rejected", self.rows.rejected),
            generated=generate(
                model,
                self.tokenizer,
                self.rows.prompts,
                max_new_tokens=self.context.recipe.evaluate.max_new_tokens,
                batch_rows=batch_rows,
                tick=self._ticker(f"{name}:generating"),
            ),
        )

    def _ticker(self, phase: str) -> Tick:
        before = self.done

        def tick(done: int, of: int) -> None:
            self.done = before + done
            now_s = time.monotonic()
            if done == of or now_s - self.told_s >= 1:
                self.told_s = now_s
                eta_s = (now_s - self.began_s) / self.done * (self.steps - self.done)
                self.context.progress(self.done, self.steps, phase=phase, eta_s=eta_s)

        return tick


def load(name: str, context: Context, backend: backends.Backend) -> Any:
    """One of the three models, ready to be measured."""
    inputs, length = context.inputs, context.recipe.max_length_tokens
    if name == "merged":
        # In the type it was rounded to: a coarser one would round the DPO update away.
        return backend.load(inputs["merge"] / "model", max_length_tokens=length, dtype=context.recipe.merge.dtype)
    base = backend.load(inputs["prepare"] / "base", max_length_tokens=length)
    return base if name == "base" else adapters.attach_adapter(base, inputs["sft"] / "adapter")


def read_test_rows(prepared: Path, section: Evaluate) -> Rows:
    """The test rows, taken evenly where the recipe bounds them."""
    questions, pairs = (read_rows(prepared / name, "test") for name in ("questions", "preferences"))
    measured, compared = evenly(questions, section.max_rows), evenly(pairs, section.max_rows)
    return Rows(measured, evenly(measured, section.generated_rows), compared, len(questions), len(pairs))


def evenly(rows: Sequence[Item], count: int | None) -> list[Item]:
    """At most `count` of the rows, at even distances; all without a count."""
    if count is None or count >= len(rows):
        return list(rows)
    return [rows[index * len(rows) // count] for index in range(count)]


def encode_rows(tokenizer: Any, rows: Rows) -> EncodedRows:
    """The tokens of what is measured."""
    encoded, pairs = encode_questions(tokenizer, rows.questions), encode_pairs(tokenizer, rows.pairs)
    prompt_of = {id(row): tokens.prompt_ids for row, tokens in zip(rows.questions, encoded, strict=True)}
    return EncodedRows(
        encoded,
        [prompt_of[id(row)] for row in rows.asked],
        [chosen for chosen, _ in pairs],
        [rejected for _, rejected in pairs],
    )


def finite(name: str, of: str, scores: list[Score]) -> list[Score]:
    """`scores`, all of them finite; DivergedError otherwise."""
    lost = sum(not math.isfinite(score.logprob) for score in scores)
    if lost:
        raise DivergedError(
            f"{name} gives no finite log-probability to {lost} of {len(scores)} test answers ({of}): "
            "its weights overflow or hold NaN; set merge.dtype to float32, or train at a lower learning rate"
        )
    return scores


def held_out(rows: Rows) -> HeldOut:
    """The groups that intervals are drawn over, and the references of the generated answers."""
    return HeldOut(
        {
            "answers": [row["group"] for row in rows.questions],
            "pairs": [row["group"] for row in rows.pairs],
            "generated": [row["group"] for row in rows.asked],
        },
        [row["messages"][-1]["content"] for row in rows.asked],
    )


def examples(rows: Rows, measured: dict[str, Measured], count: int) -> list[dict[str, Any]]:
    """Questions with their references and what each model answered."""
    return [_example(rows.asked[place], place, measured) for place in evenly(range(len(rows.asked)), count)]


def _example(row: Row, place: int, measured: dict[str, Measured]) -> dict[str, Any]:
    answers = {name: results.generated[place] for name, results in measured.items()}
    return {
        "question": row["messages"][-2]["content"],
        "reference": row["messages"][-1]["content"],
        "answers": {name: answer.text for name, answer in answers.items()},
        "stopped": {name: answer.stopped for name, answer in answers.items()},
    }


def _values(metric: dict[str, Any]) -> dict[str, float]:
    return {name: found["value"] for name, found in metric["values"].items()}


if __name__ == "__main__":
    entry.main("evaluate", work)
