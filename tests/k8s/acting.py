"""Fake stages: they speak the stages' real protocol and publish tiny artifacts instead of training.

As a program, it is the process of a stage (``python acting.py sft --recipe FILE --store URI``). The environment
variable ACTING says what it does: ``{"sft": "diverge"}``. In a test, `FakeExecutor` publishes each artifact at once,
without a process. On a cluster, `patches` make the launcher's image run this program, from a ConfigMap, in place of
every stage.
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
LEARN_STEPS, LEARN_STEPS_PER_CHECKPOINT = 60, 20
LEARN_STEP_S, TRANSFER_DELAY_S = 0.15, 2.0  # long enough for a test to interrupt them
HANG_S = 600.0
MAP = "acting"


def write_output(folder: Path, stage: str, recipe: Recipe, writes: tuple[str, ...]) -> None:
    """Write files whose content depends on all that the stage's key depends on, so that its children change, too."""
    for name in writes:
        path = folder / name / "content.txt" if name.endswith("/") else folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps([stage, name, recipe.key_payload(stage)], sort_keys=True)
        path.write_text(json.dumps(report(recipe)) if name == "report.json" else text)


def report(recipe: Recipe) -> dict[str, Any]:
    """Return the content of a report.json in the real format. The loss of the merged model is 2."""
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


class FakeExecutor:
    """An executor that calls a test's act for a stage, if there is one, and then publishes its artifact at once."""

    def __init__(self, **acts: Callable[[Callable[[str], None]], None]) -> None:
        self.ran: list[str] = []
        self.acts = acts
        self.cancelled = 0
        self.running = False
        self.read_to: str | None = None

    def finish(self, task: Any, on_line: Callable[[str], None]) -> None:
        """Do nothing: no log is left unread."""

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
    """Publish the stage's artifact from this process."""
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
    """Do what ACTING says for the stage, then write its output."""
    name, digest = context.stage.name, None
    match act_of(name):
        case "diverge":
            raise DivergedError(f"{name}: the loss became NaN at step 3; lower {name}.learning_rate")
        case "bug":
            raise ZeroDivisionError("a bug")
        case "hoard memory":
            print(len(b"x" * (1 << 30)))
        case "kill itself":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hoard memory for each row":
            rows = context.recipe.sft.pass_rows
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
            digest = learn(context)
        case "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            print("progress stage=sft step=1 steps=2", flush=True)
            time.sleep(HANG_S)
    write_output(context.output, name, context.recipe, context.stage.writes)
    if digest:
        (context.output / "adapter" / "learnt.txt").write_text(digest)


def act_of(stage: str) -> str | None:
    """Return what ACTING says that a stage does."""
    act: str | None = json.loads(os.environ.get("ACTING", "{}")).get(stage)
    return act


def train(context: entry.Context) -> None:
    """Count steps for 40 s; on SIGTERM, or when the launcher has died, publish a checkpoint and raise PreemptedError.

    Resumed from a checkpoint, it counts the remaining steps without waiting.
    """
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
    """Take LEARN_STEPS steps, with regular checkpoints and one on SIGTERM; return a digest of all steps in order."""
    checkpoint = context.fetch_checkpoint()
    context.stop.defer_exit()
    step, digest = json.loads((checkpoint / "state.json").read_text()) if checkpoint else (0, "")
    while step < LEARN_STEPS:
        time.sleep(LEARN_STEP_S)
        step, digest = step + 1, hashlib.sha256(f"{digest} {step}".encode()).hexdigest()
        context.progress(step, LEARN_STEPS, loss=4.0 - step / LEARN_STEPS)
        must_stop = context.stop.is_set()
        if must_stop or (step % LEARN_STEPS_PER_CHECKPOINT == 0 and step < LEARN_STEPS):
            saved = context.work / f"checkpoint-{step}"
            saved.mkdir()
            (saved / "state.json").write_text(json.dumps([step, digest]))
            context.store.publish_checkpoint(step, saved, context.draft())
            context.note(f"kept a checkpoint at step {step}")
        if must_stop:
            raise PreemptedError(f"{context.stage.name} saved a checkpoint at step {step}")
    return digest


def slowed(stage: str, store: Store) -> Store:
    """Return `store` as behind a slow network: each transfer is printed first, then delayed."""
    print(f"{stage}: begins as {platform.node()}", flush=True)
    for verb in ("download", "upload", "create"):
        setattr(store.objects, verb, _delayed(stage, verb, getattr(store.objects, verb)))
    return store


def _delayed(stage: str, verb: str, transfer: Callable[..., Any]) -> Callable[..., Any]:
    def transfer_late(path: str, *arguments: Any) -> Any:
        sys.stdout.write(f"{stage}: {verb} {path}\n")  # one write, as threads transfer several files at once
        sys.stdout.flush()
        time.sleep(TRANSFER_DELAY_S)
        return transfer(path, *arguments)

    return transfer_late


def program_map() -> dict[str, Any]:
    """Return a ConfigMap that contains this program."""
    file = Path(__file__)
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": MAP}, "data": {file.name: file.read_text()}}


def patches(image: str, acting: str = "{}") -> dict[str, Any]:
    """Return the setting `patches` that runs this program in the launcher's image as every stage, with ACTING."""
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
    """Return an act that raises `error`."""

    def act(on_line: Callable[[str], None]) -> None:
        raise error

    return act


if __name__ == "__main__":
    entry.seeded_threads = lambda recipe: contextlib.nullcontext()  # nothing to seed, so torch is not imported
    name = sys.argv.pop(1)
    if act_of(name) == "learn":
        open_store = entry.open_store
        entry.open_store = lambda stage, uri: slowed(stage, open_store(stage, uri))
    entry.main(name, work)
