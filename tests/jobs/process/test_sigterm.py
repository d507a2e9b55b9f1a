"""SIGTERM ends a stage at once while it has nothing to save, whatever it is doing.

This also holds for the first process of a container, which gets only signals that it has handlers for.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamarefine_jobs.contract.errors import PreemptedError
from llamarefine_jobs.store import Store
from tests.jobs import tiny

IN_A_CONTAINER = ("unshare", "--pid", "--fork", "--kill-child")
STOPPED = "sft: error: sft was stopped by SIGTERM; run the same command again to resume"


def has_namespaces() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*IN_A_CONTAINER, "true"], capture_output=True, check=False).returncode == 0


@pytest.fixture(
    params=[
        pytest.param((), id="ordinary process"),
        pytest.param(
            IN_A_CONTAINER,
            id="process 1",
            marks=pytest.mark.skipif(not has_namespaces(), reason="making a PID namespace needs root and unshare"),
        ),
    ]
)
def wrapper(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """Return the command that starts the stage: none, or one that makes the stage process 1 of a PID namespace."""
    command: tuple[str, ...] = request.param
    return command


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Yield a list for processes, which are killed at the end of the test."""
    found: list[subprocess.Popen[str]] = []
    yield found
    for process in found:
        process.kill()
        process.communicate()


def start(
    found: list[subprocess.Popen[str]], wrapper: tuple[str, ...], *arguments: str, **environment: str
) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [*wrapper, sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )
    found.append(process)
    return process


def send_sigterm(process: subprocess.Popen[str], wrapper: tuple[str, ...]) -> None:
    """Send SIGTERM to the stage, not to the wrapper that started it."""
    pid = process.pid
    if wrapper:
        (pid,) = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    os.kill(pid, signal.SIGTERM)


def wait_for_end(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Wait until the process has ended; return its exit code and its lines."""
    output, _ = process.communicate(timeout=60)
    return process.returncode, output.splitlines()


def test_sigterm_during_imports_ends_the_stage(
    wrapper: tuple[str, ...], started: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    slow = "import time\nprint('importing', flush=True)\ntime.sleep(600)\n"
    (tmp_path / "pydantic.py").write_text(slow)  # makes the first library that entry.py imports slow
    process = start(started, wrapper, "-m", "llamarefine_jobs.sft", "--help", PYTHONPATH=str(tmp_path))
    assert process.stdout
    assert process.stdout.readline() == "importing\n"
    send_sigterm(process, wrapper)
    assert wait_for_end(process) == (PreemptedError.exit_code, [STOPPED])


def test_sigterm_during_a_download_ends_the_stage_and_removes_its_folder(
    wrapper: tuple[str, ...], started: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    store, recipe, work = Store(str(tmp_path / "store")), tmp_path / "recipe.yaml", tmp_path / "work"
    recipe.write_text(tiny.RECIPE)
    tiny.publish_prepared(store, tiny.write_prepared(tmp_path / "prepared"), tiny.recipe())
    (weights,) = (tmp_path / "store").rglob("model.safetensors")
    weights.unlink()
    os.mkfifo(weights)  # a file whose bytes never arrive
    work.mkdir()
    termination_message = tmp_path / "termination-message"
    termination_message.touch()
    process = start(
        started,
        wrapper,
        *("-m", "llamarefine_jobs.sft", "--recipe", str(recipe), "--store", store.uri),
        LLAMAREFINE_WORK=str(work),
        LLAMAREFINE_TERMINATION_MESSAGE=str(termination_message),
    )
    writing_end = open_when_read(weights, process)
    send_sigterm(process, wrapper)
    assert wait_for_end(process) == (PreemptedError.exit_code, [STOPPED])
    os.close(writing_end)
    assert list(work.iterdir()) == []
    assert '"reason": "preempted"' in termination_message.read_text()


def open_when_read(fifo: Path, process: subprocess.Popen[str]) -> int:
    """Open the writing end of a FIFO as soon as `process` has opened the reading end."""
    while process.poll() is None:
        with contextlib.suppress(OSError):  # no reader yet
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.05)
    raise AssertionError(process.communicate())


REPLACE_BY_STAGE = """
import os, signal, sys
from llamarefine_jobs.process import sigterm

stop = sigterm.install_handler()
stop.defer_exit()
if sys.argv[1] == "before":
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.is_set()
    print("still running", flush=True)
sigterm.keep_pending_across_exec()
assert sys.argv[1] == "within"
os.kill(os.getpid(), signal.SIGTERM)
os.execv(sys.executable, [sys.executable, "-m", "llamarefine_jobs.sft", *sys.argv[2:]])
"""


@pytest.mark.parametrize("moment", ["before", "within"])
def test_sigterm_around_a_restart_by_exec_ends_the_stage(
    moment: str, wrapper: tuple[str, ...], started: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    options = ("--recipe", str(tmp_path / "missing.yaml"), "--store", str(tmp_path))
    exit_code, lines = wait_for_end(start(started, wrapper, "-c", REPLACE_BY_STAGE, moment, *options))
    assert exit_code == PreemptedError.exit_code, lines
    assert ("still running" in lines) == (moment == "before")
    assert "was stopped by SIGTERM" in lines[-1]
