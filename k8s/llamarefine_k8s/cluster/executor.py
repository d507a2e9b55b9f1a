"""Executor that runs each stage as a Kubernetes Job.

The Job's controller retries the errors that errors.py marks as retryable; this module creates the Job, follows its
log and explains its end.
"""

import time
from collections.abc import Callable
from dataclasses import replace

from llamarefine_jobs.contract.errors import LlamaRefineError, OutOfMemoryError, PreemptedError
from llamarefine_jobs.process.out_of_memory import halved_micro_batch_rows, section_that_halves, with_micro_batch_below
from llamarefine_k8s.cluster.api import Cluster
from llamarefine_k8s.cluster.job_feed import JobFeed
from llamarefine_k8s.cluster.manifests import CONTAINER, RUN, stage_job_name
from llamarefine_k8s.cluster.reasons import how_it_ended, out_of_memory_error, why_replaced
from llamarefine_k8s.cluster.run_objects import StageObjects
from llamarefine_k8s.cluster.watchdog import StartWatchdog, abandon_lost_pods
from llamarefine_k8s.runs.pipeline import Task
from llamarefine_k8s.settings import Settings

_POLL_S = 0.2
_FINISH_S = 60.0  # the longest time for the rest of the log of a stage that has published its artifact
_MAX_REMADE_JOBS = 3  # of one stage: whoever deletes more of them wants the stage to stop


class ClusterExecutor:
    """Runs stages as Jobs, one at a time."""

    def __init__(self, cluster: Cluster, settings: Settings) -> None:
        self._cluster = cluster
        self._settings = settings
        self._objects = StageObjects(cluster, settings)
        self.read_to: str | None = None
        self._cancels = 0
        self._is_running = False

    def execute(self, task: Task, on_line: Callable[[str], None]) -> None:
        """Run a stage; see `pipeline.Executor`."""
        self._is_running = True
        cancels, remade_jobs = self._cancels, 0
        try:
            while True:
                try:
                    job = self._objects.ensure_job(task, lambda: self._cancels > cancels)
                    with JobFeed(self._cluster, job, CONTAINER, self.read_to) as feed:
                        self._follow(task, feed, on_line)
                    return
                except _MemoryLimitError as error:
                    task = with_halved_micro_batch(task, error, on_line)
                except _JobDeletedError as error:
                    if remade_jobs == _MAX_REMADE_JOBS or not self._objects.owner_exists():
                        on_line(f"{task.stage}: {error}")
                        raise
                    remade_jobs += 1
                    on_line(f"{task.stage}: {error}; it is created again")
        finally:
            self._is_running = False

    def finish(self, task: Task, on_line: Callable[[str], None]) -> None:
        """Read the rest of a log; see `pipeline.Executor`."""
        job = self._cluster.get("Job", stage_job_name(task.run, task.stage))
        if job and (job["metadata"].get("labels") or {}).get(RUN) == task.run:
            with JobFeed(self._cluster, job, CONTAINER, self.read_to) as feed:
                until_s = time.monotonic() + _FINISH_S
                while not feed.is_over and time.monotonic() < until_s:
                    self._read(feed, on_line)

    def cancel(self) -> bool:
        """Record that the stage shall stop; see `pipeline.Executor`."""
        self._cancels += 1
        return self._is_running

    def clear(self) -> None:
        """Delete the ConfigMap that owns the stages' Jobs; do nothing if a driver's Job owns them."""
        self._objects.delete_owner()

    def _follow(self, task: Task, feed: JobFeed, on_line: Callable[[str], None]) -> None:
        """Read the log of a stage's Job to its end; raises the error of a Job that failed, stopped or was deleted."""
        watchdog = StartWatchdog(self._cluster, self._settings.start_timeout_s, task.stage)
        cancels, pods = 0, 0
        while not feed.is_over:
            self._read(feed, on_line)
            if len(feed.pods) > max(pods, feed.nodes):
                on_line(f"{task.stage}: {why_replaced(feed.replaced)}; another pod continues")
            pods = len(feed.pods)
            if killed := feed.killed_for_memory:
                self._delete_job(feed)
                raise _MemoryLimitError(out_of_memory_error(task.stage, killed))
            abandon_lost_pods(self._cluster, feed, lambda text: on_line(f"{task.stage}: {text}"))
            if self._cancels > cancels:
                cancels = self._cancels
                self._stop(task, feed, is_first=cancels == 1)
            if not cancels and not feed.is_over:
                self._check_start(watchdog, feed, on_line)
        if cancels and not feed.has_succeeded:
            raise PreemptedError(f"{task.stage} was cancelled")
        if feed.has_succeeded:
            return
        if feed.has_failed:
            raise how_it_ended(task.stage, feed.job, list(feed.pods.values()))
        raise _JobDeletedError(f"its Job {feed.job['metadata']['name']} was deleted")

    def _read(self, feed: JobFeed, on_line: Callable[[str], None]) -> None:
        for line in feed.lines(_POLL_S):
            self.read_to = feed.read_to
            on_line(line)

    def _check_start(self, watchdog: StartWatchdog, feed: JobFeed, on_line: Callable[[str], None]) -> None:
        try:
            watchdog.check(feed, on_line)
        except LlamaRefineError:
            self._delete_job(feed)
            raise

    def _stop(self, task: Task, feed: JobFeed, *, is_first: bool) -> None:
        """Stop the stage: with its grace period the first time, at once the second time.

        A driver in the cluster leaves the stage running for its successor; only a person's Ctrl-C stops the stage.
        """
        if self._objects.is_driver:
            raise PreemptedError(f"{task.stage} continues without its driver")
        self._delete_job(feed, grace_s=None if is_first else 0)

    def _delete_job(self, feed: JobFeed, grace_s: int | None = None) -> None:
        """Delete the Job and also its pods, which the garbage collector would delete only a little later."""
        self._cluster.delete("Job", feed.job["metadata"]["name"], uid=feed.job["metadata"]["uid"])
        for pod in feed.existing_pods:
            self._cluster.delete("Pod", pod["metadata"]["name"], grace_s)


class _MemoryLimitError(OutOfMemoryError):
    """The kernel killed a stage's container at its memory limit, so the stage could not react itself."""


class _JobDeletedError(PreemptedError):
    """Somebody else deleted a stage's Job before it ended."""


def with_halved_micro_batch(task: Task, killed: OutOfMemoryError, on_line: Callable[[str], None]) -> Task:
    """Return `task` with half the rows in a pass if its recipe allows that; raises `killed` if not, or at 1 row."""
    section = section_that_halves(task.stage, task.recipe)
    if section is None or (tried := with_micro_batch_below(section, task.oom_micro_batch_rows)).pass_rows == 1:
        raise killed
    on_line(
        f"{task.stage}: {killed}; restarts with micro-batches of {halved_micro_batch_rows(tried)} rows instead of "
        f"up to {tried.pass_rows}, from the newest checkpoint; the {section.batch_rows} rows of a step stay"
    )
    return replace(task, oom_micro_batch_rows=(*task.oom_micro_batch_rows, tried.pass_rows))
