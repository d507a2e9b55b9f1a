"""Fixtures of the launcher's tests: a recipe with its own files, a store, `llamarefine` as a process, an API server."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.recipe_file import load_recipe
from llamarefine_jobs.sources.pinning import pin
from llamarefine_jobs.store import Store

from .api_server import ApiServer, served

RECIPE = """\
name: small
prepare:
  base: {source: tiny-llama}
  questions: {source: QUESTIONS}
  preferences: {source: python-docstrings}
"""

LAUNCHER = [sys.executable, str(Path(__file__).parent / "acting_launcher.py")]


@pytest.fixture(autouse=True)
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test in an empty working directory, without LLAMAREFINE_ variables."""
    for name in [name for name in os.environ if name.startswith("LLAMAREFINE_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    questions = tmp_path / "questions.csv"
    questions.write_text("question,answer\nWhat is kind?,A cluster.\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.replace("QUESTIONS", str(questions)))
    return path


@pytest.fixture
def recipe(recipe_file: Path) -> Callable[..., Recipe]:
    """Return the pinned recipe, with the given overrides."""
    return lambda *overrides: pin(load_recipe(recipe_file, overrides))


@pytest.fixture
def store(file_uri: str) -> Store:
    return Store(file_uri)


class Launcher:
    """Runs `llamarefine` as a process whose stages are played by acting.py."""

    def __init__(self) -> None:
        self.started: list[subprocess.Popen[str]] = []

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*LAUNCHER, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"COLUMNS": "100"} | environment,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def run(self, *arguments: str, **environment: str) -> tuple[int, str, str]:
        """Run to the end; return exit code, standard output, standard error."""
        process = self.start(*arguments, **environment)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err


@pytest.fixture
def launcher() -> Iterator[Launcher]:
    launcher = Launcher()
    yield launcher
    for process in launcher.started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_until(condition: Callable[[], object], timeout_s: float = 30) -> None:
    """Wait until `condition()` is true, because of what another process does."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"still not true after {timeout_s:g} s"
        time.sleep(0.05)


@pytest.fixture
def server() -> Iterator[ApiServer]:
    """The tests' own API server, without objects."""
    with served() as made:
        yield made
