"""Measure how long `llamarefine --help` and imports take; print the best and the median of 10 runs.

python tests/bench/launcher.py
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

CASES = {
    "llamarefine --help": [str(Path(sys.executable).parent / "llamarefine"), "--help"],
    "python -c pass": [sys.executable, "-c", "pass"],
    "import llamarefine_jobs.store": [sys.executable, "-c", "import llamarefine_jobs.store"],
    "import boto3": [sys.executable, "-c", "import boto3"],
}


def measure(command: list[str], times: int = 10) -> list[float]:
    """Return the wall seconds of `times` runs, sorted, after one run that fills the file cache."""
    taken = []
    for _ in range(times + 1):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        taken.append(time.perf_counter() - began)
    return sorted(taken[1:])


if __name__ == "__main__":
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # with it, each process would compile every module that it imports
    for name, command in CASES.items():
        taken = measure(command)
        print(f"{name:32} best {taken[0]:.3f} s  median {statistics.median(taken):.3f} s")
