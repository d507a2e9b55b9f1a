"""Run stages as processes, as users and Kubernetes do."""

import hashlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

_STEP = re.compile(r"^progress .*\bstep=(\d+)")
_WAITING = Path(__file__).parent / "waiting"


def start(
    stage: str, recipe: Path, store: str, *options: str, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start a stage. Its standard output and standard error are one stream."""
    return subprocess.Popen(
        [sys.executable, "-m", f"llamarefine_jobs.{stage}", "--recipe", recipe, "--store", store, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(environment or {}),
    )


def wait_after(words: str) -> dict[str, str]:
    """Return the environment in which a stage waits after a line with these words, until it is stopped or killed."""
    return {"PYTHONPATH": str(_WAITING), "LLAMAREFINE_TEST_WAIT_AFTER": words}


def wait_at_step(number: int) -> dict[str, str]:
    """Return the environment in which a training waits at this optimizer step for its signal."""
    return wait_after(f"step={number} ")


def run(stage: str, recipe: Path, store: str, *options: str) -> tuple[int, list[str]]:
    """Run a stage to its end; return its exit code and its lines."""
    process = start(stage, recipe, store, *options)
    output, _ = process.communicate(timeout=900)
    return process.returncode, output.splitlines()


def signal_when(process: subprocess.Popen[str], number: signal.Signals, matches: Callable[[str], bool]) -> list[str]:
    """Read lines until one `matches`, send the signal, read the rest; return all lines."""
    lines = []
    sent = False
    assert process.stdout
    for line in process.stdout:
        lines.append(line.rstrip())
        if not sent and matches(line):
            process.send_signal(number)
            sent = True
    process.wait(timeout=60)
    assert sent, "no line matched, so no signal was sent:\n" + "\n".join(lines)
    return lines


def step(line: str) -> int | None:
    """Return the optimizer step in a progress line, or None for other lines."""
    found = _STEP.match(line)
    return int(found[1]) if found else None


def sha256s(store: Path, stage: str) -> dict[str, str]:
    """Return the digest of every published file of a stage, by its path below the attempt's folder."""
    files = sorted(path for path in (store / "artifacts" / stage).rglob("*") if path.is_file())
    return {
        "/".join(path.relative_to(store / "artifacts" / stage).parts[2:]): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name != "manifest.json"
    }
