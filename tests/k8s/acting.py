"""Stages that act: they speak the stages' real protocol and make tiny artifacts instead of training.

As a program it is a stage's process (``python acting.py sft --recipe FILE --store URI``), told by
ACTING what to do: ``{"sft": "diverge"}``. In a test `Acting` is an executor that publishes at once.
On a cluster `patches` make the launcher's image play every stage, the program in a ConfigMap.
"""

import contextlib
import hashlib
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llamarefine_jobs import entry
from llamarefine_jobs.contract.artifact import Manifest, Parent, artifact_key
from llamarefine_jobs.contract.errors import DivergedError, LlamaRefineError, PreemptedError
from llamarefine_jobs.contract.prompt import TEMPLATE_SHA256
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.stages import SEQUENCE, STAGES
from llamarefine_jobs.contract.version import __version__
from llamarefine_jobs.store import Store

STEPS = 400
LESSONS, LESSONS_A_CHECKPOINT = 60, 20
LESSON_S, CARRY_S = 0.15, 2.0  # long enough to be found at it
MAP = "acting"


def write_output(folder: Path, stage: str, recipe: Recipe, writes: tuple[str, ...]) -> None:
    """Files that depend on what the stage's key depends on, so that a change goes on to its children."""
    for name in writes:
        path = folder / name / "content.txt" if name.endswith("/") else folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps([stage, name, recipe.key_payload(stage)], sort_keys=True)
        path.write_text(json.dumps(report(recipe)) if name == "report.json" else text)


def report(recipe: Recipe) -> dict[str, Any]:
    """A report.json of the agreed shape; its merged loss is 2."""
    values = {
        name: {"value": value, "low": value - 0.1, "high": value + 0.1}
        for name, value in (("base", 4.0), ("sft", 2.5), ("merged", 2.0))
    }
    change = {"from": "base", "to": "merged", "value": -2.0, "low": -2.2, "high": -1.8, "verdict": "better"}
    gates = [
        {
            "metric": gate.metric,
            "model": gate.model,
            "bound": f"at_most {gate.at_most}",
            "value": 2.0,
            "passed": (gate.at_most or 0) >= 2.0,
        }
        for gate in recipe.evaluate.gates
    ]
    return {
        "models": ["base", "sft", "merged"],
        "metrics": [
            {"name": "loss", "title": "Held-out loss", "better": "lower", "n": 9, "values": values, "changes": [change]}
        ],
        "examples": [
            {
                "question": "What is kind?",
                "reference": "A cluster.",
                "answers": {"base": "Hm.", "sft": "A thing.", "merged": "A cluster, \x1b[31mtruly."},
            }
        ],
        "gates": gates,
        "confidence": 0.95,
        "caveats": ["nine rows are few"],
    }


class Acting:
    """An executor that publishes each stage's artifact at once, and does before that what a test asks."""

    def __init__(self, **acts: Callable[[Callable[[str], None]], None]) -> None:
        self.ran: list[str] = []
        self.acts = acts
        self.cancelled = 0
        self.running = False
        self.read_to: str | None = None

    def finish(self, task: Any, on_line: Callable[[str], None]) -> None:
        """Nothing is left to read."""

    def execute(self, task: Any, on_line: Callable[[str], None]) -> None:
        self.ran.append(task.stage)
        self.running = True
        try:
            on_line(f"{task.stage}: backend: acting")
            self.acts.get(task.stage, lambda on_line: None)(on_line)
            publish(task.stage, task.recipe, Store(task.store_uri))
        finally:
            self.running = False

    def cancel(self) -> bool:
        self.cancelled += 1
        return self.running


def publish(stage: str, recipe: Recipe, store: Store) -> Manifest:
    """Publish what `work` makes, in this process."""
    parents = entry.find_parents(stage, recipe, store)
    now = datetime.now(UTC)
    draft = Manifest(
        stage=stage,
        key=artifact_key(stage, recipe, parents),
        parents={name: Parent(key=parent.key, manifest_sha256=parent.sha256()) for name, parent in parents.items()},
        recipe=recipe.key_payload(stage),
        seed=recipe.seed,
        prompt_template_sha256=TEMPLATE_SHA256,
        package_version=__version__,
        started_at=now,
        finished_at=now,
    )
    with tempfile.TemporaryDirectory() as folder:
        write_output(Path(folder), stage, recipe, STAGES[stage].writes)
        return store.publish(Path(folder), draft)


def work(context: entry.Context) -> None:
    """The stage's part, as ACTING says."""
    name, learnt = context.stage.name, None
    match act_of(name):
        case "diverge":
            raise DivergedError(f"{name}: the loss became NaN at step 3; lower {name}.learning_rate")
        case "bug":
            raise ZeroDivisionError("a mistake of ours")
        case "hoard memory":
            print(len(b"x" * (1 << 30)))
        case "kill itself":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hoard memory for each row":
            rows = context.recipe.sft.micro_batch_rows
            print(f"hoards for {rows} rows", len(b"x" * (rows * 64 << 20)), flush=True)
        case "say much":
            print("\x1b[31mred\x1b[0m noise of a library\rredrawn noise", flush=True)
            sys.stdout.write("no newline at the end")
        case "many steps":
            for step in range(1, 501):
                context.progress(step, 500, loss=3.0, tokens_per_s=5120.0, eta_s=65.0)
        case "train":
            train(context)
        case "learn":
            learnt = learn(context)
        case "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            print("progress stage=sft step=1 steps=2", flush=True)
            time.sleep(600)
    write_output(context.output, name, context.recipe, context.stage.writes)
    if learnt:
        (context.output / "adapter" / "learnt.txt").write_text(learnt)


def act_of(stage: str) -> str | None:
    """What ACTING says that a stage shall do."""
    act: str | None = json.loads(os.environ.get("ACTING", "{}")).get(stage)
    return act


def train(context: entry.Context) -> None:
    """Count steps for half a minute; on SIGTERM, or when the launcher is gone, publish a checkpoint and end."""
    checkpoint = context.fetch_checkpoint()
    context.stop.defer_exit()
    first = int((checkpoint / "step").read_text()) if checkpoint else 0
    for step in range(first + 1, STEPS + 1):
        context.progress(step, STEPS, loss=4.0 - step / STEPS, tokens_per_s=5120.0, eta_s=(STEPS - step) / 10)
        if context.stop.is_set():
            saved = context.work / "checkpoint"
            saved.mkdir()
            (saved / "step").write_text(str(step))
            context.store.publish_checkpoint(step, saved, context.draft())
            raise PreemptedError(f"{context.stage.name} saved a checkpoint at step {step}")
        if not checkpoint:
            time.sleep(0.1)


def learn(context: entry.Context) -> str:
    """Take LESSONS steps, with a checkpoint now and then and on SIGTERM. The result needs each step once, in order."""
    checkpoint = context.fetch_checkpoint()
    context.stop.defer_exit()
    step, learnt = json.loads((checkpoint / "state.json").read_text()) if checkpoint else (0, "")
    while step < LESSONS:
        time.sleep(LESSON_S)
        step, learnt = step + 1, hashlib.sha256(f"{learnt} {step}".encode()).hexdigest()
        context.progress(step, LESSONS, loss=4.0 - step / LESSONS)
        told = context.stop.is_set()
        if told or (step % LESSONS_A_CHECKPOINT == 0 and step < LESSONS):
            saved = context.work / f"checkpoint-{step}"
            saved.mkdir()
            (saved / "state.json").write_text(json.dumps([step, learnt]))
            context.store.publish_checkpoint(step, saved, context.draft())
            context.note(f"kept a checkpoint at step {step}")
        if told:
            raise PreemptedError(f"{context.stage.name} saved a checkpoint at step {step}")
    return learnt


def slowed(stage: str, store: Store) -> Store:
    """`store` behind a slow network: what it carries it names first, and waits."""
    print(f"{stage}: begins as {platform.node()}", flush=True)
    for verb in ("download", "upload", "create"):
        setattr(store.objects, verb, _late(stage, verb, getattr(store.objects, verb)))
    return store


def _late(stage: str, verb: str, carry: Callable[..., Any]) -> Callable[..., Any]:
    def carry_late(path: str, *arguments: Any) -> Any:
        sys.stdout.write(f"{stage}: {verb} {path}\n")  # at once: files are carried side by side
        sys.stdout.flush()
        time.sleep(CARRY_S)
        return carry(path, *arguments)

    return carry_late


def program_map() -> dict[str, Any]:
    """This program as a ConfigMap."""
    file = Path(__file__)
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": MAP}, "data": {file.name: file.read_text()}}


def patches(image: str, acting: str = "{}") -> dict[str, Any]:
    """The setting that makes `image`, the launcher's, act as every stage as `acting` says."""
    container = {
        "name": "stage",
        "image": image,
        "env": [{"name": "ACTING", "value": acting}],
        "volumeMounts": [{"name": MAP, "mountPath": "/acting"}],
    }
    pod = {"volumes": [{"name": MAP, "configMap": {"name": MAP}}], "containers": [container]}
    pods = {"all": pod} | {
        stage: {"containers": [{"name": "stage", "command": ["python", "/acting/acting.py", stage]}]}
        for stage in SEQUENCE
    }
    return {name: {"spec": {"template": {"spec": pod}}} for name, pod in pods.items()}


def fail(error: LlamaRefineError) -> Callable[[Callable[[str], None]], None]:
    """An act that raises."""

    def act(on_line: Callable[[str], None]) -> None:
        raise error

    return act


if __name__ == "__main__":
    entry.seeded_threads = lambda recipe: contextlib.nullcontext()  # no training, nothing to seed: torch stays out
    name = sys.argv.pop(1)
    if act_of(name) == "learn":
        open_store = entry.open_store
        entry.open_store = lambda stage, uri: slowed(stage, open_store(stage, uri))
    entry.main(name, work)
