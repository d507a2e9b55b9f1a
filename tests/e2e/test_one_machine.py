"""The demo as a user runs it: the command with the real stages, and its metrics; then the pipeline on real files."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "jobs" / "recipes" / "demo.yaml"
DATA = ROOT.parent / "shared" / "data"
CSV = DATA / "NvidiaDocumentationQandApairs.csv"
PAIRS = DATA / "preferences-hh-style.jsonl"
# Fewer steps than the demo: on real files the test only checks that the pipeline runs to its end.
SHORT = (
    "prepare.base.tiny.steps=40",
    "prepare.max_rows=600",
    "sft.max_steps=20",
    "dpo.max_steps=10",
    "evaluate.gates=[]",
)


def llamarefine(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command with its output piped."""
    command = [Path(sys.executable).with_name("llamarefine"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=900, env=os.environ)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the demo; return a folder with store/, model/, report.* and output.txt."""
    folder = tmp_path_factory.mktemp("demo")
    ended = llamarefine("run", DEMO, "--store", folder / "store", "--into", folder)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (folder / "output.txt").write_text(ended.stdout)
    return folder


def metric(folder: Path, name: str) -> dict[str, Any]:
    metrics: list[dict[str, Any]] = json.loads((folder / "report.json").read_text())["metrics"]
    return next(metric for metric in metrics if metric["name"] == name)


def test_sft_lowers_the_held_out_loss_and_the_intervals_do_not_overlap(demo: Path) -> None:
    loss = metric(demo, "loss")
    assert loss["values"]["sft"]["high"] < loss["values"]["base"]["low"]
    assert [change["verdict"] for change in loss["changes"] if (change["from"], change["to"]) == ("base", "sft")] == [
        "better"
    ]


def test_dpo_raises_the_held_out_preference_accuracy_above_chance(demo: Path) -> None:
    accuracy = metric(demo, "preference_accuracy")["values"]
    assert accuracy["sft"]["value"] == 0.5, "the SFT policy is its own reference, so every margin is 0"
    assert accuracy["merged"]["low"] > 0.5


def test_the_output_ends_with_the_table_the_paths_and_the_next_command(demo: Path) -> None:
    output = (demo / "output.txt").read_text()
    for expected in (
        "Held-out loss",
        "base + SFT",
        "merged",
        str(demo / "report.html"),
        str(demo / "model"),
        "llamarefine infer",
    ):
        assert expected in output
    assert "\x1b" not in output, "piped output contains control characters"


def test_the_model_loads_with_transformers_and_without_llamarefine(demo: Path) -> None:
    code = (
        "import sys; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "ids = tokenizer.apply_chat_template([{'role': 'user', 'content': 'What is json.dumps?'}],"
        " add_generation_prompt=True, return_tensors='pt', return_dict=True)\n"
        "assert model.generate(**ids, max_new_tokens=8).shape[1] > ids['input_ids'].shape[1]\n"
        "assert not any(name.startswith('llamarefine') for name in sys.modules)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code, demo / "model"], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_a_second_run_reuses_every_artifact(demo: Path) -> None:
    before = sorted((path, path.stat().st_mtime_ns) for path in (demo / "store" / "artifacts").rglob("*"))
    assert before
    ended = llamarefine("run", DEMO, "--store", demo / "store", "--json")
    assert ended.returncode == 0, ended.stderr
    stages = json.loads(ended.stdout)["stages"]
    assert [stage["state"] for stage in stages.values()] == ["reused"] * 5
    assert sorted((path, path.stat().st_mtime_ns) for path in (demo / "store" / "artifacts").rglob("*")) == before


def test_another_beta_plans_only_dpo_merge_and_evaluate(demo: Path) -> None:
    ended = llamarefine("plan", DEMO, "--store", demo / "store", "--set", "dpo.beta=0.2", "--json")
    assert ended.returncode == 0, ended.stderr
    stages = json.loads(ended.stdout)["stages"]
    assert [stage["stage"] for stage in stages if stage["state"] != "there"] == ["dpo", "merge", "evaluate"]


def test_the_same_recipe_in_another_folder_gives_the_same_bytes(demo: Path, tmp_path: Path) -> None:
    ended = llamarefine("run", DEMO, "--store", tmp_path / "store", "--into", tmp_path / "out")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    made, again = published(demo / "store"), published(tmp_path / "store")
    assert {path.split("/")[0] for path in made} == {"prepare", "sft", "dpo", "merge"}
    assert made == again


@pytest.mark.skipif(not (CSV.exists() and PAIRS.exists()), reason="the real files are not in ../shared/data")
def test_the_pipeline_runs_on_real_questions_and_real_pairs(tmp_path: Path) -> None:
    overrides = (
        *SHORT,
        f"prepare.questions.source={CSV}",
        f"prepare.preferences.source={PAIRS}",
        "max_length_tokens=512",
    )
    options = [word for override in overrides for word in ("--set", override)]
    ended = llamarefine("run", DEMO, "--store", tmp_path / "store", "--into", tmp_path / "out", *options)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    card = json.loads((tmp_path / "out" / "report.json").read_text())["data"]
    assert (card["questions"]["rows_read"], card["preferences"]["rows_read"]) == (7108, 300)
    assert (tmp_path / "out" / "model" / "config.json").exists()


def published(store: Path) -> dict[str, str]:
    """Return the sha256 of each published file, by stage/file; without evaluate, whose report contains times."""
    digests = {}
    for stage in ("prepare", "sft", "dpo", "merge"):
        for path in sorted((store / "artifacts" / stage).rglob("*")):
            if path.is_file() and path.name != "manifest.json":
                name = "/".join(path.relative_to(store / "artifacts" / stage).parts[2:])
                digests[f"{stage}/{name}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return digests
