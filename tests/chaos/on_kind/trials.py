"""One trial on a cluster: submit a run, apply one fault, watch the run to its end, and check its artifacts and log."""

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
from tests.k8s.acting import LEARN_STEPS, LEARN_STEPS_PER_CHECKPOINT
from tests.store import cutting_proxy

from .faults import FAULTS, LOSES_LINES, STAGE, Target, phase_test
from .namespace import NAMESPACE, ON_THE_WORKER, ChaosNamespace

_DEADLINE_S = 900  # of a whole run
_POLL_S = 0.3
_LOG_DELAY_S = 25.0  # a driver writes the log to the bucket every 15 s, and reads a line some time after it is printed
_BEGINS = re.compile(rf"{STAGE}: begins as (\S+)")
_TRAINER_BEGINS = re.compile(rf"{STAGE}: makes ")
_RESUMES = re.compile(r"resumes from the checkpoint at step (\d+)")
_STEP = re.compile(r"^progress .*\bstep=(\d+)")
_DRIVER_LINE = re.compile(rf"^{STAGE}: (waits: |.*another pod continues$|.*its pod \S+ is abandoned$)|^llamarefine: ")


@dataclass
class Trial:
    """The fault of a trial and how its run ended. `finding` says what is wrong; it is empty if everything is right."""

    number: int
    fault: str
    phase: str
    step: int = 0  # the last step that the stage had printed when the fault began
    lasted_s: float | None = None
    # From the fault's begin until the run's record shows a later step than the stage had reached at the fault's end.
    recovered_s: float | None = None
    steps_repeated: int | None = None
    stage_pods: int = 0
    driver_pods: int = 0
    proxied_connections: int = 0
    content: dict[str, str] = field(default_factory=dict)
    finding: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the trial as values that json can write."""
        return asdict(self)


class RunObserver:
    """Polls the API for the Jobs and pods of a run and for the logs of the stage that is disturbed."""

    def __init__(self, api: Any, run: str) -> None:
        self._api, self._run = api, run
        self.jobs: dict[str, set[str]] = defaultdict(set)  # name -> uids
        # role -> name -> phase, and whether it is being deleted
        self.pods: dict[str, dict[str, dict[str, str]]] = {"stage": {}, "driver": {}}
        self.logs: dict[str, list[str]] = {}  # the stage's pod -> the complete lines of its log
        self.logs_before_fault: dict[str, list[str]] = {}
        self._history: list[tuple[float, dict[str, list[str]]]] = []  # the time of each poll, and the logs then
        self.ended: str | None = None  # the condition with which the driver's Job ended

    def poll(self) -> None:
        """Read the run's objects again. What cannot be read now keeps its last state."""
        selector = f"llamarefine/run={self._run}"
        with contextlib.suppress(Exception):  # the API server may be down, or a pod removed since it was listed
            for job in self._api.jobs.list_namespaced_job(NAMESPACE, label_selector=selector).items:
                self.jobs[job.metadata.name].add(job.metadata.uid)
                for condition in job.status.conditions or ():
                    if job.metadata.name == self._run and condition.status == "True":
                        self.ended = condition.type if condition.type in ("Complete", "Failed") else self.ended
            for pod in self._api.core.list_namespaced_pod(NAMESPACE, label_selector=selector).items:
                with contextlib.suppress(Exception):  # its node may not answer
                    self._read_pod(pod)
        self._history.append((time.monotonic(), dict(self.logs)))

    def logs_at(self, at_s: float) -> dict[str, list[str]]:
        """Return the logs of the last poll before `at_s`."""
        return next((logs for when_s, logs in reversed(self._history) if when_s <= at_s), {})

    def running_pods(self, role: str) -> list[str]:
        """Return the names of the pods that run and are not being deleted."""
        return [name for name, phase in self.pods[role].items() if phase == {"phase": "Running"}]

    def _read_pod(self, pod: Any) -> None:
        stage = pod.metadata.labels.get("llamarefine/stage")
        if stage not in (None, STAGE):
            return
        if stage and pod.status.phase != "Pending":
            # Read the log before storing the phase, so that the log of a pod that has ended is complete.
            text = self._api.core.read_namespaced_pod_log(pod.metadata.name, NAMESPACE)
            lines = text[: text.rfind("\n") + 1].splitlines()
            if len(lines) < len(self.logs.get(pod.metadata.name, [])) or (not lines and pod.status.phase != "Running"):
                return  # the log was removed, and the node answers with an empty or shorter one
            self.logs[pod.metadata.name] = lines
        deleting = {"deleting": "yes"} if pod.metadata.deletion_timestamp else {}
        self.pods["stage" if stage else "driver"][pod.metadata.name] = {"phase": pod.status.phase} | deleting


def run_trial(trial: Trial, namespace: ChaosNamespace, api: Any, folder: Path, seed: int) -> Trial:
    """Run `trial` and fill in its results; an error becomes its `finding`."""
    draw = random.Random(f"{seed} {trial.number}")
    try:
        with contextlib.ExitStack() as stack:
            proxy = None
            if trial.fault == "cut connections":
                proxy = stack.enter_context(cutting_proxy.before(namespace.endpoint, namespace.gateway()))
            if trial.fault == "lose node":
                stack.enter_context(namespace.stages_on_worker())
            _submit_and_disturb(trial, namespace, api, folder, draw, proxy)
            if proxy:
                trial.proxied_connections = proxy.connections
                if not proxy.connections:
                    trial.finding = trial.finding or "no pod connected to the bucket through the proxy, so none was cut"
    except (Exception, AssertionError) as error:
        trial.finding = trial.finding or f"{type(error).__name__}: {error}"
    return trial


def _submit_and_disturb(
    trial: Trial, namespace: ChaosNamespace, api: Any, folder: Path, draw: random.Random, proxy: Any
) -> None:
    folder.mkdir()
    recipe = folder / "recipe.yaml"
    recipe.write_text((TRAINED_RECIPE if namespace.trains else _ACTED_RECIPE).format(name=f"chaos-{trial.number}"))
    launcher = namespace.launcher(folder, proxy and proxy.endpoint)
    if namespace.trains:
        launcher.write_settings()
    else:
        launcher.act(f'{{"{STAGE}": "learn"}}', **(ON_THE_WORKER if trial.fault == "lose node" else {}))
    began_s = time.monotonic()
    code, output = launcher.run("submit", str(recipe), "--detach")
    found = re.search(rf"chaos-{trial.number}-[0-9a-f]{{8}}", output)
    assert code == 0, output
    assert found, output
    store, run = Store(launcher.settings["store"]), found[0]
    observer = RunObserver(api, run)

    def cut() -> None:
        with proxy.away(0.3):
            pass

    is_in_phase = phase_test(trial.phase, draw)
    with ThreadPoolExecutor(1) as pool:
        fault: Future[None] | None = None
        reached: float | None = None  # the newest step when the fault was over
        for _ in _polls(observer):
            pods = observer.running_pods("stage")
            if fault is None and pods and is_in_phase(observer.logs.get(pods[-1], [])):
                target = Target(
                    namespace,
                    draw,
                    {"stage": pods, "driver": observer.running_pods("driver")},
                    cut,
                    lambda: observer.ended is not None,
                )
                trial.step = max(_steps(observer.logs.get(pods[-1], [])), default=0)
                # If the bucket stops with driver and stage, only the lines that the driver had written there are left.
                early_s = _LOG_DELAY_S if trial.fault == "drain node" else 0
                observer.logs_before_fault = observer.logs_at(time.monotonic() - early_s)
                fault_s, fault = time.monotonic(), pool.submit(FAULTS[trial.fault], target)
            if reached is None and fault and fault.done():
                printed = [step for lines in observer.logs.values() for step in _steps(lines)]
                reached = max([*printed, _recorded_step(store, run)])
            if trial.recovered_s is None and reached is not None and _recorded_step(store, run) > reached:
                trial.recovered_s = round(time.monotonic() - fault_s, 1)
        assert fault, f"the run never reached the phase {trial.phase}: {observer.logs}"
        fault.result()
    trial.lasted_s = round(time.monotonic() - began_s, 1)
    trial.stage_pods, trial.driver_pods = len(observer.pods["stage"]), len(observer.pods["driver"])
    trial.finding = "; ".join(_problems(trial, store, run, observer, trains=namespace.trains))


def _polls(observer: RunObserver) -> Iterator[None]:
    """Poll until the driver's Job has ended, and yield after each poll but the last."""
    until_s = time.monotonic() + _DEADLINE_S
    while not observer.ended:
        assert time.monotonic() < until_s, f"the run has not ended after {_DEADLINE_S} s; pods: {observer.pods}"
        observer.poll()
        yield
        time.sleep(_POLL_S)
    observer.poll()


def _recorded_step(store: Store, run: str) -> float:
    """Return the step of the stage in the run's record; infinity once the stage is done."""
    with contextlib.suppress(LlamaRefineError):  # the bucket may be down
        record = records.load(store, run)
        stage = record.stages[STAGE] if record else records.StageRecord()
        if stage.state in ("done", "reused"):
            return math.inf
        return stage.progress.step if stage.progress else 0
    return 0


def _problems(trial: Trial, store: Store, run: str, observer: RunObserver, *, trains: bool) -> Iterator[str]:
    """Yield what is wrong with a run that has ended, and fill in the digests of its artifacts."""
    record = records.load(store, run)
    if observer.ended != "Complete" or record is None or record.state != "done":
        yield f"the driver's Job ended {observer.ended}: {record and record.state}, {record and record.error}"
        return
    expected = {run, *(f"{run}-{stage}" for stage in SEQUENCE)}
    if set(observer.jobs) != expected or any(len(uids) > 1 for uids in observer.jobs.values()):
        yield f"expected one Job for each stage, found {dict(observer.jobs)}"
    key = {stage: record.stages[stage].key for stage in SEQUENCE}
    for stage in SEQUENCE:
        manifest = store.manifest(stage, key[stage] or "")
        assert manifest, stage
        store.verify(manifest)
        if not (trains and stage == "evaluate"):  # a real report contains times
            trial.content |= {f"{stage}/{file.path}": file.sha256 for file in manifest.files}
    if left := store.checkpoint_steps(STAGE, key[STAGE] or ""):
        yield f"checkpoints are left: {left}"
    data = store.read(run_path(run, "logs", f"{STAGE}.log")) or b""
    kept = [line for line in data.decode().splitlines() if not _DRIVER_LINE.search(line) and READ_TO not in line]
    yield from (_compare_trainers_log if trains else _compare_log)(trial, kept, observer)


def _compare_trainers_log(trial: Trial, kept: list[str], observer: RunObserver) -> Iterator[str]:
    """Check that the kept log has every line that was read from the pods, and all steps without a gap."""
    seen = observer.logs_before_fault if trial.fault in LOSES_LINES else observer.logs
    if lost := Counter(line for lines in seen.values() for line in lines) - Counter(kept):
        yield f"the log lacks {sorted(lost)}"
    begins = [number for number, line in enumerate(kept) if _TRAINER_BEGINS.match(line)]
    parts = [kept[first:after] for first, after in zip(begins, [*begins[1:], len(kept)], strict=True)]
    yield from _compare_steps(trial, parts)
    if (reached := max(_steps(kept), default=0)) != LEARN_STEPS:
        yield f"the log ends at step {reached}"


def _compare_log(trial: Trial, kept: list[str], observer: RunObserver) -> Iterator[str]:
    """Check that the kept log is the log of each pod, one after the other.

    Of a pod that was removed, only the lines of the last poll before are known.
    """
    parts: dict[str, list[str]] = {}
    part: list[str] = []
    for line in kept:
        if begins := _BEGINS.match(line):
            if begins[1] in parts:
                yield f"the log of {begins[1]} begins twice"
            part = parts.setdefault(begins[1], [])
        part.append(line)
    for pod, lines in observer.logs.items():
        part = parts.get(pod, [])
        is_whole = observer.pods["stage"][pod]["phase"] in ("Succeeded", "Failed")
        if trial.fault in LOSES_LINES:  # the lines that a stage prints without a driver may be lost with its pod
            before = observer.logs_before_fault.get(pod, [])
            is_right = part[: len(before)] == before and (part[: len(lines)] == lines or lines[: len(part)] == part)
        else:
            is_right = part == lines if is_whole else part[: len(lines)] == lines
        if not is_right:
            more, lost = (sorted(set(one) - set(other)) for one, other in ((part, lines), (lines, part)))
            yield f"the kept log of {pod} has the lines {more}, which the pod's has not, and lacks {lost}"
    yield from _compare_steps(trial, parts.values())


def _compare_steps(trial: Trial, parts: Iterable[list[str]]) -> Iterator[str]:
    """Check that each pod resumes with the step after its checkpoint and leaves out none; count the repeated steps."""
    trial.steps_repeated, reached = 0, 0
    for lines in parts:
        resumed = next((int(found[1]) for line in lines if (found := _RESUMES.search(line))), 0)
        steps = [step for step in _steps(lines) if step != resumed]  # a trainer also prints the step it resumes from
        is_gap = resumed > reached and trial.fault not in LOSES_LINES
        if is_gap or steps != list(range(resumed + 1, resumed + 1 + len(steps))):
            yield f"a pod resumed from step {resumed} after step {reached}, and its log has the steps {steps}"
        trial.steps_repeated += max(0, min(reached, resumed + len(steps)) - resumed)
        reached = max(reached, resumed + len(steps))


def _steps(lines: list[str]) -> list[int]:
    return [int(found[1]) for line in lines if (found := _STEP.match(line))]


_ACTED_RECIPE = """\
name: {name}
prepare:
  base: {{source: tiny-llama}}
  questions: {{source: python-docstrings}}
  preferences: {{source: python-docstrings}}
"""
TRAINED_RECIPE = f"""\
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
sft: {{{{max_steps: {LEARN_STEPS}, learning_rate: 2.0e-3, batch_rows: 32, micro_batch_rows: 8, log_every_steps: 1,
  checkpoint_every_steps: {LEARN_STEPS_PER_CHECKPOINT}}}}}
dpo: {{{{max_steps: 10, learning_rate: 4.0e-4, batch_rows: 8, micro_batch_rows: 8}}}}
evaluate: {{{{generated_rows: 2, max_new_tokens: 4, bootstrap_resamples: 100}}}}
"""
