"""What becomes of one Job: its changes, its pods' and their log lines, as they happen, in one place."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Self

from llamarefine_jobs.contract.errors import LlamaRefineError
from llamarefine_k8s.cluster.api import Cluster, Object
from llamarefine_k8s.cluster.manifests import JOB_NAME
from llamarefine_k8s.cluster.pod_log import PodLog
from llamarefine_k8s.cluster.reasons import (
    condition,
    container_state,
    has_begun,
    is_killed_for_memory,
    newest,
    node_index,
    with_node_prefix,
)

_LATE_S = 3.0
_LOST_S = 60.0  # a node that answers has a pod gone soon after its grace period
_BEGUN = ("Running", "Succeeded")


class JobFeed:
    """Watches a Job and its pods, and reads every pod's log. Threads only put into a queue; `lines` takes it out."""

    def __init__(self, cluster: Cluster, job: Object, container: str, after: str | None = None) -> None:
        self.job = job
        self.pods: dict[str, Object] = {}
        self.read_to = after  # the time of the last line that was given
        self.is_removed = False
        self._uid = job["metadata"]["uid"]
        self._name = job["metadata"]["name"]
        self._container = container
        self._cluster = cluster
        self._after = after
        self._known: set[str] = set()
        self._told_s: dict[str, float] = {}  # when a pod that is there was first seen to be told to stop
        self._reading: set[str] = set()
        self._queue: SimpleQueue[tuple[str, Any, Any]] = SimpleQueue()
        self._closed = threading.Event()
        self._ended_s = math.inf

    def __enter__(self) -> Self:
        self._start(self._watch, "Job", {"fields": f"metadata.name={self._name}"})
        self._start(self._watch, "Pod", {"labels": f"{JOB_NAME}={self._name}"})
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._closed.set()  # the threads end with their watch at the latest; nobody waits for them

    def lines(self, wait_s: float) -> Iterator[str]:
        """The lines that come within `wait_s`; the Job and its pods are those of that time afterwards."""
        until_s = time.monotonic() + wait_s
        while True:
            try:
                what, subject, value = self._queue.get(timeout=max(0.0, until_s - time.monotonic()))
            except Empty:
                return
            match what:
                case "line":
                    self.read_to = subject or self.read_to
                    yield value
                case "read":
                    self._reading.discard(subject)
                case "error":
                    raise value
                case "Job":
                    self._take_job(subject, value)
                case _:
                    self._take_pod(subject, value)
            if self.is_over and self._queue.empty():
                return

    @property
    def is_over(self) -> bool:
        """Whether the Job has ended one way or the other, or was removed, and every line was read."""
        if self._reading:
            return False
        if self.is_removed:
            return not self.pods
        return self._pods_succeeded or (self._has_ended and self._pods_are_known)

    @property
    def has_succeeded(self) -> bool:
        """Told by the pod, a moment before the Job's controller has noticed."""
        succeeded = condition(self.job, "Complete", "SuccessCriteriaMet") is not None
        return succeeded or self._pods_succeeded

    @property
    def has_failed(self) -> bool:
        """Told by the Job's controller: it decides whether another pod is tried."""
        return condition(self.job, "Failed", "FailureTarget") is not None

    @property
    def is_running(self) -> bool:
        """Whether the newest pod's container runs, of each of the Job's nodes."""
        last = {node_index(pod): pod for pod in self._by_age()}
        return len(last) == self.nodes and all(pod["status"].get("phase") in _BEGUN for pod in last.values())

    @property
    def killed_for_memory(self) -> Object | None:
        """A pod that passed its memory limit, once its log is read."""
        killed = (pod for pod in self.pods.values() if is_killed_for_memory(pod))
        return next((pod for pod in killed if pod["metadata"]["uid"] not in self._reading), None)

    def lost_pods(self) -> list[Object]:
        """The pods that were told to stop and are there a minute after their grace period: their node is gone.

        Each is given once in that time, until its end is known.
        """
        now_s, lost = time.monotonic(), []
        for uid, told_s in self._told_s.items():
            pod = self.pods[uid]
            grace_s = pod["metadata"].get("deletionGracePeriodSeconds") or 0
            if "terminated" not in container_state(pod) and now_s - told_s > grace_s + _LOST_S:
                self._told_s[uid] = now_s
                lost.append(pod)
        return lost

    @property
    def nodes(self) -> int:
        """How many pods do the work side by side."""
        nodes: int = self.job["spec"].get("completions") or 1
        return nodes

    @property
    def replaced(self) -> Object:
        """The pod in whose place the newest one came."""
        *earlier, last = self._by_age()
        return next((pod for pod in reversed(earlier) if node_index(pod) == node_index(last)), last)

    @property
    def _pods_succeeded(self) -> bool:
        return len({node_index(pod) for pod in self.pods.values() if _has_succeeded(pod)}) == self.nodes

    def _by_age(self) -> list[Object]:
        return sorted(self.pods.values(), key=lambda pod: str(pod["metadata"]["creationTimestamp"]))

    @property
    def _has_ended(self) -> bool:
        return self.has_succeeded or self.has_failed

    @property
    def _pods_are_known(self) -> bool:
        """Whether the last pod's end is known, too, and so its log read; it is not waited for long."""
        pod = newest(list(self.pods.values()))
        ended = pod is not None and pod["status"].get("phase") in ("Succeeded", "Failed")
        return ended or time.monotonic() - self._ended_s > _LATE_S

    def _take_job(self, change: str, job: Object) -> None:
        if job["metadata"]["uid"] == self._uid:  # and not one of the same name that was made later
            self.job = job
            self.is_removed = self.is_removed or change == "DELETED"
            if self._ended_s == math.inf and self._has_ended:
                self._ended_s = time.monotonic()

    def _take_pod(self, change: str, pod: Object) -> None:
        uid = pod["metadata"]["uid"]
        if not any(owner["uid"] == self._uid for owner in pod["metadata"].get("ownerReferences") or ()):
            return
        if change == "DELETED" and self.is_removed:
            self.pods.pop(uid, None)
        else:
            self.pods[uid] = pod
        if change == "DELETED":
            self._told_s.pop(uid, None)
        elif "deletionTimestamp" in pod["metadata"]:
            self._told_s.setdefault(uid, time.monotonic())
        if has_begun(pod) and uid not in self._known:
            self._known.add(uid)
            self._reading.add(uid)
            log = PodLog(self._cluster, pod["metadata"]["name"], self._container, self._after)
            self._start(self._read, pod, log)

    def _watch(self, kind: str, selector: dict[str, str]) -> None:
        for change, item in self._cluster.watch(kind, stopped=self._closed.is_set, **selector):
            self._queue.put((kind, change, item))

    def _read(self, pod: Object, log: PodLog) -> None:
        is_first = node_index(pod) == 0
        for line in log.lines():
            # Where a successor goes on is told by the first node: the others' lines are few.
            self._queue.put(("line", log.read_to if is_first else None, with_node_prefix(pod, line)))
            if self._closed.is_set():
                return
        self._queue.put(("read", pod["metadata"]["uid"], None))

    def _start(self, work: Callable[..., None], *arguments: Any) -> None:
        def run() -> None:
            try:
                work(*arguments)
            except LlamaRefineError as error:
                self._queue.put(("error", None, error))

        threading.Thread(target=run, daemon=True).start()


def _has_succeeded(pod: Object) -> bool:
    return bool(pod["status"].get("phase") == "Succeeded")
