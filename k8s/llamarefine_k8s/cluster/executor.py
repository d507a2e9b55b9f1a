"""Executor: a stage as a Job of the cluster.

The Job's controller tries again what errors.py says may be tried again; here the Job is made, followed and explained.
A Job that is there already is followed from where the last driver left it, so a driver may die at any moment.
"""

import os
import time
from collections.abc import Callable
from dataclasses import replace

from llamarefine_jobs.contract.errors import AccessError, LlamaRefineError, OutOfMemoryError, PreemptedError
from llamarefine_jobs.process.out_of_memory import halved_micro_batch_rows, section_that_halves, with_micro_batch_below
from llamarefine_k8s.cluster.api import Cluster, Object
from llamarefine_k8s.cluster.job_feed import JobFeed
from llamarefine_k8s.cluster.manifests import (
    CONTAINER,
    RUN,
    SETTINGS_MAP,
    TEMPLATE_DIGEST,
    owner_reference,
    run_config_map,
    stage_job,
    stage_job_name,
    stage_service,
)
from llamarefine_k8s.cluster.reasons import (
    Reason,
    condition,
    how_it_ended,
    newest,
    out_of_memory,
    why_replaced,
    why_waiting,
)
from llamarefine_k8s.runs.pipeline import Task
from llamarefine_k8s.runs.records import DRIVER_JOB
from llamarefine_k8s.settings import Settings

DRIVER_UID = "LLAMAREFINE_DRIVER_UID"
_GLANCE_S = 0.2
_LOOKS_S = (2.0, 30.0)  # at what keeps a stage from starting: so often at first, and where nothing changes for long
_GONE_S = 60.0


class ClusterExecutor:
    """Runs stages as Jobs, one at a time."""

    def __init__(self, cluster: Cluster, settings: Settings) -> None:
        self._cluster = cluster
        self._settings = settings
        self.read_to: str | None = None
        self._cancels = 0
        self._running = False
        # A driver in the cluster that is told to stop leaves the stage to its successor; a person's Ctrl-C means it.
        self._is_driver = DRIVER_UID in os.environ
        self._owner: Object | None = None

    def execute(self, task: Task, on_line: Callable[[str], None]) -> None:
        """Run a stage; see `pipeline.Executor`."""
        self._running = True
        try:
            while True:
                try:
                    job = self._bring_job(task)
                    with JobFeed(self._cluster, job, CONTAINER, self.read_to) as feed:
                        self._follow(task, feed, on_line)
                    return
                except _KilledForMemoryError as killed:
                    task = with_fewer_rows(task, killed, on_line)
        finally:
            self._running = False

    def finish(self, task: Task, on_line: Callable[[str], None]) -> None:
        """Read the rest of a log; see `pipeline.Executor`."""
        job = self._cluster.get("Job", stage_job_name(task.run, task.stage))
        if job and (job["metadata"].get("labels") or {}).get(RUN) == task.run:
            with JobFeed(self._cluster, job, CONTAINER, self.read_to) as feed:
                while not feed.is_over:
                    self._read(feed, on_line)

    def cancel(self) -> bool:
        """Take note that the stage shall stop; see `pipeline.Executor`."""
        self._cancels += 1
        return self._running

    def clear(self) -> None:
        """Remove the ConfigMap that owns the stages' Jobs, where no driver Job does: it has no end of its own."""
        if self._owner and self._owner["kind"] == "ConfigMap":
            self._cluster.delete("ConfigMap", self._owner["name"])

    def _follow(self, task: Task, feed: JobFeed, on_line: Callable[[str], None]) -> None:
        start = Start(self._cluster, self._settings.start_timeout_s, task.stage)
        cancelled, pods = 0, 0
        while not feed.is_over:
            self._read(feed, on_line)
            if len(feed.pods) > max(pods, feed.nodes):
                on_line(f"{task.stage}: {why_replaced(feed.replaced)}; another one goes on")
            pods = len(feed.pods)
            if killed := feed.killed_for_memory:
                self._remove(feed)
                raise _KilledForMemoryError(out_of_memory(task.stage, killed))
            abandon_lost_pods(self._cluster, feed, lambda text: on_line(f"{task.stage}: {text}"))
            if self._cancels > cancelled:
                cancelled = self._cancels
                self._stop(task, feed, cancelled)
            if not cancelled and not feed.is_over:
                self._watch_start(start, feed, on_line)
        if cancelled and not feed.has_succeeded:
            raise PreemptedError(f"{task.stage} was told to stop")
        if feed.has_succeeded:
            return
        if feed.has_failed:
            raise how_it_ended(task.stage, feed.job, list(feed.pods.values()))
        raise PreemptedError(f"{task.stage} was stopped: its Job {feed.job['metadata']['name']} was removed")

    def _read(self, feed: JobFeed, on_line: Callable[[str], None]) -> None:
        for line in feed.lines(_GLANCE_S):
            self.read_to = feed.read_to
            on_line(line)

    def _watch_start(self, start: "Start", feed: JobFeed, on_line: Callable[[str], None]) -> None:
        try:
            start.check(feed, on_line)
        except LlamaRefineError:
            self._remove(feed)
            raise

    def _stop(self, task: Task, feed: JobFeed, times: int) -> None:
        if self._is_driver:
            raise PreemptedError(f"{task.stage} goes on without its driver")
        self._remove(feed, grace_s=None if times == 1 else 0)

    def _remove(self, feed: JobFeed, grace_s: int | None = None) -> None:
        """Remove the Job, and its pods at once: the garbage collector would come a little later."""
        self._cluster.delete("Job", feed.job["metadata"]["name"])
        for pod in feed.pods.values():
            self._cluster.delete("Pod", pod["metadata"]["name"], grace_s)

    def _bring_job(self, task: Task) -> Object:
        """The Job of a stage: the one that is at work already, or a new one."""
        owner = self._bring_owner(task)
        service = stage_service(task, owner)
        if service:
            self._bring_service(service, task.run)
        manifest = stage_job(task, self._settings, owner)
        name = manifest["metadata"]["name"]
        there = self._cluster.get("Job", name)
        if there and self._is_to_be_followed(there, manifest):
            return there
        if there:
            check_ours(there, task.run)
            self._cluster.delete("Job", name)
            wait_until(lambda: self._cluster.get("Job", name) is None, f"the Job {name} is not removed")
        made = self._cluster.create(manifest) or self._cluster.get("Job", name)
        if made is None or not self._is_to_be_followed(made, manifest):
            raise LlamaRefineError(f"the Job {name} was made by someone else just now; is the run driven twice?")
        return made

    def _bring_service(self, manifest: Object, run: str) -> None:
        """A stage's Service, owned by who drives now: the one that is there may be about to go with its old owner."""
        name = manifest["metadata"]["name"]
        if self._cluster.create(manifest):
            return
        there = self._cluster.get("Service", name)
        if there:
            check_ours(there | {"kind": "Service"}, run)
        owned = {"metadata": {"ownerReferences": manifest["metadata"]["ownerReferences"]}}
        if not self._cluster.patch("Service", name, owned):
            self._cluster.create(manifest)

    def _is_to_be_followed(self, there: Object, manifest: Object) -> bool:
        """Whether a Job is what we would make, and at work; or made by this very driver, whose pod died meanwhile."""
        metadata = there["metadata"]
        if (metadata.get("annotations") or {}).get(TEMPLATE_DIGEST) != manifest["metadata"]["annotations"][
            TEMPLATE_DIGEST
        ]:
            return False
        ours = self._is_driver and any(
            owner["uid"] == os.environ[DRIVER_UID] for owner in metadata.get("ownerReferences") or ()
        )
        return is_at_work(there) or (ours and "deletionTimestamp" not in metadata)

    def _bring_owner(self, task: Task) -> Object:
        """What takes the stage's Job along when it goes: the driver's Job, or the run's ConfigMap without one."""
        if self._owner is None:
            driver = None
            if self._is_driver:
                driver = owner_reference("Job", os.environ[DRIVER_JOB], os.environ[DRIVER_UID])
            above = driver or release_of(self._cluster)
            recipe = put_run_config_map(self._cluster, run_config_map(task.run, task.recipe, self._settings, above))
            self._owner = driver or owner_reference("ConfigMap", task.run, recipe["metadata"]["uid"])
        return self._owner


class _KilledForMemoryError(OutOfMemoryError):
    """The kernel ended a stage's container for its memory limit: the stage itself could not answer."""


def with_fewer_rows(task: Task, killed: OutOfMemoryError, on_line: Callable[[str], None]) -> Task:
    """`task` with half the micro-batch, where its recipe says so; raises `killed` where not, or where none is left."""
    section = section_that_halves(task.stage, task.recipe)
    if section is None or (tried := with_micro_batch_below(section, task.oom_micro_batch_rows)).micro_batch_rows == 1:
        raise killed
    on_line(
        f"{task.stage}: {killed}; starts anew with micro-batches of {halved_micro_batch_rows(tried)} rows instead of "
        f"{tried.micro_batch_rows}, from the newest checkpoint; the {section.batch_rows} rows of a step stay"
    )
    return replace(task, oom_micro_batch_rows=(*task.oom_micro_batch_rows, tried.micro_batch_rows))


class Start:
    """The start watchdog: says what a stage waits for, and ends the wait when it was too long."""

    def __init__(self, cluster: Cluster, timeout_s: float, stage: str) -> None:
        self._cluster = cluster
        self._timeout_s = timeout_s
        self._stage = stage
        self._since_s = self._looked_s = time.monotonic()
        self._look_s, _ = _LOOKS_S
        self._told: set[str] = set()

    def check(self, feed: JobFeed, on_line: Callable[[str], None]) -> None:
        """Look, now and then, and raise what keeps the stage from starting once it has taken too long."""
        now_s = time.monotonic()
        if feed.is_running:
            self._since_s = now_s
        if feed.is_running or now_s - self._looked_s < min(self._look_s, self._since_s + self._timeout_s - now_s):
            return
        self._looked_s, self._look_s = now_s, min(self._look_s * 1.5, _LOOKS_S[1])
        pods = list(feed.pods.values())
        reason = why_waiting(self._stage, feed.job, pods, events_of(self._cluster, feed.job, pods))
        if reason and reason.word not in self._told:
            self._told.add(reason.word)
            self._look_s, _ = _LOOKS_S
            on_line(f"{self._stage}: waits, {reason}")
        if reason and reason.patient:
            self._since_s = now_s
        if now_s - self._since_s > self._timeout_s:
            raise self._late(reason)

    def _late(self, reason: Reason | None) -> LlamaRefineError:
        kind = reason.kind if reason else LlamaRefineError
        return kind(
            f"{self._stage} could not start within {self._timeout_s:g} s: {reason or 'its pod does not say why'}"
        )


def events_of(cluster: Cluster, job: Object, pods: list[Object]) -> list[Object]:
    """What the cluster's controllers said lately of a Job and of its newest pod."""
    latest = newest(pods)
    uids = [each["metadata"]["uid"] for each in (job, latest) if each]
    return [event for uid in uids for event in cluster.objects("Event", fields=f"involvedObject.uid={uid}")]


def abandon_lost_pods(cluster: Cluster, feed: JobFeed, say: Callable[[str], None]) -> None:
    """Give up the pods of nodes that are gone; without that, a Job waits for their end for ever.

    Should such a node come back, its process may still publish: of two writers the first wins, and both wrote the same.
    """
    for pod in feed.lost_pods():
        name, node = pod["metadata"]["name"], pod["spec"].get("nodeName")
        try:
            cluster.abandon(pod)
            say(f"the node {node} does not answer; its pod {name} is given up")
        except AccessError as error:  # a role of an earlier chart; the Job goes on once an admin removes node or pod
            say(f"the node {node} does not answer, and its pod {name} cannot be given up: {error}")


def is_at_work(job: Object) -> bool:
    """Whether a Job has not ended and is not being removed."""
    return condition(job, "Complete", "Failed") is None and "deletionTimestamp" not in job["metadata"]


def check_ours(there: Object, run: str) -> None:
    """Refuse to touch an object of our name that is not of this run."""
    if (there["metadata"].get("labels") or {}).get(RUN) != run:
        raise AccessError(
            f"{there.get('kind', 'an object')} {there['metadata']['name']} is there and not of llamarefine; "
            "remove or rename it, or give the recipe another name"
        )


def put_run_config_map(cluster: Cluster, manifest: Object) -> Object:
    """Make a run's ConfigMap, or bring the one that is there up to date."""
    name = manifest["metadata"]["name"]
    there = cluster.get("ConfigMap", name)
    if there is None:
        there = cluster.create(manifest) or cluster.get("ConfigMap", name)
        if there is None:
            raise LlamaRefineError(f"the ConfigMap {name} was removed while the run started; submit again")
        return there
    check_ours(there | {"kind": "ConfigMap"}, manifest["metadata"]["labels"][RUN])
    # An earlier drive's owner may end, and would take this one's stages along.
    owners = {"ownerReferences": manifest["metadata"].get("ownerReferences")}
    return cluster.patch("ConfigMap", name, {"metadata": owners, "data": manifest["data"]}) or there


def release_of(cluster: Cluster) -> Object | None:
    """The chart's ConfigMap as an owner: a run goes when the chart is uninstalled, which takes its permissions too."""
    brought = cluster.get("ConfigMap", SETTINGS_MAP)
    return owner_reference("ConfigMap", SETTINGS_MAP, brought["metadata"]["uid"]) if brought else None


def wait_until(true: Callable[[], bool], complaint: str, timeout_s: float = _GONE_S) -> None:
    """Wait for the cluster; a LlamaRefineError with `complaint` when it takes too long."""
    until_s = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > until_s:
            raise LlamaRefineError(f"{complaint} within {timeout_s:g} s; `kubectl describe` it")
        time.sleep(_GLANCE_S)
