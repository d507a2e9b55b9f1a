"""Evaluation: compare base, base + SFT and the merged model on test rows that no training saw.

    python -m llamarefine_jobs.evaluate --recipe recipe.yaml --store s3://bucket/prefix

Reads base/, the test splits and data_card.json of prepare, adapter/ of sft and model/ of merge. Of dpo it reads only
the manifest: its beta, its curves and its proof. Writes report.html, report.md and report.json. The merged model is
loaded without adapters, as its users will load it. A quality gate that fails is written into the report and does not
fail the stage; the launcher reads the report and ends the run with an error.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from llamarefine_jobs import entry
from llamarefine_jobs.context import Context
from llamarefine_jobs.contract.errors import DivergedError
from llamarefine_jobs.contract.recipe import Evaluate
from llamarefine_jobs.models import adapters, backends
from llamarefine_jobs.models.encoding import (
    Encoded,
    PublishedRow,
    encode_pairs,
    encode_questions,
    load_tokenizer,
    read_rows,
)
from llamarefine_jobs.models.generation import Answer, generate, speed
from llamarefine_jobs.models.scoring import OnBatch, Score, score
from llamarefine_jobs.report import comparison
from llamarefine_jobs.report.metrics import MODELS, ComparedRows, ModelResults, check_gates, compare

Item = TypeVar("Item")


def work(context: Context) -> None:
    """Evaluate the three models and write the report."""
    # Backend.
    backend = backends.inference_backend()
    context.backend, context.accelerator = backend.name, backend.accelerator
    context.note(backends.describe_backend(backend))
    recipe, section = context.recipe, context.recipe.evaluate

    # Data: the test splits, tokenised as in training.
    rows = read_test_rows(context.inputs["prepare"], section)
    tokenizer = load_tokenizer(context.inputs["prepare"] / "base")
    evaluation = Evaluation(context, tokenizer, encode_rows(tokenizer, rows))
    context.note(f"{len(rows.questions)} test questions, {len(rows.answered)} to answer; {len(rows.pairs)} test pairs")

    # Models: one in memory at a time.
    results, types = {}, {}
    for name in MODELS:
        model = load(name, context, backend)
        types[name] = str(model.dtype).removeprefix("torch.")
        results[name] = evaluation.evaluate(name, model)
        del model
        backends.free_memory()

    # Comparison.
    beta = context.parents["dpo"].recipe["dpo"]["beta"]  # of the training that made the adapter
    metrics = compare(results, compared_rows(rows), section, beta=beta, seed=recipe.seed)
    gates = check_gates(section.gates, metrics)
    context.metrics |= {
        "values": {metric["name"]: _values(metric) for metric in metrics},
        "gates_passed": all(gate["passed"] for gate in gates),
    }

    # Report.
    findings = comparison.Findings(
        metrics=metrics,
        gates=gates,
        examples=examples(rows, results, section.shown_examples),
        data_card=json.loads((context.inputs["prepare"] / "data_card.json").read_text(encoding="utf-8")),
        facts=comparison.Facts(
            questions_total=rows.questions_total,
            pairs_total=rows.pairs_total,
            types=types,
            chosen_tokens=[score.tokens for score in results["base"].chosen],
            rejected_tokens=[score.tokens for score in results["base"].rejected],
        ),
    )
    comparison.write(comparison.build(context, findings), context.output)


@dataclass(frozen=True)
class TestSplits:
    """The test questions and pairs that are scored, the questions that the models answer, and how many rows exist."""

    questions: list[PublishedRow]
    answered: list[PublishedRow]
    pairs: list[PublishedRow]
    questions_total: int
    pairs_total: int


@dataclass(frozen=True)
class EncodedRows:
    """The tokens of the rows; `prompts` are the prompts of the answered questions."""

    questions: list[Encoded]
    prompts: list[list[int]]
    chosen: list[Encoded]
    rejected: list[Encoded]


class Evaluation:
    """Scores the same rows with each model, and prints the progress over all models."""

    def __init__(self, context: Context, tokenizer: Any, rows: EncodedRows) -> None:
        self.context, self.tokenizer, self.rows = context, tokenizer, rows
        self.done = 0
        steps_per_model = len(rows.questions) + len(rows.prompts) + len(rows.chosen) + len(rows.rejected)
        self.steps = steps_per_model * len(MODELS)
        self.began_s = self.printed_s = time.monotonic()

    def evaluate(self, name: str, model: Any) -> ModelResults:
        """Score the rows with `model` and generate its answers. Raises DivergedError if a score is not finite."""
        from llamarefine_jobs.models.forward import forward_for  # imports torch and transformers

        forward = forward_for(model, self.tokenizer.pad_token_id)

        def scores(part: str, rows: list[Encoded]) -> list[Score]:
            return check_finite(name, part, score(forward, rows, self._progress_callback(f"{name}:{part}")))

        return ModelResults(
            answers=scores("answers", self.rows.questions),
            chosen=scores("chosen", self.rows.chosen),
            rejected=scores("rejected", self.rows.rejected),
            generated=self._generate(name, model),
        )

    def _generate(self, name: str, model: Any) -> list[Answer]:
        """Return the answers of `model`; log how fast they were generated, and record it in the manifest's metrics."""
        section = self.context.recipe.evaluate
        began_s = time.monotonic()
        answers = generate(
            model,
            self.tokenizer,
            self.rows.prompts,
            max_new_tokens=section.max_new_tokens,
            batch_rows=section.batch_rows,
            on_batch=self._progress_callback(f"{name}:generating"),
        )
        found = speed(answers, time.monotonic() - began_s)
        self.context.note(f"{name} generated {found}")
        self.context.metrics.setdefault("generation", {})[name] = asdict(found)
        return answers

    def _progress_callback(self, phase: str) -> OnBatch:
        before = self.done

        def on_batch(done: int, total: int) -> None:
            self.done = before + done
            now_s = time.monotonic()
            if done == total or now_s - self.printed_s >= 1:
                self.printed_s = now_s
                eta_s = (now_s - self.began_s) / self.done * (self.steps - self.done)
                self.context.progress(self.done, self.steps, phase=phase, eta_s=eta_s)

        return on_batch


def load(name: str, context: Context, backend: backends.Backend) -> Any:
    """Load one of the three models: `base`, `sft` or `merged`."""
    inputs, length = context.inputs, context.recipe.max_length_tokens
    if name == "merged":
        # In the type that the weights were rounded to: a coarser type would round the DPO update away.
        return backend.load(inputs["merge"] / "model", max_length_tokens=length, dtype=merged_dtype(context))
    base = backend.load(inputs["prepare"] / "base", max_length_tokens=length)
    return base if name == "base" else adapters.attach_adapter(base, inputs["sft"] / "adapter")


def merged_dtype(context: Context) -> str:
    """Return the type of the merged model's weights, as the merge recorded it."""
    dtype: str = context.parents["merge"].recipe["merge"]["dtype"]
    return dtype


def read_test_rows(prepared: Path, section: Evaluate) -> TestSplits:
    """Return the test rows; if the recipe limits their number, rows at even distances."""
    questions, pairs = (read_rows(prepared / name, "test") for name in ("questions", "preferences"))
    scored = evenly(questions, section.max_rows)
    return TestSplits(
        questions=scored,
        answered=evenly(scored, section.generated_rows),
        pairs=evenly(pairs, section.max_rows),
        questions_total=len(questions),
        pairs_total=len(pairs),
    )


def evenly(rows: Sequence[Item], count: int | None) -> list[Item]:
    """Return at most `count` of the rows, at even distances; all rows without a count."""
    if count is None or count >= len(rows):
        return list(rows)
    return [rows[index * len(rows) // count] for index in range(count)]


def encode_rows(tokenizer: Any, rows: TestSplits) -> EncodedRows:
    """Tokenise the rows as in training."""
    encoded, pairs = encode_questions(tokenizer, rows.questions), encode_pairs(tokenizer, rows.pairs)
    prompt_of = {id(row): tokens.prompt_ids for row, tokens in zip(rows.questions, encoded, strict=True)}
    return EncodedRows(
        encoded,
        [prompt_of[id(row)] for row in rows.answered],
        [chosen for chosen, _ in pairs],
        [rejected for _, rejected in pairs],
    )


def check_finite(name: str, part: str, scores: list[Score]) -> list[Score]:
    """Return `scores`. Raises DivergedError unless all of them are finite."""
    not_finite = sum(not math.isfinite(score.logprob) for score in scores)
    if not_finite:
        raise DivergedError(
            f"{name} gives no finite log-probability to {not_finite} of {len(scores)} test answers ({part}): "
            "its weights overflow or hold NaN; set merge.dtype to float32, or train at a lower learning rate"
        )
    return scores


def compared_rows(rows: TestSplits) -> ComparedRows:
    """Return the groups that the bootstrap resamples, and the reference answers of the generated ones."""
    return ComparedRows(
        {
            "answers": [row["group"] for row in rows.questions],
            "pairs": [row["group"] for row in rows.pairs],
            "generated": [row["group"] for row in rows.answered],
        },
        [row["messages"][-1]["content"] for row in rows.answered],
    )


def examples(rows: TestSplits, results: dict[str, ModelResults], count: int) -> list[dict[str, Any]]:
    """Return at most `count` questions, at even distances, with the reference answer and each model's answer."""
    return [_example(rows.answered[place], place, results) for place in evenly(range(len(rows.answered)), count)]


def _example(row: PublishedRow, place: int, results: dict[str, ModelResults]) -> dict[str, Any]:
    answers = {name: found.generated[place] for name, found in results.items()}
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
