"""A run in the cluster: which stages wait and why, their logs, and the removal of all its objects."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from llamarefine_jobs.contract.artifact import run_path
from llamarefine_jobs.contract.errors import LlamaRefineError, RecipeError
from llamarefine_jobs.contract.retry import RetryPolicy
from llamarefine_jobs.contract.stages import SEQUENCE
from llamarefine_jobs.store import Store
from llamarefine_k8s.cluster import KubeObject
from llamarefine_k8s.cluster.api import Cluster
from llamarefine_k8s.cluster.manifests import CONTAINER, JOB_NAME, RUN, STAGE, stage_job_name
from llamarefine_k8s.cluster.pod_log import PodLog
from llamarefine_k8s.cluster.reasons import (
    condition,
    has_started,
    how_it_ended,
    node_index,
    silent_node,
    why_waiting,
    with_node_prefix,
)
from llamarefine_k8s.cluster.run_objects import is_active
from llamarefine_k8s.cluster.watchdog import events_of
from llamarefine_k8s.runs import records
from llamarefine_k8s.runs.pipeline import READ_TO
from llamarefine_k8s.runs.records import RunRecord
from llamarefine_k8s.settings import DRIVER

_KINDS = ("Job", "ConfigMap", "Service", "Pod")
_GRACE_S, _KILL_AFTER_S, _GONE_S = 8, 10.0, 15.0
_POLL_S = 0.3
# 300 s is the toleration that Kubernetes gives each pod; the pod's grace period and the launcher's minute come on top.
_WHEN_REPLACED = "its pod is replaced some minutes after Kubernetes marks the node as lost (300 s by default)"


@dataclass(frozen=True)
class StageStatus:
    """State of one Job of a run in the cluster."""

    name: str  # the stage, or `driver`
    state: str  # waits, runs, done, failed
    reason: str | None  # why it waits or failed


def find_run(cluster: Cluster, name: str | None) -> str:
    """Return the run in the cluster whose name begins with `name`; the newest run if `name` is None.

    Raises RecipeError if there is no such run, or more than one.
    """
    times: dict[str, str] = {}
    for kind in ("Job", "ConfigMap"):
        for item in cluster.objects(kind, labels=RUN):
            run, created_at = item["metadata"]["labels"][RUN], item["metadata"]["creationTimestamp"]
            times[run] = max(times.get(run, ""), created_at)
    names = sorted(times, key=lambda run: times[run], reverse=True)
    found = [run for run in names if name is None or run == name or run.startswith(name)]
    if name in found or (found and name is None):
        return name if name in found and name else found[0]
    if len(found) == 1:
        return found[0]
    if found:
        raise RecipeError(f"{len(found)} runs begin with `{name}`: {', '.join(found[:5])}; give more of the name")
    existing = f"; there are {', '.join(names[:5])}" if names else ""
    missing = f"no run `{name}`" if name else "no run"
    raise RecipeError(f"namespace {cluster.namespace} holds {missing}{existing}")


def objects_of_run(cluster: Cluster, run: str) -> list[tuple[str, KubeObject]]:
    """Return every existing object of a run, with its kind."""
    return [(kind, item) for kind in _KINDS for item in cluster.objects(kind, labels=f"{RUN}={run}")]


def stage_statuses(cluster: Cluster, run: str) -> list[StageStatus]:
    """Return the status of the driver and of each stage that has a Job, the oldest Job first."""
    found = []
    jobs = cluster.objects("Job", labels=f"{RUN}={run}")
    pods = cluster.objects("Pod", labels=f"{RUN}={run}")
    for job in sorted(jobs, key=lambda job: str(job["metadata"]["creationTimestamp"])):
        name = job["metadata"]["labels"].get(STAGE, DRIVER)
        job_pods = [pod for pod in pods if pod["metadata"]["labels"].get(JOB_NAME) == job["metadata"]["name"]]
        if condition(job, "Complete", "SuccessCriteriaMet"):
            found.append(StageStatus(name, "done", None))
        elif condition(job, "Failed", "FailureTarget"):
            found.append(StageStatus(name, "failed", str(how_it_ended(name, job, job_pods))))
        elif "deletionTimestamp" in job["metadata"]:
            found.append(StageStatus(name, "waits", "its Job is being deleted"))
        elif sum(pod["status"].get("phase") == "Running" for pod in job_pods) >= job["spec"].get("parallelism", 1):
            nodes = sorted({node for pod in job_pods if (node := silent_node(pod))})
            silent = f"the node {', '.join(nodes)} does not answer; {_WHEN_REPLACED}" if nodes else None
            found.append(StageStatus(name, "waits" if silent else "runs", silent))
        else:
            reason = why_waiting(name, job, job_pods, events_of(cluster, job, job_pods))
            found.append(StageStatus(name, "waits", str(reason) if reason else None))
    return found


def log_lines(cluster: Cluster, run: str, stage: str, *, follow: bool) -> Iterator[str] | None:
    """Return the log lines of a stage's pods, pod after pod, from the cluster; None if no pod has started."""
    job = stage_job_name(run, stage) if stage != DRIVER else run

    def started_pods() -> list[KubeObject]:
        pods = [pod for pod in cluster.objects("Pod", labels=f"{JOB_NAME}={job}") if has_started(pod)]
        return sorted(pods, key=lambda pod: (node_index(pod), str(pod["metadata"]["creationTimestamp"])))

    if not started_pods() and not (follow and _job_is_active(cluster, job)):
        return None

    def lines() -> Iterator[str]:
        read: set[str] = set()
        while True:
            may_start_pods = follow and _job_is_active(cluster, job)  # read before the pods, so that none is missed
            for pod in started_pods():
                if pod["metadata"]["uid"] not in read:
                    read.add(pod["metadata"]["uid"])
                    container = CONTAINER if stage != DRIVER else DRIVER
                    log = PodLog(cluster, pod["metadata"]["name"], container)
                    yield from (with_node_prefix(pod, line) for line in log.lines(follow=follow))
            if not may_start_pods:
                return
            time.sleep(_POLL_S)

    return lines()


def remove(cluster: Cluster, run: str, only: Sequence[tuple[str, KubeObject]] | None = None) -> None:
    """Delete a run's objects: all, or those in `only`. Its stage gets SIGTERM and 8 s to save a checkpoint.

    Returns when nothing is left; raises LlamaRefineError if an object still exists after 15 s. Pods that exist after
    10 s are killed.
    """
    began_s = time.monotonic()
    deleted: set[str] = set()  # uids, and "<uid> at once" for pods
    uids = None if only is None else {item["metadata"]["uid"] for _, item in only}
    while existing := [
        (kind, item)
        for kind, item in (objects_of_run(cluster, run) if uids != set() else ())
        if uids is None or item["metadata"]["uid"] in uids
    ]:
        waited_s = time.monotonic() - began_s
        if waited_s > _GONE_S:
            names = ", ".join(f"{kind} {item['metadata']['name']}" for kind, item in existing)
            raise LlamaRefineError(f"{names} could not be deleted within {_GONE_S:g} s; is a node lost?")
        for kind, item in _with_owners(cluster, existing):
            uid = item["metadata"]["uid"]
            is_late = kind == "Pod" and waited_s > _KILL_AFTER_S and f"{uid} at once" not in deleted
            if uid not in deleted or is_late:
                deleted |= {uid, f"{uid} at once"} if is_late else {uid}
                grace_s = (0 if is_late else _GRACE_S) if kind == "Pod" else None
                cluster.delete(kind, item["metadata"]["name"], grace_s, uid)
        time.sleep(_POLL_S)


def _with_owners(cluster: Cluster, existing: list[tuple[str, KubeObject]]) -> list[tuple[str, KubeObject]]:
    """Return the objects and the Jobs that own them, drivers first: a driver would create deleted stages again.

    The owner may be a Job without the run's label, created by the chart.
    """
    known = {item["metadata"]["uid"] for _, item in existing}
    owners = {
        owner["name"]: owner["uid"]
        for kind, item in existing
        if kind != "Pod"
        for owner in item["metadata"].get("ownerReferences") or ()
        if owner["kind"] == "Job" and owner["uid"] not in known
    }
    found = [
        ("Job", job)
        for name, uid in owners.items()
        if (job := cluster.get("Job", name)) and job["metadata"]["uid"] == uid  # not one created in its place
    ]
    drivers = [pair for pair in existing if STAGE not in pair[1]["metadata"]["labels"]]
    return [*found, *drivers, *(pair for pair in existing if pair not in drivers)]


def _job_is_active(cluster: Cluster, name: str) -> bool:
    job = cluster.get("Job", name)
    return job is not None and is_active(job)


def find_status(
    store: Store, name: str | None, context: str | None, namespace: str | None
) -> tuple[RunRecord | None, list[StageStatus], str | None]:
    """Return a run's record, the statuses of its Jobs, and why the cluster could not be reached (None if it was).

    The record is None for a run that was submitted just now. The statuses are empty for a run whose Jobs are deleted
    or that never was in a cluster.
    """
    cluster, cluster_error = _connect_for(store, context, namespace)
    try:
        record = records.find(store, name)
    except RecipeError:
        run = _run_in_cluster(cluster, name) if cluster else None
        if cluster is None or run is None:
            raise
        return records.load(store, run), stage_statuses(cluster, run), None
    if cluster is None:
        return record, [], cluster_error
    # Only without a name, because this lists the objects of all runs.
    newest = _run_in_cluster(cluster, None) if name is None else None
    if newest and newest != record.run and records.load(store, newest) is None:
        return None, stage_statuses(cluster, newest), None
    return record, stage_statuses(cluster, record.run), None


def run_and_stage(words: Sequence[str]) -> tuple[str | None, str | None]:
    """Return run and stage from the arguments `[RUN] [STAGE]`; None for each one that is left out."""
    names = [*SEQUENCE, DRIVER]
    match list(words):
        case []:
            return None, None
        case [word]:
            return (None, word) if word in names else (word, None)
        case [run, stage] if stage in names:
            return run, stage
        case [_, stage]:
            raise RecipeError(f"`{stage}` is not a stage; there are {', '.join(names)}")
    raise RecipeError(f"expected a run and a stage, found {len(words)} words")


def all_lines(
    store: Store,
    name: str | None,
    stage: str | None,
    context: str | None,
    namespace: str | None,
    *,
    follow: bool,
    give_up_after_s: float,
) -> Iterator[str]:
    """Yield the log of a stage, or the logs of all stages in sequence with the stage in front of each line.

    With `follow` the lines are yielded as they are written, until the run ends; an outage of the API server is then
    retried for `give_up_after_s`.
    """
    cluster, cluster_error = _connect_for(store, context, namespace)
    if cluster and follow:
        cluster.retry_policy = RetryPolicy(give_up_after_s)
    run = (_run_in_cluster(cluster, name) if cluster else None) or records.find(store, name).run
    has_lines = False
    for each in [stage] if stage else SEQUENCE:
        lines = _lines_of(store, cluster, run, each, follow=follow)
        for line in lines or ():
            has_lines = True
            yield line if stage else f"{each:<8} {line}"
    if not has_lines:
        raise RecipeError(
            f"{run} has no log{f' of {stage}' if stage else ''} yet" + (f"; {cluster_error}" if cluster_error else "")
        )


def _lines_of(store: Store, cluster: Cluster | None, run: str, stage: str, *, follow: bool) -> Iterator[str] | None:
    """Return a stage's log lines, from the cluster if a pod has started, else from the store; None if there are none.

    With `follow`, waits until the stage has a log, for as long as a driver runs.
    """
    while True:
        stored = store.read(run_path(run, "logs", f"{stage}.log"))
        lines = log_lines(cluster, run, stage, follow=follow) if cluster else None
        if lines is not None:
            return lines
        if stored is not None:
            return iter(_without_marker(stored.decode(errors="replace").splitlines()))
        is_driven = cluster is not None and _job_is_active(cluster, run)
        record = records.load(store, run)
        if not follow or not is_driven or (record and record.stages[stage].state in ("reused", "done")):
            return None
        time.sleep(1.0)


def _without_marker(lines: list[str]) -> list[str]:
    return lines[:-1] if lines and lines[-1].startswith(READ_TO) else lines


def _connect_for(store: Store, context: str | None, namespace: str | None) -> tuple[Cluster | None, str | None]:
    """Return the cluster of a store's runs, or None and why it cannot be reached.

    The cluster is None without a reason if the store is a folder: its runs are on this machine.
    """
    if store.uri.startswith("file:") and not (context or namespace):
        return None, None
    try:
        cluster = Cluster(context, namespace)
        cluster.objects("Job", labels=f"{RUN}=none")
        return cluster, None
    except LlamaRefineError as error:
        return None, str(error)


def _run_in_cluster(cluster: Cluster, name: str | None) -> str | None:
    """Return the run that `find_run` finds; None where it raises."""
    try:
        return find_run(cluster, name)
    except RecipeError:
        return None
