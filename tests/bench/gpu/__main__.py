"""Measure the speed of SFT and DPO at TinyLlama's shape, with the most valuable measurements first.

    python -m tests.bench.gpu --json OUT.json [--shape tiny] [--steps 30] [--budget-s 480] [--arm ours]

Arms train on the same rows. Each has its own processes, so that patches and memory are not shared:

  ours     our loop with packed rows, as shipped, with 16, 64 and 256 rows in a step; and whole trainings by the stages
  unsloth  our loop on Unsloth's model
  plain    TRL's trainers + PEFT: rows padded to the longest of a step; also with cuDNN's attention switched off
  earlier  the first user's earlier attempt: 4 bits, q and v only, batches of 8 padded to 256 tokens

Weights are random. The rows are those of the CSV that LLAMAREFINE_GPU_CSV names (columns question and answer), or
Python's docstrings; preference pairs are made of them. What was not measured is null.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib import metadata, util
from pathlib import Path
from typing import Any

from tests.bench.gpu import whole
from tests.bench.gpu.arms import ARMS, PROCESSES, STAGES, Process
from tests.bench.gpu.table import markdown
from tests.bench.gpu.training import PREFIX
from tests.gpu import shapes

LIBRARIES = ("torch", "transformers", "trl", "peft", "unsloth", "unsloth-zoo", "bitsandbytes", "triton")
_LEAST_S = 15  # below which no process is started


def main() -> None:
    options = _options()
    began_s = time.monotonic()
    shape = shapes.SHAPES[options.shape]
    found: dict[str, Any] = environment_info(shape.name) | {"measurements": [], "not_run": []}
    if shape.needs_cuda and not found["gpu"]:
        sys.exit(f"tests.bench.gpu: the shape {shape.name} needs a CUDA device, found none; --shape tiny needs none")

    def write() -> None:
        """Write all figures so far, so that an interruption loses none."""
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        if options.markdown:
            options.markdown.write_text(markdown(found), encoding="utf-8")

    with tempfile.TemporaryDirectory(prefix="llamarefine-bench-") as name:
        folder = Path(name)
        rows = shapes.read_rows(options.rows)
        prepared = whole.write_prepared(folder / "prepared", shape, rows, options.pairs)
        found["rows"] = {"read": len(rows), "source": Path(os.environ.get(shapes.CSV, "python-docstrings")).name}
        found["rows"]["pairs"] = options.pairs
        say(began_s, f"wrote {len(rows)} rows, {options.pairs} pairs and a base of the shape {shape.name}")
        # The first process compiles with an empty cache, as a user's first training does.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")
        overrides = [f"{stage}.max_steps={options.whole_steps}" for stage in STAGES if options.whole_steps]
        recipe, store = whole.publish(prepared, folder / "whole", overrides)
        for process in PROCESSES:
            if options.arm and process.arm not in options.arm:
                continue
            left_s = options.budget_s - (time.monotonic() - began_s)
            missing = process.arm == "unsloth" and (util.find_spec("unsloth") is None or not found["gpu"])
            if left_s < _LEAST_S or missing:
                reason = "needs Unsloth and a CUDA device" if missing else "no time left"
                found["not_run"] += [f"{one}: {reason}" for one in process.names]
                say(began_s, f"not run ({reason}): {', '.join(process.names)}")
                continue
            limit_s = min(process.limit_s, left_s)
            if process.whole_stage:
                results: Iterator[Any] = iter([whole.run_stage(process.whole_stage, recipe, store, limit_s)])
            else:
                results = measure(process, prepared, options.steps, limit_s)
            names = list(process.names)
            for one in results:
                found["measurements"].append(one)
                names.remove(f"{one['arm']}: {one['name']}")
                say(began_s, summary(one))
                write()
            found["not_run"] += [f"{one}: its process ended after {limit_s:.0f} s or failed" for one in names]
            for one in names:
                say(began_s, f"not measured: {one}")
            write()
    write()
    print(markdown(found))
    if not all(one["error"] is None for one in found["measurements"]):
        sys.exit(1)


def measure(process: Process, prepared: Path, steps: int, limit_s: float) -> Iterator[dict[str, Any]]:
    """Run the measurements of one process; yield each when it is finished."""
    command = [sys.executable, "-m", "tests.bench.gpu.training", process.arm, str(prepared), str(steps)]
    command += [f"{one.stage}:{one.rows}:{one.cudnn}" for one in process.measurements]
    environment = os.environ | {"TQDM_DISABLE": "1"}
    with tempfile.TemporaryFile("w+") as errors:
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        timer = threading.Timer(limit_s, running.kill)
        timer.start()
        assert running.stdout
        for line in running.stdout:
            if line.startswith(PREFIX):
                yield json.loads(line.removeprefix(PREFIX))
        running.wait()
        timer.cancel()
        if running.returncode:
            errors.seek(0)
            print(
                f"{process.arm}: exit code {running.returncode}\n{errors.read()[-3000:]}", file=sys.stderr, flush=True
            )


def say(began_s: float, text: str) -> None:
    print(f"[{time.monotonic() - began_s:6.1f} s] {text}", file=sys.stderr, flush=True)


def summary(one: dict[str, Any]) -> str:
    """Return one line about a measurement."""
    name = f"{one['arm']}: {one['name']}"
    if one["error"]:
        return f"{name}: FAILED: {one['error']}"
    if "whole_s" in one:
        return f"{name}: {one['whole_s']:.1f} s from start to adapter, of it {one['training_s'] or 0:.1f} s training"
    mfu = "" if one["mfu"] is None else f", MFU {one['mfu']:.1%}"
    gpu = "" if one["gpu_ms_per_step"] is None else f", {one['gpu_ms_per_step']:.1f} ms of GPU work"
    return f"{name}: {one['tokens_per_s']:,.0f} tokens/s, {one['step_ms']['median']:.1f} ms a step{gpu}{mfu}"


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
    parser.add_argument("--pairs", type=int, default=10_000, help="number of preference pairs to train on")
    parser.add_argument("--steps", type=int, default=30, help="number of timed optimizer steps, after the warm-up")
    parser.add_argument("--whole-steps", type=int, help="shorten the whole trainings to so many steps")
    parser.add_argument("--budget-s", type=float, default=480, help="start no measurement after so many seconds")
    parser.add_argument("--arm", choices=ARMS, action="append", help="measure only this one; may be repeated")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
