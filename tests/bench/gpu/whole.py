"""Whole trainings, really run: a stage as a process on published artifacts, from its imports to the adapter."""

import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.gpu.shapes import Shape

_STEP = re.compile(r"^progress .*\bstep=(\d+) steps=(\d+)")
_HELD_OUT = {"validation": 0.05, "test": 0.10}  # as in the recipe
_DIALOGUE_TOKENS, _ANSWER_TOKENS = 100, 50  # of a pair, on average, as in the first user's preference data


def write_prepared(folder: Path, shape: Shape, rows: list[tuple[str, str]], pairs: int) -> Path:
    """Write a prepare artifact with all questions, and so many made-up preference pairs to train on."""
    from tests.gpu import shapes
    from tests.jobs import tiny

    shapes.write_prepared(folder, shape, rows, **_HELD_OUT)
    for split, count in (("train", pairs), ("validation", max(2, pairs // 20)), ("test", max(2, pairs // 20))):
        tiny._write_rows(folder / "preferences" / f"{split}.jsonl", list(_pairs(rows, count, split)))
    return folder


def _pairs(rows: list[tuple[str, str]], count: int, seed: str) -> Iterator[dict[str, Any]]:
    """Yield pairs whose answers share a dialogue of several turns; texts are those of `rows`, drawn at random."""
    draw = random.Random(seed)

    def words(mean_tokens: int) -> int:  # some 1.4 tokens a word; lengths differ as in real data
        return max(2, round(draw.lognormvariate(0, 0.5) / 1.13 * mean_tokens / 1.4))

    def answer() -> str:
        text, least = "", words(_ANSWER_TOKENS)
        while len(text.split()) < least:
            text += " " + draw.choice(rows)[1]
        return " ".join(text.split()[:least])

    for place in range(count):
        messages: list[dict[str, str]] = []
        least, used = words(_DIALOGUE_TOKENS), 0
        while True:
            question, reply = (" ".join(text.split()[:60]) for text in draw.choice(rows))
            messages.append({"role": "user", "content": question})
            used += len(question.split()) + len(reply.split())
            if used >= least:
                break
            messages.append({"role": "assistant", "content": reply})
        yield {"prompt": messages, "chosen": answer(), "rejected": answer(), "group": f"{place:x}"}


def publish(prepared: Path, folder: Path, overrides: list[str]) -> tuple[Path, Path]:
    """Publish `prepared` into a new store; return the recipe's file and the store."""
    import yaml
    from tests.bench.gpu.training import MADE_UP_SOURCES, RECIPE
    from tests.jobs import tiny

    from llamarefine_jobs.recipe_file import load_recipe
    from llamarefine_jobs.sources.pinning import pin
    from llamarefine_jobs.store import Store

    folder.mkdir()
    recipe, store = folder / "recipe.yaml", folder / "store"
    loaded = load_recipe(RECIPE, [*MADE_UP_SOURCES, *overrides])
    recipe.write_text(yaml.safe_dump(loaded.model_dump(mode="json")))
    tiny.publish_prepared(Store(str(store)), prepared, pin(load_recipe(recipe, ())))
    return recipe, store


def run_stage(stage: str, recipe: Path, store: Path, limit_s: float) -> dict[str, Any]:
    """Run a stage to its end, or stop it after `limit_s` seconds; return how long its phases took."""
    began_s = time.monotonic()
    command = [sys.executable, "-m", f"llamarefine_jobs.{stage}", "--recipe", str(recipe), "--store", str(store)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    timer = threading.Timer(limit_s, process.kill)
    timer.start()
    lines, at_s, step, steps = [], {}, 0, 0
    assert process.stdout
    for line in process.stdout:
        now_s = time.monotonic() - began_s
        lines.append(line.rstrip())
        print(f"whole {stage} {now_s:.1f} s: {line.rstrip()[:160]}", file=sys.stderr, flush=True)
        if line.startswith(f"{stage}: backend"):
            at_s["backend"] = now_s
        if found := _STEP.match(line):
            step, steps = int(found[1]), int(found[2])
            at_s.setdefault("prepared" if step == 0 else "first_logged", now_s)
            at_s["last_step"] = now_s
    process.wait()
    timer.cancel()
    seconds = time.monotonic() - began_s
    error = None
    if process.returncode:
        stopped = process.returncode == -signal.SIGKILL
        what = f"stopped after {limit_s:.0f} s" if stopped else f"exit code {process.returncode}"
        error = f"{what} at step {step} of {steps}; last line: {lines[-1] if lines else 'none'}"
    return {
        "arm": "ours",
        "stage": stage,
        "name": f"whole {stage}",
        "whole_s": None if error else seconds,
        "start_to_backend_s": at_s.get("backend"),
        "start_to_prepared_s": at_s.get("prepared"),
        "start_to_first_logged_step_s": at_s.get("first_logged"),
        "training_s": at_s["last_step"] - at_s["prepared"] if "prepared" in at_s and not error else None,
        "steps": steps,
        "slower_ways": [line for line in lines if "which is slower" in line],
        "notes": [line for line in lines if line.startswith(f"{stage}: ")],
        "error": error,
    }
