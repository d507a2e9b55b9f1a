"""The report as JSON values: metrics, verdict, caveats, lineage. page.py renders them as pages."""

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
_LENGTH_CAVEAT_SHARE = 0.6  # the caveat appears if always choosing by length is right in this share of the pairs
_SIGNIFICAND_BITS = {"bfloat16": 8, "float16": 11, "float32": 24}


@dataclass(frozen=True)
class Facts:
    """Facts of the evaluation that the caveats are derived from.

    `questions_total` and `pairs_total` count the whole test split; `types` maps a model to the type of its weights.
    """

    questions_total: int
    pairs_total: int
    types: Mapping[str, str]
    chosen_tokens: Sequence[int]
    rejected_tokens: Sequence[int]


@dataclass(frozen=True)
class Findings:
    """The results of the evaluation; the lists have the form that they have in report.json."""

    metrics: list[dict[str, Any]]
    gates: list[dict[str, Any]]
    examples: list[dict[str, Any]]
    data_card: dict[str, Any]
    facts: Facts


def build(context: Context, findings: Findings) -> dict[str, Any]:
    """Return the whole report as plain JSON values."""
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
        # prepare writes no lone surrogates, but a page must also be written if there is one.
        (folder / name).write_bytes(render(report).encode("utf-8", "replace"))


def judge(metrics: Sequence[Mapping[str, Any]], confidence: float) -> dict[str, str]:
    """Return the verdict in one sentence, and a detail that says whether the changes exceed noise."""
    by_name = {metric["name"]: metric for metric in metrics}
    loss, accuracy = by_name["loss"], by_name["preference_accuracy"]
    sft, dpo = _change(loss, "base", "sft"), _change(accuracy, "sft", "merged")
    clear = [change["verdict"] != "no clear change" for change in (sft, dpo)]
    conjunction = "and" if sft["verdict"] == dpo["verdict"] else "but"
    sentence = (
        f"SFT {_effect(loss, sft, 'the held-out loss', ' nats per token')}, "
        f"{conjunction} DPO {_effect(accuracy, dpo, 'preference accuracy')}."
    )
    level = f"at {confidence * 100:g}% confidence"
    if all(clear):
        detail = f"Both changes are larger than noise from the choice of test rows, {level}."
    elif any(clear):
        detail = f"The {'second' if clear[0] else 'first'} change is not distinguishable from noise {level}."
    else:
        detail = f"Neither change is distinguishable from noise {level}: this run shows no improvement."
    cost = _change(loss, "sft", "merged")
    if cost["verdict"] != "no clear change":
        raised = "raised" if cost["verdict"] == "worse" else "lowered"
        detail += f" DPO also {raised} the held-out loss by {abs(cost['value']):.3f} nats per token."
    if _change(loss, "base", "merged")["verdict"] == "worse":
        detail += " The merged model predicts the reference answers worse than the base model does."
    return {"sentence": sentence, "detail": detail}


def _effect(metric: Mapping[str, Any], change: Mapping[str, Any], what: str, unit: str = "") -> str:
    values = [metric["values"][change[end]]["value"] for end in ("from", "to")]
    digits = 2 if round(values[0], 2) != round(values[1], 2) else 4
    before, after = (f"{value:.{digits}f}" for value in values)
    if change["verdict"] == "no clear change":
        return f"did not clearly change {what} ({before} before, {after}{unit} after)"
    return f"{'raised' if change['value'] > 0 else 'lowered'} {what} from {before} to {after}{unit}"


def find_caveats(context: Context, findings: Findings) -> list[str]:
    """Return the sentences that a reader must know to interpret the numbers of this run."""
    recipe, facts = context.recipe, findings.facts
    by_name = {metric["name"]: metric for metric in findings.metrics}
    generated = by_name["token_f1"]["n"]
    caveats: list[str | None] = [_sentence(warning) for warning in findings.data_card.get("warnings", [])]
    caveats += [_few_groups_caveat(findings.metrics, recipe.evaluate.confidence), _length_caveat(facts)]
    counts = {"questions": (by_name["loss"]["n"], facts.questions_total)}
    counts["pairs"] = by_name["likelihood_accuracy"]["n"], facts.pairs_total
    for what, (taken, total) in counts.items():
        if taken < total:
            caveats.append(f"Measured on {taken} of {total} test {what} (evaluate.max_rows), taken at even distances.")
    cut = {model: round(generated * (1 - by_name["stop_rate"]["values"][model]["value"])) for model in MODELS}
    if any(cut.values()):
        by_model = ", ".join(f"{count} by {model}" for model, count in cut.items() if count)
        caveats.append(
            f"Of the {generated} answers of each model, some were cut at {recipe.evaluate.max_new_tokens} tokens "
            f"({by_model}); their token F1, chrF and length are computed from the part before the cut."
        )
    merged, published = facts.types["merged"], context.parents["merge"].recipe["merge"]["dtype"]
    if _SIGNIFICAND_BITS.get(merged, 24) < _SIGNIFICAND_BITS[published]:
        caveats.append(
            f"The merged model is published in {published} and was measured in {merged}, which is less precise."
        )
    if _change(by_name["preference_accuracy"], "sft", "merged")["verdict"] == "no clear change":
        caveats.append("The effect of DPO on preference accuracy is not distinguishable from noise here.")
    changes = len(findings.metrics) * len(CHANGES)
    by_chance = changes * (1 - recipe.evaluate.confidence)
    caveats.append(
        f"{changes} changes were tested: if none were real, about {by_chance:.1f} would look clear by chance."
    )
    caveats.append(
        "The intervals cover chance in the choice of test rows, by groups of the same question. They do not cover "
        "chance in the training, such as the seed: each model was trained once."
    )
    return [caveat for caveat in caveats if caveat]


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}{'' if text.endswith('.') else '.'}"


def _few_groups_caveat(metrics: Sequence[Mapping[str, Any]], confidence: float) -> str | None:
    few = {metric["groups"]: metric["title"] for metric in metrics if metric["groups"] < _FEW_GROUPS}
    if not few:
        return None
    fewest = min(few)
    if any(value["low"] is None for metric in metrics for value in metric["values"].values()):
        enough = math.ceil(1 - math.log2(1 - confidence))
        return (
            f"Some numbers rest on {fewest} group{'s' * (fewest > 1)} of test rows. With fewer than {enough} groups an "
            f"interval at {confidence * 100:g}% has no meaning, so the report gives none and calls no change clear."
        )
    return (
        f"Some numbers rest on only {fewest} groups of test rows; intervals from so few groups tend to be too narrow."
    )


def _length_caveat(facts: Facts) -> str | None:
    pairs = list(zip(facts.chosen_tokens, facts.rejected_tokens, strict=True))
    longer = sum(chosen > rejected for chosen, rejected in pairs) / len(pairs)
    shorter = sum(chosen < rejected for chosen, rejected in pairs) / len(pairs)
    if max(longer, shorter) < _LENGTH_CAVEAT_SHARE:
        return None
    chosen, rejected = sum(facts.chosen_tokens) / len(pairs), sum(facts.rejected_tokens) / len(pairs)
    which = "longer" if longer > shorter else "shorter"
    return (
        f"Chosen answers have {chosen:.1f} tokens on average, rejected ones {rejected:.1f}: always choosing the "
        f"{which} answer would be right in {max(longer, shorter):.0%} of the test pairs. "
        "Part of the preference accuracy may come from length alone."
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
    """Return the lineage line of the report itself; its manifest is written later."""
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
