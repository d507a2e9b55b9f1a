"""What the cluster holds of a run: which stages wait and why, their logs, and the end of all of it."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llamarefine_jobs.contract.artifact import run_path
from llamarefine_jobs.contract.errors import LlamaRefineError, RecipeError
from llamarefine_jobs.contract.retry import GIVE_UP_AFTER_S, RetryPolicy
from llamarefine_jobs.contract.stages import SEQUENCE
from llamarefine_jobs.store import Store
from llamarefine_k8s.cluster.api import Cluster, Object
from llamarefine_k8s.cluster.executor import events_of, is_at_work
from llamarefine_k8s.cluster.manifests import CONTAINER, JOB_NAME, RUN, STAGE, stage_job_name
from llamarefine_k8s.cluster.pod_log import PodLog
from llamarefine_k8s.cluster.reasons import (
    condition,
    has_begun,
    how_it_ended,
    node_index,
    silent_node,
    why_waiting,
    with_node_prefix,
)
from llamarefine_k8s.runs import records
from llamarefine_k8s.runs.pipeline import READ_TO
from llamarefine_k8s.runs.records import RunRecord
from llamarefine_k8s.settings import DRIVER

_KINDS = ("Job", "ConfigMap", "Service", "Pod")
_GRACE_S, _PATIENCE_S, _GONE_S = 8, 10.0, 15.0
_GLANCE_S = 0.3
# By the toleration that Kubernetes gives each pod; the pod's grace period and the launcher's minute come on top.
_WHEN_GIVEN_UP = "its pod is replaced some minutes after Kubernetes takes the node for lost (300 s by default)"


@dataclass(frozen=True)
class StageStatus:
    """One Job of a run, as the cluster has it."""

    name: str  # of the stage, or `driver`
    state: str  # waits, runs, done, failed
    reason: str | None  # what keeps it from running, or ended it


def find_run(cluster: Cluster, name: str | None) -> str:
    """The run in the cluster that `name` begins; the only one, or the newest, without a name."""
    times: dict[str, str] = {}
    for kind in ("Job", "ConfigMap"):
        for item in cluster.objects(kind, labels=RUN):
            run, made = item["metadata"]["labels"][RUN], item["metadata"]["creationTimestamp"]
            times[run] = max(times.get(run, ""), made)
    names = sorted(times, key=lambda run: times[run], reverse=True)
    found = [run for run in names if name is None or run == name or run.startswith(name)]
    if name in found or (found and name is None):
        return name if name in found and name else found[0]
    if len(found) == 1:
        return found[0]
    if found:
        raise RecipeError(f"`{name}` begins {len(found)} runs: {', '.join(found[:5])}; give more of the name")
    there = f"; there are {', '.join(names[:5])}" if names else ""
    wanted = f"no run `{name}`" if name else "no run"
    raise RecipeError(f"namespace {cluster.namespace} holds {wanted}{there}")


def of_run(cluster: Cluster, run: str) -> list[tuple[str, Object]]:
    """Every object of a run that is there, with its kind."""
    return [(kind, item) for kind in _KINDS for item in cluster.objects(kind, labels=f"{RUN}={run}")]


def look(cluster: Cluster, run: str) -> list[StageStatus]:
    """The driver and the stages of a run that have a Job, each with what keeps it from running."""
    found = []
    jobs = cluster.objects("Job", labels=f"{RUN}={run}")
    pods = cluster.objects("Pod", labels=f"{RUN}={run}")
    for job in sorted(jobs, key=lambda job: str(job["metadata"]["creationTimestamp"])):
        name = job["metadata"]["labels"].get(STAGE, DRIVER)
        its_pods = [pod for pod in pods if pod["metadata"]["labels"].get(JOB_NAME) == job["metadata"]["name"]]
        if condition(job, "Complete", "SuccessCriteriaMet"):
            found.append(StageStatus(name, "done", None))
        elif condition(job, "Failed", "FailureTarget"):
            found.append(StageStatus(name, "failed", str(how_it_ended(name, job, its_pods))))
        elif sum(pod["status"].get("phase") == "Running" for pod in its_pods) >= job["spec"].get("parallelism", 1):
            nodes = sorted({node for pod in its_pods if (node := silent_node(pod))})
            silent = f"the node {', '.join(nodes)} does not answer; {_WHEN_GIVEN_UP}" if nodes else None
            found.append(StageStatus(name, "waits" if silent else "runs", silent))
        else:
            reason = why_waiting(name, job, its_pods, events_of(cluster, job, its_pods))
            found.append(StageStatus(name, "waits", str(reason) if reason else None))
    return found


def log_lines(cluster: Cluster, run: str, stage: str, *, follow: bool) -> Iterator[str] | None:
    """The lines of a stage's pods, one pod after the other, from the cluster; None where it has none that began."""
    job = stage_job_name(run, stage) if stage != DRIVER else run

    def begun() -> list[Object]:
        pods = [pod for pod in cluster.objects("Pod", labels=f"{JOB_NAME}={job}") if has_begun(pod)]
        return sorted(pods, key=lambda pod: (node_index(pod), str(pod["metadata"]["creationTimestamp"])))

    if not begun() and not (follow and _is_at_work(cluster, job)):
        return None

    def lines() -> Iterator[str]:
        read: set[str] = set()
        while True:
            at_work = follow and _is_at_work(cluster, job)  # asked first: what began by then is read below
            for pod in begun():
                if pod["metadata"]["uid"] not in read:
                    read.add(pod["metadata"]["uid"])
                    container = CONTAINER if stage != DRIVER else DRIVER
                    log = PodLog(cluster, pod["metadata"]["name"], container)
                    yield from (with_node_prefix(pod, line) for line in log.lines(follow=follow))
            if not at_work:
                return
            time.sleep(_GLANCE_S)

    return lines()


def remove(cluster: Cluster, run: str) -> None:
    """Remove all that the cluster holds of a run. Its stage is asked to save first, for as long as that is quick.

    Returns when nothing is left; LlamaRefineError where something stays for more than 15 s.
    """
    began_s = time.monotonic()
    asked: set[str] = set()
    while there := of_run(cluster, run):
        waited_s = time.monotonic() - began_s
        if waited_s > _GONE_S:
            names = ", ".join(f"{kind} {item['metadata']['name']}" for kind, item in there)
            raise LlamaRefineError(f"{names} did not go within {_GONE_S:g} s; is a node lost?")
        for kind, item in _with_owners(cluster, there):
            uid = item["metadata"]["uid"]
            is_late = kind == "Pod" and waited_s > _PATIENCE_S and f"{uid} late" not in asked
            if uid not in asked or is_late:
                asked |= {uid, f"{uid} late"} if is_late else {uid}
                grace_s = (0 if is_late else _GRACE_S) if kind == "Pod" else None
                cluster.delete(kind, item["metadata"]["name"], grace_s)
        time.sleep(_GLANCE_S)


def _with_owners(cluster: Cluster, there: list[tuple[str, Object]]) -> list[tuple[str, Object]]:
    """And the Job that owns them, which the chart may have made: before its stages, which it would make again."""
    known = {item["metadata"]["uid"] for _, item in there}
    owners = {
        owner["name"]: owner["uid"]
        for kind, item in there
        if kind != "Pod"
        for owner in item["metadata"].get("ownerReferences") or ()
        if owner["kind"] == "Job" and owner["uid"] not in known
    }
    found = [("Job", job) for name in owners if (job := cluster.get("Job", name))]
    drivers = [pair for pair in there if STAGE not in pair[1]["metadata"]["labels"]]
    return [*found, *drivers, *(pair for pair in there if pair not in drivers)]


def _is_at_work(cluster: Cluster, name: str) -> bool:
    job = cluster.get("Job", name)
    return job is not None and is_at_work(job)


def find_status(
    store: Store, name: str | None, context: str | None, namespace: str | None
) -> tuple[RunRecord | None, list[StageStatus], str | None]:
    """A run's record, what the cluster has of it, and why the cluster could not be asked.

    A run that was submitted just now has no record yet; one of long ago, or of this machine, is in no cluster.
    """
    cluster, trouble = _reach(store, context, namespace)
    try:
        record = records.find(store, name)
    except RecipeError:
        newest = _newest_run(cluster, name) if cluster else None
        if newest is None:
            raise
        return records.load(store, newest), look(cluster, newest) if cluster else [], None
    if cluster is None:
        return record, [], trouble
    newest = _newest_run(cluster, None) if name is None else None  # only where it matters: it lists all runs' objects
    if newest and newest != record.run and records.load(store, newest) is None:
        return None, look(cluster, newest), None
    return record, look(cluster, record.run), None


def run_and_stage(words: Sequence[str]) -> tuple[str | None, str | None]:
    """What `[RUN] [STAGE]` say, each of which may be left out."""
    names = [*SEQUENCE, DRIVER]
    match list(words):
        case []:
            return None, None
        case [word]:
            return (None, word) if word in names else (word, None)
        case [run, stage] if stage in names:
            return run, stage
        case [_, stage]:
            raise RecipeError(f"`{stage}` is no stage; there are {', '.join(names)}")
    raise RecipeError(f"expected a run and a stage, found {len(words)} words")


def all_lines(
    store: Store, name: str | None, stage: str | None, context: str | None, namespace: str | None, *, follow: bool
) -> Iterator[str]:
    """The log of a stage, or of all in sequence, each line with its stage before it."""
    cluster, trouble = _reach(store, context, namespace)
    if cluster and follow:
        cluster.retry_policy = RetryPolicy(GIVE_UP_AFTER_S)
    run = (_newest_run(cluster, name) if cluster else None) or records.find(store, name).run
    found = False
    for each in [stage] if stage else SEQUENCE:
        lines = _lines_of(store, cluster, run, each, follow=follow)
        for line in lines or ():
            found = True
            yield line if stage else f"{each:<8} {line}"
    if not found:
        raise RecipeError(
            f"{run} has no log{f' of {stage}' if stage else ''} yet" + (f"; {trouble}" if trouble else "")
        )


def _lines_of(store: Store, cluster: Cluster | None, run: str, stage: str, *, follow: bool) -> Iterator[str] | None:
    while True:
        kept = store.read(run_path(run, "logs", f"{stage}.log"))
        lines = log_lines(cluster, run, stage, follow=follow) if cluster else None
        if lines is not None:
            return lines
        if kept is not None:
            return iter(_without_mark(kept.decode(errors="replace").splitlines()))
        driven = cluster is not None and _is_at_work(cluster, run)
        record = records.load(store, run)
        if not follow or not driven or (record and record.stages[stage].state in ("reused", "done")):
            return None
        time.sleep(1.0)


def _without_mark(lines: list[str]) -> list[str]:
    return lines[:-1] if lines and lines[-1].startswith(READ_TO) else lines


def _reach(store: Store, context: str | None, namespace: str | None) -> tuple[Cluster | None, str | None]:
    """The cluster, or why it cannot be asked. A folder's runs are of this machine: no cluster knows them."""
    if store.uri.startswith("file:") and not (context or namespace):
        return None, None
    try:
        cluster = Cluster(context, namespace)
        cluster.objects("Job", labels=f"{RUN}=none")
        return cluster, None
    except LlamaRefineError as error:
        return None, str(error)


def _newest_run(cluster: Cluster, name: str | None) -> str | None:
    try:
        return find_run(cluster, name)
    except RecipeError:
        return None
