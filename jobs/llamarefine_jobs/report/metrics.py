"""The metrics of the report: their values for each model, and the changes between two models.

There are three sets of test rows: answers (log-probabilities of the reference answers), pairs (log-probabilities of
the chosen and the rejected answers) and generated (answers that the model generates).
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from llamarefine_jobs.contract.recipe import Evaluate, Gate
from llamarefine_jobs.models.generation import Answer
from llamarefine_jobs.models.scoring import Score
from llamarefine_jobs.report.intervals import Bootstrap, Estimate, Floats, Interval, Span
from llamarefine_jobs.report.preference import accuracy_credit, likelihood_margins, preference

MODELS = ("base", "sft", "merged")
CHANGES = (("base", "sft"), ("sft", "merged"), ("base", "merged"))
_ROUNDING = 1e-5  # a smaller difference of two means of fp32 log-probabilities is rounding

Set = Literal["answers", "pairs", "generated"]


@dataclass(frozen=True)
class Metric:
    """One line of the comparison. `better` is None if neither a lower nor a higher value is better."""

    name: str
    title: str
    over: Set
    better: Literal["lower", "higher"] | None
    digits: int
    note: str
    span: Span | None = None


METRICS = (
    Metric("loss", "Held-out loss (nats per token)", "answers", "lower", 3,
           "Mean negative log-likelihood of the reference answers' tokens, EOS included, prompts excluded."),
    Metric("perplexity", "Held-out perplexity", "answers", "lower", 2, "The exponential of the loss."),
    Metric("preference_accuracy", "Preference accuracy", "pairs", "higher", 3,
           "Share of test pairs whose chosen answer has the higher reward, beta · (log p − log p under SFT); a tie "
           "counts one half. Base and merged are compared with base + SFT, which is its own reference: 0.5 by "
           "definition.", (0, 1)),
    Metric("preference_margin", "Preference margin (reward)", "pairs", "higher", 3,
           "Mean reward of the chosen answer minus the reward of the rejected answer. Base + SFT is its own "
           "reference: 0 by definition."),
    Metric("likelihood_accuracy", "Likelihood accuracy", "pairs", "higher", 3,
           "Share of test pairs whose chosen answer has the higher log p, summed over its tokens; this needs no "
           "reference model. A longer answer is at a disadvantage.", (0, 1)),
    Metric("likelihood_margin", "Likelihood margin (nats)", "pairs", "higher", 2,
           "Mean log p of the chosen answer minus log p of the rejected answer."),
    Metric("token_f1", "Token F1 of generated answers", "generated", "higher", 3,
           "Overlap with the reference answer in words and punctuation marks, counted as SQuAD does, but case, "
           "articles and punctuation count too, because they matter in API names. Overlap is not correctness.", (0, 1)),
    Metric("chrf", "chrF of generated answers (0–100)", "generated", "higher", 1,
           "Overlap with the reference answer in runs of up to 6 characters (sacrebleu's chrF2), mean over answers.",
           (0, 100)),
    Metric("stop_rate", "Stop rate", "generated", "higher", 3,
           "Share of generated answers that ended with EOS before the limit of new tokens.", (0, 1)),
    Metric("answer_tokens", "Length of generated answers (tokens)", "generated", None, 1,
           "Neither longer nor shorter is better by itself."),
)  # fmt: skip


@dataclass(frozen=True)
class ComparedRows:
    """The groups of the test rows, by set, and the reference answers of the generated ones."""

    groups: Mapping[Set, Sequence[str]]
    references: Sequence[str]


@dataclass(frozen=True)
class ModelResults:
    """The results of one model on the test rows, in the order of the rows."""

    answers: Sequence[Score]
    chosen: Sequence[Score]
    rejected: Sequence[Score]
    generated: Sequence[Answer]

    @cached_property
    def likelihood_margins(self) -> Floats:
        """log p(chosen) - log p(rejected) of each pair."""
        return likelihood_margins(self.chosen, self.rejected)


def compare(
    results: Mapping[str, ModelResults], rows: ComparedRows, settings: Evaluate, *, beta: float, seed: int
) -> list[dict[str, Any]]:
    """Return every metric with each model's value and interval, and each change with its verdict, as in report.json."""
    bootstraps = {
        name: Bootstrap(groups, resamples=settings.bootstrap_resamples, seed=seed)
        for name, groups in rows.groups.items()
    }
    estimates = {name: _estimates(model, results["sft"], rows, bootstraps, beta) for name, model in results.items()}
    for metric, value in (("preference_accuracy", 0.5), ("preference_margin", 0.0)):
        estimates["sft"][metric] = bootstraps["pairs"].known(value)
    return [
        _line(metric, {model: estimates[model][metric.name] for model in MODELS}, settings.confidence)
        | {"n": len(rows.groups[metric.over]), "groups": bootstraps[metric.over].groups}
        for metric in METRICS
    ]


def check_gates(gates: Sequence[Gate], metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Compare each bound of each gate with the measured value; return one entry for each bound."""
    values = {metric["name"]: metric["values"] for metric in metrics}
    checked = []
    for gate in gates:
        value = values[gate.metric][gate.model]["value"]
        for word, bound, passed in (
            ("at_least", gate.at_least, value >= (gate.at_least or 0)),
            ("at_most", gate.at_most, value <= (gate.at_most or 0)),
        ):
            if bound is not None:
                named = {"metric": gate.metric, "model": gate.model, "bound": f"{word} {bound}"}
                checked.append({**named, "value": value, "passed": passed})
    return checked


def token_f1(text: str, reference: str) -> float:
    """Return the F1 of the words and punctuation marks in `text` and `reference`, case kept; 1 if both are empty."""
    found, expected = _tokens(text), _tokens(reference)
    if not found or not expected:
        return float(found == expected)
    shared = (found & expected).total()
    return 2 * shared / (found.total() + expected.total())


def _tokens(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+|[^\w\s]", text))


def _estimates(
    model: ModelResults, sft: ModelResults, rows: ComparedRows, bootstraps: Mapping[Set, Bootstrap], beta: float
) -> dict[str, Estimate]:
    """Return the estimate of each metric for one model."""
    from sacrebleu.metrics.chrf import CHRF

    chrf = CHRF()
    preferred = preference(model.likelihood_margins, sft.likelihood_margins, beta)
    texts = [(answer.text, reference) for answer, reference in zip(model.generated, rows.references, strict=True)]
    nats = np.array([-score.logprob for score in model.answers])
    tokens = np.array([float(score.tokens) for score in model.answers])
    numerators = {
        "loss": nats,
        "perplexity": nats,
        "preference_accuracy": preferred.credit,
        "preference_margin": preferred.reward_margin,
        "likelihood_accuracy": accuracy_credit(model.likelihood_margins),
        "likelihood_margin": model.likelihood_margins,
        "token_f1": np.array([token_f1(text, reference) for text, reference in texts]),
        "chrf": np.array([chrf.sentence_score(text, [reference]).score for text, reference in texts]),
        "stop_rate": np.array([float(answer.stopped) for answer in model.generated]),
        "answer_tokens": np.array([float(answer.tokens) for answer in model.generated]),
    }
    estimates = {}
    for metric in METRICS:
        values = numerators[metric.name]
        denominators = tokens if metric.over == "answers" else np.ones(len(values))
        estimates[metric.name] = bootstraps[metric.over].ratio(values, denominators, metric.span)
    estimates["perplexity"] = estimates["loss"].map(np.exp)
    return estimates


def _line(metric: Metric, estimates: Mapping[str, Estimate], confidence: float) -> dict[str, Any]:
    changes = []
    for before, after in CHANGES:
        change = (estimates[after] - estimates[before]).interval(confidence)
        changes.append({"from": before, "to": after, **asdict(change), "verdict": _verdict(metric, change)})
    return {
        "name": metric.name,
        "title": metric.title,
        "over": metric.over,
        "better": metric.better,
        "digits": metric.digits,
        "values": {model: asdict(estimate.interval(confidence)) for model, estimate in estimates.items()},
        "changes": changes,
        "note": metric.note,
    }


def _verdict(metric: Metric, change: Interval) -> str:
    if not change.side or abs(change.value) < _ROUNDING:
        return "no clear change"
    if metric.better is None:
        return "longer" if change.side > 0 else "shorter"
    return "better" if (change.side > 0) == (metric.better == "higher") else "worse"
