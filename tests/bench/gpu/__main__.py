"""Measure tokens per second, MFU, memory and seconds by phase of SFT and DPO at TinyLlama's shape.

    python -m tests.bench.gpu --json OUT.json [--markdown OUT.md] [--shape tiny] [--steps 60] [--arm ours --arm plain]

There are three arms on the same rows. Each training has its own process, so that patches and memory are not shared:

  ours     jobs/recipes/tinyllama-nvidia-docs.yaml, as the stages build it, on the backend they choose
  earlier  the first user's earlier attempt: 4 bits, q and v only, batches of 8; SFT rows padded to 256, DPO with the
           reference model's forward pass in each step
  plain    TRL + PEFT with the same recipe as ours and without Unsloth: rows padded to the longest of a batch

Weights are random. The rows are those of the CSV that LLAMAREFINE_GPU_CSV names (columns question and answer), or
Python's docstrings. What was not measured is null: MFU and memory without a card, figures of a failed arm.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from tests.bench.gpu.table import markdown
from tests.gpu import shapes

ARMS = {
    "ours": None,
    "earlier": "transformers",
    "plain": "transformers",
}  # arm -> the backend it must use; None: the stage chooses
STAGES = ("sft", "dpo")
LIBRARIES = ("torch", "transformers", "trl", "peft", "unsloth", "unsloth-zoo", "bitsandbytes", "triton", "accelerate")
TIMEOUT_S = 1200


def main() -> None:
    options = _options()
    shape = shapes.SHAPES[options.shape]
    found: dict[str, Any] = environment_info(shape.name) | {"measurements": []}
    if shape.needs_cuda and not found["gpu"]:
        sys.exit(f"tests.bench.gpu: the shape {shape.name} needs a CUDA device, found none; --shape tiny needs none")
    with tempfile.TemporaryDirectory(prefix="llamarefine-bench-") as folder:
        rows = shapes.read_rows(options.rows)
        prepared = shapes.write_prepared(Path(folder, "prepared"), shape, rows)
        found["rows"] = {"read": len(rows), "source": Path(os.environ.get(shapes.CSV, "python-docstrings")).name}
        for stage in options.stage or STAGES:
            for arm in options.arm or ARMS:
                found["measurements"].append(measure_in_process(arm, stage, prepared, options))
                options.json.write_text(
                    json.dumps(found, indent=2) + "\n", encoding="utf-8"
                )  # after each measurement, so that none is lost
    text = markdown(found)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    print(text)
    if not all(one["error"] is None for one in found["measurements"]):
        sys.exit(1)


def measure_in_process(arm: str, stage: str, prepared: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one arm of one stage in its own process; if it fails, return its error instead of figures."""
    environment = dict(os.environ)
    if backend := ARMS[arm]:
        environment["LLAMAREFINE_BACKEND"] = backend
    command = [sys.executable, "-m", "tests.bench.gpu.training", arm, stage, str(prepared), str(options.steps)]
    print(f"{stage} {arm} …", file=sys.stderr, flush=True)
    try:
        ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S, env=environment)
    except subprocess.TimeoutExpired:
        return {"arm": arm, "stage": stage, "error": f"took more than {TIMEOUT_S} s"}
    if ended.returncode:
        lines = ended.stderr.strip().splitlines() or ["no output"]
        print("\n".join(lines[-20:]), file=sys.stderr)
        return {"arm": arm, "stage": stage, "error": lines[-1]}
    measured: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return measured | {"error": None}


def environment_info(shape: str) -> dict[str, Any]:
    """Return the machine, the versions and the command."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "-m", "tests.bench.gpu", *sys.argv[1:]]),
        "commit": os.environ.get("LLAMAREFINE_GIT_COMMIT") or _output("git", "rev-parse", "HEAD"),
        "shape": shape,
        "gpu": torch.cuda.get_device_name(0) if cuda else None,
        "gpu_memory_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "cuda": torch.version.cuda if cuda else None,
        "python": platform.python_version(),
        "libraries": {name: _version(name) for name in LIBRARIES},
    }


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="write the figures to this file")
    parser.add_argument("--markdown", type=Path, help="also write the printed table to this file")
    parser.add_argument("--shape", choices=list(shapes.SHAPES), default="tinyllama")
    parser.add_argument("--rows", type=int, default=7108, help="maximum number of questions with answers")
    parser.add_argument("--steps", type=int, default=60, help="number of timed optimizer steps, after the warm-up")
    parser.add_argument("--arm", choices=list(ARMS), action="append", help="measure only this one; may be repeated")
    parser.add_argument("--stage", choices=STAGES, action="append", help="measure only this one; may be repeated")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
