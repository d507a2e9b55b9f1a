"""What is measured of a model, and how two models compare.

Three sets of held-out rows: answers (what the model makes of the references), pairs (of the chosen
and the rejected answers) and generated (what it answers itself).
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from llamarefine_jobs.contract.recipe import Evaluate, Gate
from llamarefine_jobs.models.scoring import Answer, Score
from llamarefine_jobs.report.intervals import Bootstrap, Estimate, Floats, Interval, Span

MODELS = ("base", "sft", "merged")
CHANGES = (("base", "sft"), ("sft", "merged"), ("base", "merged"))
# What is closer differs by the arithmetic alone: two sums of log-probabilities, two means.
TIE_NATS = 1e-3
_TIE = 1e-5

Set = Literal["answers", "pairs", "generated"]


@dataclass(frozen=True)
class Metric:
    """One line of the comparison. `better` is None where neither more nor less is."""

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
           "counts one half. Base is measured against the same reference; SFT is its own: .5 by definition.", (0, 1)),
    Metric("preference_margin", "Preference margin (reward)", "pairs", "higher", 3,
           "Mean reward of the chosen answer minus that of the rejected one. SFT is its own reference: 0 by "
           "definition."),
    Metric("likelihood_accuracy", "Likelihood accuracy", "pairs", "higher", 3,
           "Share of test pairs whose chosen answer is the likelier one, log p summed over its tokens, without a "
           "reference. A longer answer is at a disadvantage.", (0, 1)),
    Metric("likelihood_margin", "Likelihood margin (nats)", "pairs", "higher", 2,
           "Mean log p of the chosen answer minus that of the rejected one."),
    Metric("token_f1", "Token F1 of generated answers", "generated", "higher", 3,
           "Overlap with the reference in words and punctuation marks, as SQuAD counts it but with case, articles and "
           "punctuation kept: they matter in API names. Overlap is not correctness.", (0, 1)),
    Metric("chrf", "chrF of generated answers (0–100)", "generated", "higher", 1,
           "Overlap in character 6-grams (sacrebleu's chrF2), mean of the answers.", (0, 100)),
    Metric("stop_rate", "Stop rate", "generated", "higher", 3,
           "Share of generated answers that ended by themselves before the limit of new tokens.", (0, 1)),
    Metric("answer_tokens", "Length of generated answers (tokens)", "generated", None, 1,
           "Neither longer nor shorter is better by itself."),
)  # fmt: skip


@dataclass(frozen=True)
class HeldOut:
    """The groups of the rows that are measured, by set, and the references of the generated answers."""

    groups: Mapping[Set, Sequence[str]]
    references: Sequence[str]


@dataclass(frozen=True)
class Measured:
    """What one model made of the held-out rows, in their order."""

    answers: Sequence[Score]
    chosen: Sequence[Score]
    rejected: Sequence[Score]
    generated: Sequence[Answer]

    @cached_property
    def likelihood_margins(self) -> Floats:
        """By pair: log p(chosen) - log p(rejected)."""
        return _logprobs(self.chosen) - _logprobs(self.rejected)


def compare(
    measured: Mapping[str, Measured], held_out: HeldOut, settings: Evaluate, *, beta: float, seed: int
) -> list[dict[str, Any]]:
    """Every metric of every model with its interval, and every change with its verdict, as report.json holds them."""
    bootstraps = {
        name: Bootstrap(groups, resamples=settings.bootstrap_resamples, seed=seed)
        for name, groups in held_out.groups.items()
    }
    estimates = {name: _estimates(rows, measured["sft"], held_out, bootstraps, beta) for name, rows in measured.items()}
    for metric, value in (("preference_accuracy", 0.5), ("preference_margin", 0.0)):
        estimates["sft"][metric] = bootstraps["pairs"].known(value)
    return [
        _line(metric, {model: estimates[model][metric.name] for model in MODELS}, settings.confidence)
        | {"n": len(held_out.groups[metric.over]), "groups": bootstraps[metric.over].groups}
        for metric in METRICS
    ]


def check_gates(gates: Sequence[Gate], metrics: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each bound of each gate against the measured value."""
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
    """F1 of the words and punctuation marks that `text` and `reference` share, case kept; 1 where both are empty."""
    found, expected = _tokens(text), _tokens(reference)
    if not found or not expected:
        return float(found == expected)
    shared = (found & expected).total()
    return 2 * shared / (found.total() + expected.total())


def _tokens(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+|[^\w\s]", text))


def _estimates(
    rows: Measured, sft: Measured, held_out: HeldOut, bootstraps: Mapping[Set, Bootstrap], beta: float
) -> dict[str, Estimate]:
    """One model's estimate of each metric."""
    from sacrebleu.metrics.chrf import CHRF

    chrf = CHRF()
    gains = rows.likelihood_margins - sft.likelihood_margins
    texts = [(answer.text, reference) for answer, reference in zip(rows.generated, held_out.references, strict=True)]
    nats, tokens = -_logprobs(rows.answers), np.array([float(score.tokens) for score in rows.answers])
    numerators = {
        "loss": nats,
        "perplexity": nats,
        "preference_accuracy": _credit(gains),
        "preference_margin": beta * gains,
        "likelihood_accuracy": _credit(rows.likelihood_margins),
        "likelihood_margin": rows.likelihood_margins,
        "token_f1": np.array([token_f1(text, reference) for text, reference in texts]),
        "chrf": np.array([chrf.sentence_score(text, [reference]).score for text, reference in texts]),
        "stop_rate": np.array([float(answer.stopped) for answer in rows.generated]),
        "answer_tokens": np.array([float(answer.tokens) for answer in rows.generated]),
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
    if not change.side or abs(change.value) < _TIE:
        return "no clear change"
    if metric.better is None:
        return "longer" if change.side > 0 else "shorter"
    return "better" if (change.side > 0) == (metric.better == "higher") else "worse"


def _credit(margins: Floats) -> Floats:
    """By pair: 1 for a positive margin in nats, one half for a tie, 0 for a negative one."""
    return (np.sign(np.where(np.abs(margins) < TIE_NATS, 0, margins)) + 1) / 2


def _logprobs(scores: Sequence[Score]) -> Floats:
    return np.array([score.logprob for score in scores])
