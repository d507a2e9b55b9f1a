"""The evaluate stage, on real files and on models whose results are known in advance."""

import json
import math
import re
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from llamarefine_jobs import entry, evaluate
from llamarefine_jobs.contract.artifact import Manifest
from llamarefine_jobs.contract.errors import DivergedError, PreemptedError
from llamarefine_jobs.contract.progress import parse
from llamarefine_jobs.contract.prompt import answer, question
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.stages import STAGES
from llamarefine_jobs.models.encoding import Encoded, encode, load_tokenizer
from llamarefine_jobs.recipe_file import to_yaml
from llamarefine_jobs.store import Store
from llamarefine_k8s.runs.results import Report
from tests.jobs import processes, tiny

SETTINGS = (
    "evaluate.generated_rows=8",
    "evaluate.max_new_tokens=12",
    "evaluate.shown_examples=3",
    "evaluate.bootstrap_resamples=400",
    "merge.dtype=float32",
)
TEST_ROWS = 40
HISTORY = [{"step": 5, "loss": 3.2}, {"step": 10, "loss": 2.8}, {"step": 10, "eval_loss": 2.9}]


@dataclass
class Run:
    """A store with everything that evaluate reads."""

    store: Store
    recipe: Recipe
    parents: dict[str, Manifest]

    def evaluate(self, *overrides: str) -> dict[str, Any]:
        """Run the stage and return its report."""
        return json.loads(self.files(*overrides)["report.json"])

    def files(self, *overrides: str) -> dict[str, str]:
        recipe = tiny.recipe(*SETTINGS, *overrides)
        manifest = entry.run("evaluate", evaluate.work, recipe, self.store)
        return {file.path: self.store.read(f"{manifest.folder}/{file.path}").decode() for file in manifest.files}


def publish_run(folder: Path, *, steps: int, test_rows: int = TEST_ROWS) -> Run:
    """Make the artifacts of prepare, sft, dpo and merge without running these stages; train for `steps` steps.

    With 0 steps both adapters are zero, and the merged model is the base.
    """
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    recipe, store = tiny.recipe(*SETTINGS), Store((folder / "store").as_uri())
    prepared = tiny.write_prepared(folder / "prepared")
    write_test_rows(prepared, test_rows)
    tokenizer = load_tokenizer(prepared / "base")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(prepared / "base")
    rows = [
        encode(tokenizer, question(question_text), answer_text) for question_text, answer_text in tiny.made_up_rows()
    ]
    worse = [
        encode(tokenizer, question(question_text), reverse_words(answer_text))
        for question_text, answer_text in tiny.made_up_rows()
    ]
    objectives = {
        "sft": lambda model: -logprobs(model, rows).mean(),
        "dpo": lambda model: (logprobs(model, worse) - logprobs(model, rows)).mean(),
    }
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    for name, objective in objectives.items():
        adapted = get_peft_model(model, lora)
        optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
        for _ in range(steps):
            objective(adapted).backward()
            optimizer.step()
            optimizer.zero_grad()
        adapted.save_pretrained(folder / name / "adapter")
        base = AutoModelForCausalLM.from_pretrained(prepared / "base" if name == "sft" else folder / "policy")
        model = PeftModel.from_pretrained(base, folder / name / "adapter").merge_and_unload()
        model.save_pretrained(folder / "policy")
    shutil.copytree(folder / "policy", folder / "merged" / "model")
    parents = {"prepare": tiny.publish_prepared(store, prepared, recipe)}
    metrics = {"history": HISTORY, "tokens_per_s": 812.5}
    parents["sft"] = tiny.publish(store, folder / "sft", "sft", recipe, parents, metrics=metrics)
    parents["dpo"] = tiny.publish(store, folder / "dpo", "dpo", recipe, parents)
    parents["merge"] = tiny.publish(store, folder / "merged", "merge", recipe, parents)
    return Run(store, recipe, parents)


def write_test_rows(prepared: Path, count: int) -> None:
    rows = list(enumerate(tiny.made_up_rows()[:count]))
    questions = [
        {"messages": [*question(question_text), *answer(answer_text)], "group": f"{i:x}"}
        for i, (question_text, answer_text) in rows
    ]
    pairs = [
        {
            "prompt": question(question_text),
            "chosen": answer_text,
            "rejected": reverse_words(answer_text),
            "group": f"{i:x}",
        }
        for i, (question_text, answer_text) in rows
    ]
    for name, lines in (("questions", questions), ("preferences", pairs)):
        (prepared / name / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    card = {
        "questions": {"rows_read": 90, "outcomes": {"kept: test": count, "exact duplicate": 90 - count}},
        "warnings": ["the base is a tiny Llama"],
    }
    (prepared / "data_card.json").write_text(json.dumps(card))


def reverse_words(text: str) -> str:
    return " ".join(text.split()[::-1])


def logprobs(model: Any, rows: list[Encoded]) -> torch.Tensor:
    """Return the mean log-probability of each row's answer tokens, with gradients. Axes: B rows, T tokens."""
    longest = max(len(row) for row in rows)
    ids_BT = torch.zeros(len(rows), longest, dtype=torch.long)
    counted_BT = torch.zeros(len(rows), longest)
    for place, row in enumerate(rows):
        ids_BT[place, : len(row)] = torch.tensor(row.prompt_ids + row.answer_ids)
        counted_BT[place, len(row.prompt_ids) : len(row)] = 1
    logits_BTV = model(input_ids=ids_BT).logits[:, :-1]
    found_BT = logits_BTV.log_softmax(-1).gather(-1, ids_BT[:, 1:, None])[..., 0]
    return (found_BT * counted_BT[:, 1:]).sum(1) / counted_BT[:, 1:].sum(1)


def by_name(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {metric["name"]: metric for metric in report["metrics"]}


def verdict(report: dict[str, Any], metric: str, before: str, after: str) -> str:
    changes = by_name(report)[metric]["changes"]
    return next(change["verdict"] for change in changes if (change["from"], change["to"]) == (before, after))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return publish_run(tmp_path_factory.mktemp("trained"), steps=25)


@pytest.fixture(scope="module")
def report(trained: Run) -> dict[str, Any]:
    return trained.evaluate()


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return publish_run(tmp_path_factory.mktemp("unchanged"), steps=0)


def test_a_successful_training_is_called_better(report: dict[str, Any]) -> None:
    assert verdict(report, "loss", "base", "sft") == "better"
    assert verdict(report, "preference_accuracy", "sft", "merged") == "better"
    assert verdict(report, "preference_margin", "sft", "merged") == "better"
    assert report["verdict"]["sentence"].startswith("SFT lowered the held-out loss from ")
    assert "and DPO raised preference accuracy from 0.50 to " in report["verdict"]["sentence"]


def test_adapters_that_change_nothing_show_no_clear_change(unchanged: Run) -> None:
    found = unchanged.evaluate()
    for metric in found["metrics"]:
        assert {change["verdict"] for change in metric["changes"]} == {"no clear change"}, metric["name"]
    assert "this run shows no improvement" in found["verdict"]["detail"]


def test_the_loss_equals_a_direct_computation(trained: Run, report: dict[str, Any], tmp_path: Path) -> None:
    """The direct computation does not use scoring.py."""
    from transformers import AutoModelForCausalLM

    prepared = trained.store.fetch(trained.parents["prepare"], tmp_path / "prepared")
    merged = trained.store.fetch(trained.parents["merge"], tmp_path / "merged")
    tokenizer = load_tokenizer(prepared / "base")
    rows = [
        encode(tokenizer, question(question_text), answer_text)
        for question_text, answer_text in tiny.made_up_rows()[:TEST_ROWS]
    ]
    for name, folder in (("base", prepared / "base"), ("merged", merged / "model")):
        with torch.no_grad():
            per_row = logprobs(AutoModelForCausalLM.from_pretrained(folder), rows)
        tokens = torch.tensor([float(len(row.answer_ids)) for row in rows])
        expected = float(-(per_row * tokens).sum() / tokens.sum())
        assert by_name(report)["loss"]["values"][name]["value"] == pytest.approx(expected, abs=1e-5)
        assert by_name(report)["perplexity"]["values"][name]["value"] == pytest.approx(math.exp(expected), rel=1e-4)


def test_sft_is_its_own_reference(report: dict[str, Any]) -> None:
    assert by_name(report)["preference_accuracy"]["values"]["sft"] == {"value": 0.5, "low": 0.5, "high": 0.5}
    assert by_name(report)["preference_margin"]["values"]["sft"]["value"] == 0


def test_the_reward_margin_is_beta_times_the_gain_in_likelihood_margin(trained: Run, report: dict[str, Any]) -> None:
    likelihood = by_name(report)["likelihood_margin"]["values"]
    gained = likelihood["merged"]["value"] - likelihood["sft"]["value"]
    reward = by_name(report)["preference_margin"]["values"]["merged"]["value"]
    assert reward == pytest.approx(trained.recipe.dpo.beta * gained)


def test_the_report_has_everything_that_the_launcher_reads(report: dict[str, Any]) -> None:
    assert len(Report.model_validate(report).metrics) == 10
    assert report["models"] == ["base", "sft", "merged"]
    assert {metric["n"] for metric in report["metrics"]} == {TEST_ROWS, 8}
    assert len(report["examples"]) == 3
    for example in report["examples"]:
        assert set(example["answers"]) == {"base", "sft", "merged"}
        assert (example["question"], example["reference"]) in tiny.made_up_rows()
    assert report["curves"] == {"sft": HISTORY, "dpo": []}
    assert [stage["stage"] for stage in report["stages"]] == ["prepare", "sft", "dpo", "merge", "evaluate"]
    assert report["stages"][1]["tokens_per_s"] == 812.5


def test_every_artifact_is_in_the_lineage(trained: Run, report: dict[str, Any]) -> None:
    lineage = {line["stage"]: line for line in report["lineage"]}
    for name, manifest in trained.parents.items():
        assert (lineage[name]["key"], lineage[name]["manifest_sha256"]) == (manifest.key, manifest.sha256())
    assert set(lineage["evaluate"]["parents"]) == set(trained.parents)


def test_the_dpo_adapter_is_in_the_key_and_is_not_fetched(trained: Run, tmp_path: Path) -> None:
    assert "dpo" in STAGES["evaluate"].reads
    assert set(STAGES["evaluate"].key_only) <= set(STAGES["evaluate"].reads)
    inputs = entry.fetch_inputs(STAGES["evaluate"], trained.parents, trained.store, tmp_path)
    assert set(inputs) == {"prepare", "sft", "merge"}


def test_the_three_files_show_the_same_result(trained: Run, report: dict[str, Any]) -> None:
    files = trained.files()
    assert set(files) == {"report.html", "report.md", "report.json"}
    for page in (files["report.html"], files["report.md"]):
        assert report["verdict"]["sentence"] in page
        assert f"{by_name(report)['loss']['values']['merged']['value']:.3f}" in page


def test_a_failed_gate_is_in_the_report_and_the_report_is_published(trained: Run) -> None:
    gates = "evaluate.gates=[{metric: loss, at_most: 0.01}, {metric: preference_accuracy, at_least: 0.6}]"
    found = trained.evaluate(gates)["gates"]
    assert [(gate["metric"], gate["model"], gate["bound"], gate["passed"]) for gate in found] == [
        ("loss", "merged", "at_most 0.01", False),
        ("preference_accuracy", "merged", "at_least 0.6", True),
    ]
    assert found[0]["value"] > 0.01


def test_limited_rows_are_taken_at_even_distances_and_named_in_a_caveat(trained: Run) -> None:
    found = trained.evaluate("evaluate.max_rows=10", "evaluate.generated_rows=4")
    assert by_name(found)["loss"]["n"] == 10
    assert by_name(found)["token_f1"]["n"] == 4
    assert [example["question"][-3:] for example in found["examples"]] == [" 0?", " 8?", "20?"]
    assert any(f"on 10 of {TEST_ROWS} test questions (evaluate.max_rows)" in caveat for caveat in found["caveats"])
    assert any("an interval at 95% has no meaning" in caveat for caveat in found["caveats"])  # four answers


def test_caveats_belong_to_this_run(report: dict[str, Any]) -> None:
    caveats = " ".join(report["caveats"])
    assert "The base is a tiny Llama." in caveats  # from the data card
    assert "cut at 12 tokens" in caveats
    assert "max_rows" not in caveats


def test_progress_counts_the_rows_of_all_models_once(unchanged: Run, capsys: pytest.CaptureFixture[str]) -> None:
    unchanged.evaluate("evaluate.max_rows=12")
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("evaluate: backend: transformers on ") and ", because " in line for line in lines)
    steps = [(found.step, found.steps) for line in lines if (found := parse(line))]
    assert steps == sorted(steps)
    assert steps[-1] == (3 * (12 + 12 + 12 + 8), 3 * (12 + 12 + 12 + 8))


def test_the_speed_of_generating_is_logged_and_recorded_in_the_manifest_and_not_in_the_report(
    unchanged: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny.recipe(*SETTINGS, "evaluate.max_rows=11")
    manifest = entry.run("evaluate", evaluate.work, recipe, unchanged.store)
    lines = capsys.readouterr().out.splitlines()
    assert list(manifest.metrics["generation"]) == ["base", "sft", "merged"]
    for name, found in manifest.metrics["generation"].items():
        assert found.keys() == {"answers", "tokens", "seconds", "tokens_per_s"}
        assert found["answers"] == 8
        expected = rf"evaluate: {name} generated 8 answers, {found['tokens']} tokens in [\d.]+ s, \d+ tokens/s"
        assert sum(bool(re.fullmatch(expected, line)) for line in lines) == 1
    assert '"generation"' not in unchanged.files("evaluate.max_rows=11")["report.json"]


def test_one_test_row_gives_a_report_without_intervals(tmp_path: Path) -> None:
    found = publish_run(tmp_path, steps=0, test_rows=1).evaluate()
    assert Report.model_validate(found).metrics[0].values["merged"].low is None
    assert by_name(found)["loss"]["values"]["merged"]["low"] is None
    assert {change["verdict"] for metric in found["metrics"] for change in metric["changes"]} == {"no clear change"}
    assert any("rest on 1 group of test rows" in caveat for caveat in found["caveats"])


@pytest.fixture
def broken(trained: Run, tmp_path: Path) -> Run:
    """Return the trained run with a NaN in the merged model."""
    from transformers import AutoModelForCausalLM

    store, parents = Store((tmp_path / "store").as_uri()), trained.parents
    for name in ("prepare", "sft", "dpo"):
        own_parents = {parent: parents[parent] for parent in parents[name].parents}
        tiny.publish(store, trained.store.fetch(parents[name], tmp_path / name), name, trained.recipe, own_parents)
    merged = trained.store.fetch(parents["merge"], tmp_path / "merge") / "model"
    model = AutoModelForCausalLM.from_pretrained(merged)
    model.lm_head.weight.data[0, 0] = math.nan
    model.save_pretrained(tmp_path / "broken" / "model")
    merge_parents = {name: manifest for name, manifest in parents.items() if name != "merge"}
    tiny.publish(store, tmp_path / "broken", "merge", trained.recipe, merge_parents)
    return Run(store, trained.recipe, parents)


def test_the_error_names_the_model_with_scores_that_are_not_finite(broken: Run) -> None:
    with pytest.raises(DivergedError, match=r"merged gives no finite log-probability to 40 of 40 test answers"):
        broken.evaluate()
    assert not list(broken.store.entries("artifacts/evaluate/"))


def test_sigterm_ends_the_stage_and_publishes_nothing(trained: Run, tmp_path: Path) -> None:
    recipe = tiny.recipe(*SETTINGS, "evaluate.confidence=0.9", "evaluate.max_new_tokens=64", "evaluate.batch_rows=1")
    (tmp_path / "recipe.yaml").write_text(to_yaml(recipe))
    (tmp_path / "work").mkdir()
    before = {item.path for item in trained.store.entries("artifacts/evaluate/")}
    work = {"LLAMAREFINE_WORK": str(tmp_path / "work")}
    process = processes.start("evaluate", tmp_path / "recipe.yaml", trained.store.uri, environment=work)
    lines = processes.signal_when(process, signal.SIGTERM, lambda line: "phase=base" in line)
    assert process.returncode == PreemptedError.exit_code, "\n".join(lines)
    assert lines[-1] == "evaluate: error: evaluate was stopped by SIGTERM; run the same command again to resume"
    assert {item.path for item in trained.store.entries("artifacts/evaluate/")} == before
    assert list((tmp_path / "work").iterdir()) == []
