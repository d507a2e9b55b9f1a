"""Watchdogs over a Job's pods: one that does not start, and one whose node was lost."""

import time
from collections.abc import Callable

from llamarefine_jobs.contract.errors import AccessError, LlamaRefineError
from llamarefine_k8s.cluster import KubeObject
from llamarefine_k8s.cluster.api import Cluster
from llamarefine_k8s.cluster.job_feed import JobFeed
from llamarefine_k8s.cluster.reasons import Reason, newest, why_waiting

_FIRST_CHECK_S, _LONGEST_CHECK_S = 2.0, 30.0  # time between checks: after a new reason, and at most


class StartWatchdog:
    """Reports why a stage does not start, and raises once it has taken longer than `timeout_s`.

    Time in a queue, or while a node is being added, does not count.
    """

    def __init__(self, cluster: Cluster, timeout_s: float, stage: str) -> None:
        self._cluster = cluster
        self._timeout_s = timeout_s
        self._stage = stage
        self._waiting_since_s = self._checked_s = time.monotonic()
        self._check_every_s = _FIRST_CHECK_S
        self._reported: set[str] = set()

    def check(self, feed: JobFeed, on_line: Callable[[str], None]) -> None:
        """Check the Job if a check is due; give each new reason to `on_line`.

        Raises the reason's LlamaRefineError if the stage has not started within the timeout.
        """
        now_s = time.monotonic()
        if feed.is_running or feed.is_removed:
            self._waiting_since_s = now_s
        left_s = self._waiting_since_s + self._timeout_s - now_s
        if feed.is_running or feed.is_removed or now_s - self._checked_s < min(self._check_every_s, left_s):
            return
        self._checked_s, self._check_every_s = now_s, min(self._check_every_s * 1.5, _LONGEST_CHECK_S)
        pods = feed.existing_pods
        reason = why_waiting(self._stage, feed.job, pods, events_of(self._cluster, feed.job, pods))
        if reason and reason.name not in self._reported:
            self._reported.add(reason.name)
            self._check_every_s = _FIRST_CHECK_S
            on_line(f"{self._stage}: waits: {reason}")
        if reason and reason.is_expected:
            self._waiting_since_s = now_s
        if now_s - self._waiting_since_s > self._timeout_s:
            raise self._timeout_error(reason)

    def _timeout_error(self, reason: Reason | None) -> LlamaRefineError:
        kind = reason.kind if reason else LlamaRefineError
        return kind(
            f"{self._stage} could not start within {self._timeout_s:g} s: {reason or 'its pod does not say why'}"
        )


def events_of(cluster: Cluster, job: KubeObject, pods: list[KubeObject]) -> list[KubeObject]:
    """Return the recent Events about a Job and about its newest pod."""
    latest = newest(pods)
    uids = [each["metadata"]["uid"] for each in (job, latest) if each]
    return [event for uid in uids for event in cluster.objects("Event", fields=f"involvedObject.uid={uid}")]


def abandon_lost_pods(cluster: Cluster, feed: JobFeed, report: Callable[[str], None]) -> None:
    """Mark the pods of lost nodes as failed, so that their Job replaces them; it would wait for their end forever.

    If such a node comes back, its process may still publish its artifact: the first of two writers wins, and both
    wrote the same content.
    """
    for pod in feed.lost_pods():
        name, node = pod["metadata"]["name"], pod["spec"].get("nodeName")
        try:
            cluster.abandon(pod)
            report(f"the node {node} does not answer; its pod {name} is abandoned")
        except AccessError as error:  # the Role of an earlier chart; the Job continues once an admin removes the node
            report(f"the node {node} does not answer, and its pod {name} cannot be abandoned: {error}")
