"""The import rules find violations. A rule that allows everything would pass `make lint` too."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .documents import ROOT


def broken_contracts(tree: Path) -> list[str]:
    """Return the names of the rules that a copy of the repository breaks."""
    program = (
        "import sys; sys.path[:0] = ['jobs', 'k8s']; from importlinter.cli import lint_imports_command as lint; lint()"
    )
    command = [sys.executable, "-c", program, "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=120, check=False)
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert any("kept" in line and "broken" in line for line in lines), done.stdout + done.stderr
    return [line.partition(" BROKEN")[0] for line in lines if " BROKEN" in line]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the code that a test may change."""
    for folder in ("jobs", "k8s"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_the_code_breaks_no_rule(tree: Path) -> None:
    assert broken_contracts(tree) == []


@pytest.mark.parametrize(
    ("module", "line", "rule"),
    [
        ("jobs/llamarefine_jobs/contract/stages.py", "import llamarefine_jobs.store.objects", "Who may import whom"),
        ("jobs/llamarefine_jobs/contract/stages.py", "import yaml", "The contract needs no"),
        ("jobs/llamarefine_jobs/store/objects.py", "import llamarefine_jobs.store.artifacts", "Inside the store"),
        ("jobs/llamarefine_jobs/sft.py", "import llamarefine_jobs.dpo", "Who may import whom"),
        ("jobs/llamarefine_jobs/store/artifacts.py", "import llamarefine_jobs.context", "Who may import whom"),
        ("jobs/llamarefine_jobs/models/lora.py", "import llamarefine_jobs.training.loop", "Who may import whom"),
        ("jobs/llamarefine_jobs/sft.py", "import click", "Stages know neither"),
        ("jobs/llamarefine_jobs/entry.py", "import llamarefine_k8s.cli", "Stages know neither"),
        ("k8s/llamarefine_k8s/runs/plan.py", "import llamarefine_k8s.cluster.api", "The launcher: commands"),
        ("k8s/llamarefine_k8s/runs/plan.py", "import kubernetes", "Only cluster/api.py"),
        ("k8s/llamarefine_k8s/cluster/executor.py", "import kubernetes", "Only cluster/api.py"),
        (
            "k8s/llamarefine_k8s/cluster/submission.py",
            "import llamarefine_k8s.commands.display",
            "The launcher: commands",
        ),
        ("k8s/llamarefine_k8s/cluster/pod_log.py", "import rich", "Only commands print"),
        ("k8s/llamarefine_k8s/runs/plan.py", "import llamarefine_jobs.entry", "The launcher runs stages"),
        ("k8s/llamarefine_k8s/runs/plan.py", "import torch", "The launcher never reaches"),
        ("k8s/llamarefine_k8s/runs/plan.py", "import llamarefine_jobs.sft", "The launcher never reaches"),
    ],
)
def test_a_violation_is_found(tree: Path, module: str, line: str, rule: str) -> None:
    file = tree / module
    file.write_text(f"{file.read_text(encoding='utf-8')}\n{line}\n", encoding="utf-8")
    assert any(name.startswith(rule) for name in broken_contracts(tree))


def test_a_package_without_a_layer_is_found(tree: Path) -> None:
    (tree / "jobs/llamarefine_jobs/helpers.py").write_text('"""A module that no layer names."""\n', encoding="utf-8")
    assert any(name.startswith("Who may import whom") for name in broken_contracts(tree))
