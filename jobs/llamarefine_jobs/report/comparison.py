"""The report as data: what was found, in which words, from which artifacts; page.py draws it."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llamarefine_jobs.context import Context
from llamarefine_jobs.contract.artifact import Manifest
from llamarefine_jobs.contract.prompt import CHAT_TEMPLATE, TEMPLATE_SHA256
from llamarefine_jobs.contract.version import __version__
from llamarefine_jobs.report import page
from llamarefine_jobs.report.metrics import CHANGES, MODELS

_FEW_GROUPS = 30
_LENGTH_TELLS = 0.6  # share of pairs that length alone decides, from which it is worth a word
_TYPE_BITS = {"bfloat16": 8, "float16": 11, "float32": 24}  # of the significand


@dataclass(frozen=True)
class Facts:
    """What the caveats need to know of the evaluation."""

    questions_there: int
    pairs_there: int
    types: Mapping[str, str]
    chosen_tokens: Sequence[int]
    rejected_tokens: Sequence[int]


@dataclass(frozen=True)
class Findings:
    """What the evaluation found: lists as report.json holds them."""

    metrics: list[dict[str, Any]]
    gates: list[dict[str, Any]]
    examples: list[dict[str, Any]]
    data_card: dict[str, Any]
    facts: Facts


def build(context: Context, findings: Findings) -> dict[str, Any]:
    """The whole report as plain JSON values."""
    recipe, parents = context.recipe, context.parents
    return {
        "format": 1,
        "name": recipe.name,
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "verdict": judge(findings.metrics, recipe.evaluate.confidence),
        "models": list(MODELS),
        "metrics": findings.metrics,
        "confidence": recipe.evaluate.confidence,
        "bootstrap_resamples": recipe.evaluate.bootstrap_resamples,
        "caveats": find_caveats(context, findings),
        "gates": findings.gates,
        "examples": findings.examples,
        "data": findings.data_card,
        "curves": {name: parents[name].metrics.get("history", []) for name in ("sft", "dpo")},
        "best_step": {name: parents[name].metrics.get("best_step") for name in ("sft", "dpo")},
        "proofs": {
            "dpo": parents["dpo"].metrics.get("step_zero", {}),
            "merge": parents["merge"].metrics.get("proof", {}),
        },
        "stages": [*(_stage_line(parent) for parent in parents.values()), _own_stage_line(context)],
        "lineage": [*(_lineage_line(parent) for parent in parents.values()), _own_lineage_line(context)],
        "recipe": recipe.model_dump(mode="json"),
        "prompt_template": CHAT_TEMPLATE,
        "prompt_template_sha256": TEMPLATE_SHA256,
        "store": context.store.uri,
        "package_version": __version__,
    }


def write(report: Mapping[str, Any], folder: Path) -> None:
    """Write report.json, report.md and report.html."""
    text = json.dumps(report, indent=1, allow_nan=False)
    (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    for name, render in (("report.md", page.markdown), ("report.html", page.html)):
        # A lone surrogate is in no file that prepare wrote, but the page must not depend on it.
        (folder / name).write_bytes(render(report).encode("utf-8", "replace"))


def judge(metrics: Sequence[Mapping[str, Any]], confidence: float) -> dict[str, str]:
    """The verdict in one sentence, and what to think of it."""
    by_name = {metric["name"]: metric for metric in metrics}
    loss, accuracy = by_name["loss"], by_name["preference_accuracy"]
    sft, dpo = _change(loss, "base", "sft"), _change(accuracy, "sft", "merged")
    clear = [change["verdict"] != "no clear change" for change in (sft, dpo)]
    joint = "and" if sft["verdict"] == dpo["verdict"] else "but"
    sentence = (
        f"SFT {_effect(loss, sft, 'the held-out loss', ' nats per token')}, "
        f"{joint} DPO {_effect(accuracy, dpo, 'preference accuracy')}."
    )
    level = f"at {confidence * 100:g}% confidence"
    if all(clear):
        detail = f"Both changes are larger than the choice of test rows explains, {level}."
    elif any(clear):
        detail = f"The {'second' if clear[0] else 'first'} is no better than noise {level}."
    else:
        detail = f"Neither is better than noise {level}: this run shows no improvement."
    cost = _change(loss, "sft", "merged")
    if cost["verdict"] != "no clear change":
        word = "cost" if cost["verdict"] == "worse" else "gained"
        detail += f" DPO also {word} {abs(cost['value']):.3f} nats per token of held-out loss."
    if _change(loss, "base", "merged")["verdict"] == "worse":
        detail += " The merged model predicts the reference answers worse than the base does."
    return {"sentence": sentence, "detail": detail}


def _effect(metric: Mapping[str, Any], change: Mapping[str, Any], what: str, unit: str = "") -> str:
    values = [metric["values"][change[end]]["value"] for end in ("from", "to")]
    digits = 2 if round(values[0], 2) != round(values[1], 2) else 4
    before, after = (f"{value:.{digits}f}" for value in values)
    if change["verdict"] == "no clear change":
        return f"did not clearly change {what} ({before} before, {after}{unit} after)"
    return f"{'raised' if change['value'] > 0 else 'lowered'} {what} from {before} to {after}{unit}"


def find_caveats(context: Context, findings: Findings) -> list[str]:
    """What a reader must know before believing the numbers; each holds for this very run."""
    recipe, facts = context.recipe, findings.facts
    by_name = {metric["name"]: metric for metric in findings.metrics}
    asked = by_name["token_f1"]["n"]
    caveats: list[str | None] = [_sentence(warning) for warning in findings.data_card.get("warnings", [])]
    caveats += [_of_small_samples(findings.metrics, recipe.evaluate.confidence), _of_length(facts)]
    taken_of = {"questions": (by_name["loss"]["n"], facts.questions_there)}
    taken_of["pairs"] = by_name["likelihood_accuracy"]["n"], facts.pairs_there
    for what, (taken, there) in taken_of.items():
        if taken < there:
            caveats.append(f"Measured on {taken} of {there} test {what} (evaluate.max_rows), taken at even distances.")
    cut = {model: round(asked * (1 - by_name["stop_rate"]["values"][model]["value"])) for model in MODELS}
    if any(cut.values()):
        counts = ", ".join(f"{count} by {model}" for model, count in cut.items() if count)
        caveats.append(
            f"Of {asked} answers each, some were cut at {recipe.evaluate.max_new_tokens} tokens ({counts}); "
            "token F1, chrF and length are those of what was there."
        )
    merged, published = facts.types["merged"], recipe.merge.dtype
    if _TYPE_BITS.get(merged, 24) < _TYPE_BITS[published]:
        caveats.append(f"The merged model is published in {published} and was measured in {merged}, which is coarser.")
    if _change(by_name["preference_accuracy"], "sft", "merged")["verdict"] == "no clear change":
        caveats.append("DPO's effect on preferences is no better than noise here.")
    changes = len(findings.metrics) * len(CHANGES)
    by_chance = changes * (1 - recipe.evaluate.confidence)
    caveats.append(f"{changes} changes were tested: with none real, about {by_chance:.1f} would look clear by chance.")
    caveats.append(
        "The intervals cover the choice of test rows, by groups of the same question. They do not cover the choice of "
        "the seed: this is one training."
    )
    return [caveat for caveat in caveats if caveat]


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"


def _of_small_samples(metrics: Sequence[Mapping[str, Any]], confidence: float) -> str | None:
    few = {metric["groups"]: metric["title"] for metric in metrics if metric["groups"] < _FEW_GROUPS}
    if not few:
        return None
    least = min(few)
    if any(value["low"] is None for metric in metrics for value in metric["values"].values()):
        enough = math.ceil(1 - math.log2(1 - confidence))
        return (
            f"Some numbers rest on {least} group{'s' * (least > 1)} of test rows. Under {enough} no interval at "
            f"{confidence * 100:g}% means anything, so none is given and no change is called clear."
        )
    return f"Some numbers rest on only {least} groups of test rows; intervals from so few are too narrow, if anything."


def _of_length(facts: Facts) -> str | None:
    pairs = list(zip(facts.chosen_tokens, facts.rejected_tokens, strict=True))
    longer = sum(chosen > rejected for chosen, rejected in pairs) / len(pairs)
    shorter = sum(chosen < rejected for chosen, rejected in pairs) / len(pairs)
    if max(longer, shorter) < _LENGTH_TELLS:
        return None
    chosen, rejected = sum(facts.chosen_tokens) / len(pairs), sum(facts.rejected_tokens) / len(pairs)
    which = "longer" if longer > shorter else "shorter"
    return (
        f"Chosen answers have {chosen:.1f} tokens on average, rejected ones {rejected:.1f}: always taking the {which} "
        f"one would be right in {max(longer, shorter):.0%} of the test pairs. "
        "Some of the preference accuracy may be length alone."
    )


def _change(metric: Mapping[str, Any], before: str, after: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(c for c in metric["changes"] if (c["from"], c["to"]) == (before, after))
    return found


def _stage_line(manifest: Manifest) -> dict[str, Any]:
    metrics = manifest.metrics
    return {
        "stage": manifest.stage,
        "key": manifest.key,
        "seconds": (manifest.finished_at - manifest.started_at).total_seconds(),
        "steps": metrics.get("steps"),
        "tokens_per_s": metrics.get("tokens_per_s"),
        "accelerator": manifest.accelerator,
        "backend": manifest.backend,
    }


def _own_stage_line(context: Context) -> dict[str, Any]:
    return {
        "stage": context.stage.name,
        "key": context.key,
        "seconds": (datetime.now(UTC) - context.started_at).total_seconds(),
        "steps": None,
        "tokens_per_s": None,
        "accelerator": context.accelerator,
        "backend": context.backend,
    }


def _lineage_line(manifest: Manifest) -> dict[str, Any]:
    return {
        "stage": manifest.stage,
        "key": manifest.key,
        "manifest_sha256": manifest.sha256(),
        "parents": {name: parent.key for name, parent in manifest.parents.items()},
        "files": len(manifest.files),
        "size_bytes": sum(file.size_bytes for file in manifest.files),
        "seed": manifest.seed,
        "package_version": manifest.package_version,
        "git_commit": manifest.git_commit,
        "image_digest": manifest.image_digest,
        "libraries": manifest.libraries,
        "finished_at": manifest.finished_at.isoformat(timespec="seconds"),
    }


def _own_lineage_line(context: Context) -> dict[str, Any]:
    """The report's own line; its manifest is written after it."""
    return {
        "stage": context.stage.name,
        "key": context.key,
        "manifest_sha256": None,
        "parents": {name: parent.key for name, parent in context.parents.items()},
        "files": len(context.stage.writes),
        "size_bytes": None,
        "seed": context.recipe.seed,
        "package_version": __version__,
        "git_commit": None,
        "image_digest": None,
        "libraries": {},
        "finished_at": None,
    }
