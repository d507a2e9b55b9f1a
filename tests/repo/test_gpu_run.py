"""tests/gpu/run on a machine without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from .documents import ROOT


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_it_fails_with_one_line_and_writes_no_results(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "LLAMAREFINE_GPU_TESTS"}
    environment |= {"PYTHON": sys.executable, "OUT": str(tmp_path / "results")}
    ended = subprocess.run([ROOT / "tests/gpu/run"], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stderr.startswith("tests/gpu/run: expected a CUDA device, found none;")
    assert len(ended.stderr.splitlines()) == 1
    assert not (tmp_path / "results").exists()


def test_an_unknown_argument_is_refused() -> None:
    ended = subprocess.run([ROOT / "tests/gpu/run", "benchmarks"], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr == "tests/gpu/run: expected tests, benchmark, card or nothing, found benchmarks\n"


def test_parts_without_time_left_are_named_as_not_run(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHON": sys.executable, "OUT": str(tmp_path), "LLAMAREFINE_GPU_TESTS": "cpu"}
    environment |= {"LLAMAREFINE_GPU_BUDGET_S": "1"}
    ended = subprocess.run([ROOT / "tests/gpu/run"], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    summary = (tmp_path / "summary.txt").read_text().splitlines()
    assert "benchmark tiny: not run: no time left" in summary
    assert len(summary) > 5
    assert all(": not run: " in line for line in summary)
