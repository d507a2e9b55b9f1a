"""The launcher installed without extras: it is small, starts fast, and does not need torch."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from .documents import ROOT

HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "numpy", "scipy", "matplotlib", "jinja2", "pyarrow")
SLOW = (*HEAVY, "boto3", "botocore", "kubernetes", "rich", "yaml")


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the `bin` folder of an environment with the launcher as a wheel, without extras and development tools."""
    uv = os.environ.get("UV") or shutil.which("uv") or str(ROOT / ".uv/bin/uv")
    environment = tmp_path_factory.mktemp("light") / "venv"
    subprocess.run(
        [uv, "sync", "--quiet", "--locked", "--no-dev", "--no-editable"],
        cwd=ROOT,
        env={**os.environ, "UV_PROJECT_ENVIRONMENT": str(environment)},
        check=True,
        timeout=300,
    )
    return environment / "bin"


def run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_prints_the_description(light: Path) -> None:
    assert "Fine-tune a small Llama in stages" in run(light / "llamarefine", "--help")


def test_no_training_library_is_installed(light: Path) -> None:
    program = f"import importlib.util, json; print(json.dumps([n for n in {HEAVY!r} if importlib.util.find_spec(n)]))"
    assert json.loads(run(light / "python", "-c", program)) == []


def test_help_imports_no_slow_library(light: Path) -> None:
    program = (
        "import json, sys\n"
        "from llamarefine_k8s.cli import cli\n"
        "try: cli(['--help'], prog_name='llamarefine')\n"
        "except SystemExit: pass\n"
        f"print('\\n' + json.dumps([n for n in {SLOW!r} if n in sys.modules]))"
    )
    assert json.loads(run(light / "python", "-c", program).splitlines()[-1]) == []


def test_every_module_of_the_launcher_imports_without_a_training_library(light: Path) -> None:
    program = (
        "import importlib, json, pkgutil, sys, llamarefine_k8s\n"
        "names = [module.name for module in pkgutil.walk_packages(llamarefine_k8s.__path__, 'llamarefine_k8s.')]\n"
        "for name in names: importlib.import_module(name)\n"
        f"print(json.dumps([len(names), [n for n in {HEAVY!r} if n in sys.modules]]))"
    )
    count, heavy = json.loads(run(light / "python", "-c", program))
    assert count > 30
    assert heavy == []


def test_a_recipe_can_be_written_and_planned(light: Path, tmp_path: Path) -> None:
    run(light / "llamarefine", "init", "--demo", "recipe.yaml", cwd=tmp_path)
    plan = json.loads(run(light / "llamarefine", "plan", "recipe.yaml", "--store", "store", "--json", cwd=tmp_path))
    assert [stage["stage"] for stage in plan["stages"]] == ["prepare", "sft", "dpo", "merge", "evaluate"]
