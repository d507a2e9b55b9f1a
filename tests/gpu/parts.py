"""The parts of tests/gpu/run: what each runs, how long it may take, and the loop that runs them within the budget.

Imports only the standard library, so that it starts at once.
"""

import ctypes
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
WITHOUT_CARD = os.environ.get("LLAMAREFINE_GPU_TESTS", "")
BUDGET_S = float(os.environ.get("LLAMAREFINE_GPU_BUDGET_S") or (36_000 if WITHOUT_CARD else 480))
_LEAST_S = 20  # below which no part is started
_SLOWER = {"": 1, "cpu": 10, "interpreter": 60}[WITHOUT_CARD]  # than a card; multiplies the parts' time limits
_BENCHMARK_S = 260
_OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b")


@dataclass(frozen=True)
class Part:
    """One process: pytest on `tests` with the expression `chosen`, or the benchmark."""

    backend: str
    shape: str
    limit_s: int
    tests: str
    chosen: str = ""
    alone: bool = False  # nothing else may run at the same time, because it measures durations

    @property
    def name(self) -> str:
        return " ".join(
            word for word in (self.tests.removeprefix("test_"), self.backend, self.shape, self.chosen) if word
        )

    def command(self, out: Path, limit_s: float) -> list[str]:
        """Return the command of the process."""
        if self.tests == "benchmark":
            options = ["--json", str(out / "benchmark.json"), "--markdown", str(out / "benchmark.md")]
            options += ["--budget-s", str(round(limit_s - 10))]
            if WITHOUT_CARD:
                options += ["--shape", "tiny", "--rows", "60", "--pairs", "24", "--steps", "2", "--whole-steps", "3"]
            return [sys.executable, "-m", "tests.bench.gpu", *options]
        chosen = f"{self.shape} and ({self.chosen})" if self.chosen else self.shape
        # tinyllama contains tiny, but no `tiny-` or `tiny]`.
        chosen = chosen if self.shape == "tinyllama" else f"not tinyllama and {chosen}"
        if self.tests == "test_contract":
            chosen = f"({chosen}) or requested_backend"  # a test that has no shape
        pytest = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--color=no"]
        return [*pytest, f"tests/gpu/{self.tests}.py", "-k", chosen]


# The most valuable first.
PARTS = (
    Part("packed", "tinyllama", 110, "test_packed_step", alone=True),
    Part("", "tinyllama", _BENCHMARK_S, "benchmark", alone=True),
    Part("packed", "tinyllama", 120, "test_contract", "none"),
    Part("packed", "tiny", 150, "test_processes", "sigterm_before or (resumes and sft)"),
    Part("packed", "tinyllama", 100, "test_memory", "none"),
    Part("packed", "tinyllama", 120, "test_processes", "memory"),
    Part("packed", "tiny", 150, "test_processes", "resumes and dpo"),
    Part("packed", "tiny", 90, "test_contract", "none"),
    Part("packed", "tiny", 100, "test_contract", "nf4"),
    Part("unsloth", "tiny", 150, "test_contract", "none"),
    Part("transformers", "tiny", 90, "test_contract", "none"),
    Part("transformers", "tiny", 150, "test_processes", "both"),
    Part("packed", "tiny", 90, "test_memory"),
    Part("unsloth", "tiny", 150, "test_contract", "nf4"),
    Part("unsloth", "tinyllama", 200, "test_contract", "none"),
    Part("unsloth", "tiny", 120, "test_memory"),
    Part("transformers", "tinyllama", 200, "test_processes", "both"),
    Part("packed", "tinyllama", 300, "test_processes", "resumes"),
    Part("packed", "tinyllama", 200, "test_contract", "nf4"),
)


@dataclass
class Run:
    """One run of all parts: when it began, and what became of each part."""

    out: Path
    began_s: float = field(default_factory=time.monotonic)
    results: dict[str, str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def say(self, text: str) -> None:
        with self._lock:
            print(f"[{time.monotonic() - self.began_s:6.1f} s] {text}", flush=True)

    def left_s(self) -> float:
        return BUDGET_S - (time.monotonic() - self.began_s)

    def run(self, part: Part) -> None:
        """Run one part; its process group ends at its time limit, or when the budget is spent."""
        if obstacle := _obstacle(part) or ("no time left" if self.left_s() < _LEAST_S else None):
            self.results[part.name] = f"not run: {obstacle}"
            self.say(f"{part.name}: not run: {obstacle}")
            return
        limit_s = min(part.limit_s * _SLOWER, self.left_s())
        environment = os.environ | {"LLAMAREFINE_GPU_FOLDER": str(self.out / "prepared"), "HF_HUB_OFFLINE": "1"}
        environment |= {"LLAMAREFINE_GPU_BACKEND": part.backend} if part.backend else {}
        began_s, stopped = time.monotonic(), threading.Event()
        process = subprocess.Popen(
            part.command(self.out, limit_s),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=environment,
            cwd=ROOT,
            start_new_session=True,
        )

        def stop() -> None:
            stopped.set()
            os.killpg(process.pid, signal.SIGKILL)  # also the stages that the part started

        timer = threading.Timer(limit_s, stop)
        timer.start()
        self._show(part, process)
        process.wait()
        timer.cancel()
        seconds = f"{time.monotonic() - began_s:.0f} s"
        if stopped.is_set():
            result = f"stopped after {seconds}; its remaining results were not measured"
        else:  # pytest's exit code 5: no test selected, although every part has tests
            result = f"passed in {seconds}" if process.returncode == 0 else f"FAILED in {seconds}"
        self.results[part.name] = result
        self.say(f"{part.name}: {result}")

    def _show(self, part: Part, process: "subprocess.Popen[str]") -> None:
        """Write all lines of a part to its file, and print those with results."""
        name = re.sub(r"\W+", "-", part.name)
        test = ""
        assert process.stdout
        with (self.out / f"{name}.txt").open("w", encoding="utf-8") as file:
            for line in process.stdout:
                file.write(line)
                file.flush()
                line = line.rstrip()
                if "::" in line and not line.startswith(("FAILED", "ERROR")):
                    test = line.split("::", 1)[1].split(" ")[0]
                if part.tests == "benchmark" or line.startswith(("figure: ", "E  ")):
                    self.say(f"{part.name}: {line.removeprefix('figure: ')}" if line else "")
                elif (found := _OUTCOME.search(line)) and line.endswith("%]"):
                    self.say(f"{part.name}: {found[1]} {test}")


def main(arguments: list[str]) -> int:
    """Run the parts; return the exit code."""
    if len(arguments) > 1 or (arguments and arguments[0] not in ("tests", "benchmark", "card")):
        print(
            f"tests/gpu/run: expected tests, benchmark, card or nothing, found {' '.join(arguments)}", file=sys.stderr
        )
        return 2
    if not WITHOUT_CARD and not has_card():
        print(
            "tests/gpu/run: expected a CUDA device, found none; LLAMAREFINE_GPU_TESTS=cpu runs the script without one",
            file=sys.stderr,
        )
        return 1
    if arguments == ["card"]:
        return 0
    parts = [part for part in PARTS if not arguments or (part.tests == "benchmark") is (arguments == ["benchmark"])]
    if WITHOUT_CARD:  # TinyLlama's shape needs a card; where the same part is there at both shapes, run it once
        parts = list(dict.fromkeys(_at_tiny_shape(part) for part in parts))
    run = Run(Path(os.environ.get("OUT", "gpu-results")).absolute())
    run.out.mkdir(parents=True, exist_ok=True)
    try:
        for part in parts:
            if part.alone:
                run.run(part)
        with ThreadPoolExecutor(1 if WITHOUT_CARD else int(os.environ.get("JOBS", "4"))) as pool:
            list(pool.map(run.run, (part for part in parts if not part.alone)))
    finally:
        shutil.rmtree(run.out / "prepared", ignore_errors=True)
    summary = "".join(f"{name}: {result}\n" for name, result in run.results.items())
    (run.out / "summary.txt").write_text(summary, encoding="utf-8")
    print(f"\n{summary}", end="", flush=True)
    return int(any(not result.startswith(("passed", "not run")) for result in run.results.values()))


def has_card() -> bool:
    """Return whether the driver has a CUDA device. Asks the driver, because importing torch takes seconds."""
    try:
        driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
    except OSError:
        return False
    return bool(driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0)


def _at_tiny_shape(part: Part) -> Part:
    return Part(part.backend, "tiny", part.limit_s, part.tests, part.chosen, part.alone)


def _obstacle(part: Part) -> str | None:
    """Return why this part cannot run here, or None."""
    if part.backend == "unsloth" and importlib.util.find_spec("unsloth") is None:
        return "Unsloth is not installed"
    if WITHOUT_CARD == "cpu" and (part.backend == "unsloth" or "nf4" in part.chosen or part.tests == "test_memory"):
        return "it needs a CUDA device, or the interpreter"
    if WITHOUT_CARD == "interpreter" and part.backend in ("packed", ""):
        return "Triton's interpreter cannot run the packed step"
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
