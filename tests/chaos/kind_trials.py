"""One trial on a cluster: a run from `submit` to its end, with one fault on the way, and what must hold afterwards."""

import contextlib
import math
import random
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llamarefine_jobs.contract.artifact import run_path
from llamarefine_jobs.contract.errors import LlamaRefineError
from llamarefine_jobs.contract.stages import SEQUENCE
from llamarefine_jobs.store import Store
from llamarefine_k8s.runs import records
from llamarefine_k8s.runs.pipeline import READ_TO
from tests.k8s.acting import LESSONS, LESSONS_A_CHECKPOINT
from tests.store import cutting_proxy

from .kind_faults import FAULTS, STAGE, UNHEARD, Scene, moment
from .kind_world import NAMESPACE, ON_THE_WORKER, World

_LONGEST_S = 900
_GLANCE_S = 0.3
_KEPT_S = 25.0  # a driver keeps a log every 15 s, and hears a line a little after it was said
_BEGINS = re.compile(rf"{STAGE}: begins as (\S+)")
_TRAINER_BEGINS = re.compile(rf"{STAGE}: makes ")
_RESUMES = re.compile(r"goes on from the checkpoint at step (\d+)")
_STEP = re.compile(r"^progress .*\bstep=(\d+)")
_DRIVERS_WORDS = re.compile(rf"^{STAGE}: (waits: |.*another pod continues$|.*its pod \S+ is abandoned$)|^llamarefine: ")


@dataclass
class Trial:
    """What a fault did and how it ended. `finding` is empty where everything was right."""

    number: int
    fault: str
    phase: str
    step: int = 0  # the last one that the stage had said when the fault came
    lasted_s: float | None = None
    recovered_s: float | None = (
        None  # from the fault until the run's record was further than the stage at the fault's end
    )
    steps_repeated: int | None = None
    stage_pods: int = 0
    driver_pods: int = 0
    cuts: int = 0
    content: dict[str, str] = field(default_factory=dict)
    finding: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Watched:
    """What was seen of a run's objects and of its stage's pods, look by look."""

    def __init__(self, api: Any, run: str) -> None:
        self._api, self._run = api, run
        self.jobs: dict[str, set[str]] = defaultdict(set)  # name -> uids
        self.pods: dict[str, dict[str, dict[str, str]]] = {"stage": {}, "driver": {}}  # role -> name -> phase and end
        self.said: dict[str, list[str]] = {}  # the stage's pod -> the whole lines of its log
        self.said_before: dict[str, list[str]] = {}  # the same at the fault
        self._looks: list[tuple[float, dict[str, list[str]]]] = []  # when, and what had been said
        self.ended: str | None = None  # the condition in which the driver's Job ended

    def look(self) -> None:
        """Look again; what cannot be seen now is left as it was."""
        selector = f"llamarefine/run={self._run}"
        with contextlib.suppress(Exception):  # the API server may be away, and a pod gone since it was listed
            for job in self._api.jobs.list_namespaced_job(NAMESPACE, label_selector=selector).items:
                self.jobs[job.metadata.name].add(job.metadata.uid)
                for condition in job.status.conditions or ():
                    if job.metadata.name == self._run and condition.status == "True":
                        self.ended = condition.type if condition.type in ("Complete", "Failed") else self.ended
            for pod in self._api.core.list_namespaced_pod(NAMESPACE, label_selector=selector).items:
                with contextlib.suppress(Exception):  # its node may be away
                    self._look_at(pod)

        self._looks.append((time.monotonic(), dict(self.said)))

    def said_at(self, at_s: float) -> dict[str, list[str]]:
        """What had been said by then, as far as it was seen."""
        return next((said for when_s, said in reversed(self._looks) if when_s <= at_s), {})

    def now(self, role: str) -> list[str]:
        """The pods that run and are not told to go."""
        return [name for name, phase in self.pods[role].items() if phase == {"phase": "Running"}]

    def _look_at(self, pod: Any) -> None:
        stage = pod.metadata.labels.get("llamarefine/stage")
        if stage not in (None, STAGE):
            return
        if stage and pod.status.phase != "Pending":  # first: a pod that ended by now has said all that is read here
            text = self._api.core.read_namespaced_pod_log(pod.metadata.name, NAMESPACE)
            lines = text[: text.rfind("\n") + 1].splitlines()
            if len(lines) < len(self.said.get(pod.metadata.name, [])) or (not lines and pod.status.phase != "Running"):
                return  # the node answers for a log that is gone
            self.said[pod.metadata.name] = lines
        going = {"going": "yes"} if pod.metadata.deletion_timestamp else {}
        self.pods["stage" if stage else "driver"][pod.metadata.name] = {"phase": pod.status.phase} | going


def carry_out(trial: Trial, world: World, api: Any, folder: Path, seed: int) -> Trial:
    """Carry `trial` out; what is wrong is its `finding`."""
    draw = random.Random(f"{seed} {trial.number}")
    try:
        with contextlib.ExitStack() as stack:
            proxy = None
            if trial.fault == "cut connections":
                proxy = stack.enter_context(cutting_proxy.before(world.endpoint, world.gateway()))
            if trial.fault == "lose node":
                stack.enter_context(world.lending_worker())
            _carry_out(trial, world, api, folder, draw, proxy)
            trial.cuts = proxy.connections if proxy else 0
    except (Exception, AssertionError) as error:
        trial.finding = trial.finding or f"{type(error).__name__}: {error}"
    return trial


def _carry_out(trial: Trial, world: World, api: Any, folder: Path, draw: random.Random, proxy: Any) -> None:
    folder.mkdir()
    recipe = folder / "recipe.yaml"
    recipe.write_text((_TRAINED if world.trains else _ACTED).format(name=f"chaos-{trial.number}"))
    launcher = world.launcher(folder, proxy and proxy.endpoint)
    if world.trains:
        launcher.settle()
    else:
        launcher.act(f'{{"{STAGE}": "learn"}}', **(ON_THE_WORKER if trial.fault == "lose node" else {}))
    began_s = time.monotonic()
    code, said = launcher.run("submit", str(recipe), "--detach")
    found = re.search(rf"chaos-{trial.number}-[0-9a-f]{{8}}", said)
    assert code == 0, said
    assert found, said
    store, run = Store(launcher.settings["store"]), found[0]
    watched = Watched(api, run)

    def cut() -> None:
        with proxy.away(0.3):
            pass

    is_there = moment(trial.phase, draw)
    with ThreadPoolExecutor(1) as pool:
        struck: Future[None] | None = None
        reached: float | None = None  # the newest step when the fault was over
        for _ in _looks(watched):
            pods = watched.now("stage")
            if struck is None and pods and is_there(watched.said.get(pods[-1], [])):
                scene = Scene(
                    world,
                    draw,
                    {"stage": pods, "driver": watched.now("driver")},
                    cut,
                    lambda: watched.ended is not None,
                )
                trial.step = max(_steps(watched.said.get(pods[-1], [])), default=0)
                # Where the bucket goes with driver and stage, what the driver had last kept there is all that is left.
                early_s = _KEPT_S if trial.fault == "drain node" else 0
                watched.said_before = watched.said_at(time.monotonic() - early_s)
                struck_s, struck = time.monotonic(), pool.submit(FAULTS[trial.fault], scene)
            if reached is None and struck and struck.done():
                said = [step for lines in watched.said.values() for step in _steps(lines)]
                reached = max([*said, _recorded_step(store, run)])
            if trial.recovered_s is None and reached is not None and _recorded_step(store, run) > reached:
                trial.recovered_s = round(time.monotonic() - struck_s, 1)
        assert struck, f"never in the phase {trial.phase}: {watched.said}"
        struck.result()
    trial.lasted_s = round(time.monotonic() - began_s, 1)
    trial.stage_pods, trial.driver_pods = len(watched.pods["stage"]), len(watched.pods["driver"])
    trial.finding = "; ".join(_judge(trial, store, run, watched, trains=world.trains))


def _looks(watched: Watched) -> Iterator[None]:
    """A look at a time until the driver's Job is over."""
    until_s = time.monotonic() + _LONGEST_S
    while not watched.ended:
        assert time.monotonic() < until_s, f"not over after {_LONGEST_S} s; seen: {watched.pods}"
        watched.look()
        yield
        time.sleep(_GLANCE_S)
    watched.look()


def _recorded_step(store: Store, run: str) -> float:
    """How far the run's record says that the stage is; beyond every step once it is done."""
    with contextlib.suppress(LlamaRefineError):  # the bucket may be away
        record = records.load(store, run)
        stage = record.stages[STAGE] if record else records.StageRecord()
        if stage.state in ("done", "reused"):
            return math.inf
        return stage.progress.step if stage.progress else 0
    return 0


def _judge(trial: Trial, store: Store, run: str, watched: Watched, *, trains: bool) -> Iterator[str]:
    """What is wrong with a run that is over."""
    record = records.load(store, run)
    if watched.ended != "Complete" or record is None or record.state != "done":
        yield f"the driver's Job ended {watched.ended}: {record and record.state}, {record and record.error}"
        return
    expected = {run, *(f"{run}-{stage}" for stage in SEQUENCE)}
    if set(watched.jobs) != expected or any(len(uids) > 1 for uids in watched.jobs.values()):
        yield f"other Jobs than one for each stage: {dict(watched.jobs)}"
    key = {stage: record.stages[stage].key for stage in SEQUENCE}
    for stage in SEQUENCE:
        manifest = store.manifest(stage, key[stage] or "")
        assert manifest, stage
        store.verify(manifest)
        if not (trains and stage == "evaluate"):  # a real report says when it was made
            trial.content |= {f"{stage}/{file.path}": file.sha256 for file in manifest.files}
    if left := store.checkpoint_steps(STAGE, key[STAGE] or ""):
        yield f"checkpoints are left: {left}"
    data = store.read(run_path(run, "logs", f"{STAGE}.log")) or b""
    kept = [line for line in data.decode().splitlines() if not _DRIVERS_WORDS.search(line) and READ_TO not in line]
    yield from (_compare_trainers_log if trains else _compare_log)(trial, kept, watched)


def _compare_trainers_log(trial: Trial, kept: list[str], watched: Watched) -> Iterator[str]:
    """The kept log has each line that was seen, and the steps of one pod after the other without a gap."""
    seen = watched.said_before if trial.fault in UNHEARD else watched.said
    if lost := Counter(line for lines in seen.values() for line in lines) - Counter(kept):
        yield f"the log lacks {sorted(lost)}"
    begins = [number for number, line in enumerate(kept) if _TRAINER_BEGINS.match(line)]
    parts = [kept[first:after] for first, after in zip(begins, [*begins[1:], len(kept)], strict=True)]
    yield from _compare_steps(trial, parts)
    if (reached := max(_steps(kept), default=0)) != LESSONS:
        yield f"the log ends at step {reached}"


def _compare_log(trial: Trial, kept: list[str], watched: Watched) -> Iterator[str]:
    """The kept log is that of each pod, one after the other; of a pod that is gone we know what was seen last."""
    parts: dict[str, list[str]] = {}
    part: list[str] = []
    for line in kept:
        if begins := _BEGINS.match(line):
            if begins[1] in parts:
                yield f"the log has the beginning of {begins[1]} twice"
            part = parts.setdefault(begins[1], [])
        part.append(line)
    for pod, lines in watched.said.items():
        there = parts.get(pod, [])
        is_whole = watched.pods["stage"][pod]["phase"] in ("Succeeded", "Failed")
        if trial.fault in UNHEARD:  # what the stage says without a driver goes with its pod
            before = watched.said_before.get(pod, [])
            is_right = there[: len(before)] == before and (there[: len(lines)] == lines or lines[: len(there)] == there)
        else:
            is_right = there == lines if is_whole else there[: len(lines)] == lines
        if not is_right:
            more, lost = (sorted(set(one) - set(other)) for one, other in ((there, lines), (lines, there)))
            yield f"the log of {pod} has {more} more than was seen, and lacks {lost}"
    yield from _compare_steps(trial, parts.values())


def _compare_steps(trial: Trial, parts: Iterable[list[str]]) -> Iterator[str]:
    """Of a stage's pods, one after the other, each goes on with the step after its checkpoint, and misses none."""
    trial.steps_repeated, reached = 0, 0
    for lines in parts:
        resumed = next((int(found[1]) for line in lines if (found := _RESUMES.search(line))), 0)
        steps = [step for step in _steps(lines) if step != resumed]  # a trainer says that one, too
        is_gap = resumed > reached and trial.fault not in UNHEARD
        if is_gap or steps != list(range(resumed + 1, resumed + 1 + len(steps))):
            yield f"a pod went on from {resumed} after {reached}, and its log has the steps {steps}"
        trial.steps_repeated += max(0, min(reached, resumed + len(steps)) - resumed)
        reached = max(reached, resumed + len(steps))


def _steps(lines: list[str]) -> list[int]:
    return [int(found[1]) for line in lines if (found := _STEP.match(line))]


_ACTED = """\
name: {name}
prepare:
  base: {{source: tiny-llama}}
  questions: {{source: python-docstrings}}
  preferences: {{source: python-docstrings}}
"""
_TRAINED = f"""\
name: {{name}}
seed: 7
max_length_tokens: 128
cpu_threads: 1
prepare:
  base: {{{{source: tiny-llama, tiny: {{{{steps: 20}}}}}}}}
  questions: {{{{source: python-docstrings}}}}
  preferences: {{{{source: python-docstrings}}}}
  max_rows: 300
  too_long: truncate
sft: {{{{max_steps: {LESSONS}, learning_rate: 2.0e-3, batch_rows: 32, micro_batch_rows: 8, log_every_steps: 1,
  checkpoint_every_steps: {LESSONS_A_CHECKPOINT}}}}}
dpo: {{{{max_steps: 10, learning_rate: 4.0e-4, batch_rows: 8, micro_batch_rows: 8}}}}
evaluate: {{{{generated_rows: 2, max_new_tokens: 4, bootstrap_resamples: 100}}}}
"""
