"""A stage that is told to stop before it has anything to save leaves at once, whatever it waits for: also as the first
process of a container, which the kernel gives no signal that it does not listen to."""

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
TOLD = "sft: error: sft was told to stop; run the same command again to go on"


def has_namespaces() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*IN_A_CONTAINER, "true"], capture_output=True, check=False).returncode == 0


@pytest.fixture(
    params=[
        pytest.param((), id="as any process"),
        pytest.param(
            IN_A_CONTAINER,
            id="as process 1",
            marks=pytest.mark.skipif(not has_namespaces(), reason="making a PID namespace needs root and unshare"),
        ),
    ]
)
def around(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """What the stage is started by."""
    wrapper: tuple[str, ...] = request.param
    return wrapper


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that do not outlive the test."""
    found: list[subprocess.Popen[str]] = []
    yield found
    for process in found:
        process.kill()
        process.communicate()


def start(
    found: list[subprocess.Popen[str]], around: tuple[str, ...], *arguments: str, **environment: str
) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [*around, sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )
    found.append(process)
    return process


def tell(process: subprocess.Popen[str], around: tuple[str, ...]) -> None:
    """SIGTERM, to the stage and not to what started it."""
    pid = process.pid
    if around:
        (pid,) = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    os.kill(pid, signal.SIGTERM)


def ending(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    output, _ = process.communicate(timeout=60)
    return process.returncode, output.splitlines()


def test_while_it_imports(around: tuple[str, ...], started: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    slow = "import time\nprint('importing', flush=True)\ntime.sleep(600)\n"
    (tmp_path / "pydantic.py").write_text(slow)  # a disk that is slow at the first library that entry.py imports
    process = start(started, around, "-m", "llamarefine_jobs.sft", "--help", PYTHONPATH=str(tmp_path))
    assert process.stdout
    assert process.stdout.readline() == "importing\n"
    tell(process, around)
    assert ending(process) == (PreemptedError.exit_code, [TOLD])


def test_while_it_downloads(around: tuple[str, ...], started: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    store, recipe, work = Store(str(tmp_path / "store")), tmp_path / "recipe.yaml", tmp_path / "work"
    recipe.write_text(tiny.RECIPE)
    tiny.publish_prepared(store, tiny.write_prepared(tmp_path / "prepared"), tiny.recipe())
    (weights,) = (tmp_path / "store").rglob("model.safetensors")
    weights.unlink()
    os.mkfifo(weights)  # bytes that never come
    work.mkdir()
    last_words = tmp_path / "last-words"
    last_words.touch()
    process = start(
        started,
        around,
        *("-m", "llamarefine_jobs.sft", "--recipe", str(recipe), "--store", store.uri),
        LLAMAREFINE_WORK=str(work),
        LLAMAREFINE_TERMINATION_MESSAGE=str(last_words),
    )
    held_open = open_when_read(weights, process)
    tell(process, around)
    assert ending(process) == (PreemptedError.exit_code, [TOLD])
    os.close(held_open)
    assert list(work.iterdir()) == []
    assert '"reason": "preempted"' in last_words.read_text()


def open_when_read(fifo: Path, process: subprocess.Popen[str]) -> int:
    """The writing end of a FIFO, which opens once `process` has opened the other one."""
    while process.poll() is None:
        with contextlib.suppress(OSError):  # nobody reads it yet
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        time.sleep(0.05)
    raise AssertionError(process.communicate())


ANEW = """
import os, signal, sys
from llamarefine_jobs.process import sigterm

stop = sigterm.install_handler()
stop.defer_exit()
if sys.argv[1] == "before":
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.is_set()
    print("goes on", flush=True)
sigterm.keep_pending_across_exec()
assert sys.argv[1] == "within"
os.kill(os.getpid(), signal.SIGTERM)
os.execv(sys.executable, [sys.executable, "-m", "llamarefine_jobs.sft", *sys.argv[2:]])
"""


@pytest.mark.parametrize("moment", ["before", "within"])
def test_while_it_starts_anew(
    moment: str, around: tuple[str, ...], started: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    nowhere = ("--recipe", str(tmp_path / "missing.yaml"), "--store", str(tmp_path))
    exit_code, lines = ending(start(started, around, "-c", ANEW, moment, *nowhere))
    assert exit_code == PreemptedError.exit_code, lines
    assert ("goes on" in lines) == (moment == "before")
    assert "told to stop" in lines[-1]
