"""One Job as it runs: its state, the states of its pods and their log lines, read by threads into one queue."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Self

from llamarefine_jobs.contract.errors import LlamaRefineError
from llamarefine_k8s.cluster import KubeObject
from llamarefine_k8s.cluster.api import Cluster
from llamarefine_k8s.cluster.manifests import JOB_NAME
from llamarefine_k8s.cluster.pod_log import PodLog
from llamarefine_k8s.cluster.reasons import (
    condition,
    container_state,
    has_started,
    is_killed_for_memory,
    newest,
    node_index,
    with_node_prefix,
)

_POD_END_DELAY_S = 3.0  # the longest wait, after the Job's end, for its last pod's end
_LOST_S = 60.0  # a node that works removes a pod soon after its grace period
_STARTED_PHASES = ("Running", "Succeeded")


class JobFeed:
    """Watches a Job and its pods, and reads the log of every pod.

    Background threads only put into a queue; `lines` reads the queue and updates `job` and `pods`. `after` is the
    timestamp of a log line: that line and earlier ones are left out.
    """

    def __init__(self, cluster: Cluster, job: KubeObject, container: str, after: str | None = None) -> None:
        self.job = job
        self.pods: dict[str, KubeObject] = {}
        self.read_to = after  # timestamp of the last line that `lines` yielded
        self.is_removed = False
        self._uid = job["metadata"]["uid"]
        self._name = job["metadata"]["name"]
        self._container = container
        self._cluster = cluster
        self._after = after
        self._has_reader: set[str] = set()  # uids of the pods whose log is or was read
        self._deleting_since_s: dict[str, float] = {}  # by pod uid: when its deletion was first seen
        self._reading: set[str] = set()  # uids of the pods whose log is not read to its end
        self._queue: SimpleQueue[tuple[str, Any, Any]] = SimpleQueue()
        self._closed = threading.Event()
        self._ended_s = math.inf

    def __enter__(self) -> Self:
        self._start(self._watch, "Job", {"fields": f"metadata.name={self._name}"})
        self._start(self._watch, "Pod", {"labels": f"{JOB_NAME}={self._name}"})
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._closed.set()  # the threads end with their current watch request; they are not joined

    def lines(self, wait_s: float) -> Iterator[str]:
        """Yield the log lines that arrive within `wait_s`, and update `job` and `pods`.

        Raises the LlamaRefineError of a background thread.
        """
        until_s = time.monotonic() + wait_s
        while True:
            try:
                kind, subject, value = self._queue.get(timeout=max(0.0, until_s - time.monotonic()))
            except Empty:
                return
            match kind:
                case "line":
                    self.read_to = subject or self.read_to
                    yield value
                case "read":
                    self._reading.discard(subject)
                case "error":
                    raise value
                case "Job":
                    self._update_job(subject, value)
                case _:
                    self._update_pod(subject, value)
            if self.is_over and self._queue.empty():
                return

    @property
    def is_over(self) -> bool:
        """Whether the Job has succeeded, failed or been deleted, and every log line has been read."""
        if self._reading:
            return False
        if self.is_removed:
            return not self.pods
        return self._pods_succeeded or (self._has_ended and self._last_pod_has_ended)

    @property
    def has_succeeded(self) -> bool:
        """Whether the Job or its pods succeeded; the pods show it a moment before the Job's controller does."""
        succeeded = condition(self.job, "Complete", "SuccessCriteriaMet") is not None
        return succeeded or self._pods_succeeded

    @property
    def has_failed(self) -> bool:
        """Whether the Job failed. Only its controller decides that: it may still try another pod."""
        return condition(self.job, "Failed", "FailureTarget") is not None

    @property
    def is_running(self) -> bool:
        """Whether the newest pod of each of the Job's nodes has started."""
        last = {node_index(pod): pod for pod in self._by_age()}
        return len(last) == self.nodes and all(pod["status"].get("phase") in _STARTED_PHASES for pod in last.values())

    @property
    def killed_for_memory(self) -> KubeObject | None:
        """A pod that was killed at its memory limit and whose log has been read; None if there is none."""
        killed = (pod for pod in self.pods.values() if is_killed_for_memory(pod))
        return next((pod for pod in killed if pod["metadata"]["uid"] not in self._reading), None)

    def lost_pods(self) -> list[KubeObject]:
        """Return the deleted pods that still exist a minute after their grace period: their node is lost.

        Each pod is returned once per such period, until its end is known.
        """
        now_s, lost = time.monotonic(), []
        for uid, since_s in self._deleting_since_s.items():
            pod = self.pods[uid]
            grace_s = pod["metadata"].get("deletionGracePeriodSeconds") or 0
            if "terminated" not in container_state(pod) and now_s - since_s > grace_s + _LOST_S:
                self._deleting_since_s[uid] = now_s
                lost.append(pod)
        return lost

    @property
    def nodes(self) -> int:
        """The number of pods that run side by side, one for each node."""
        nodes: int = self.job["spec"].get("completions") or 1
        return nodes

    @property
    def replaced(self) -> KubeObject:
        """The pod that the newest pod replaced."""
        *earlier, last = self._by_age()
        return next((pod for pod in reversed(earlier) if node_index(pod) == node_index(last)), last)

    @property
    def _pods_succeeded(self) -> bool:
        return len({node_index(pod) for pod in self.pods.values() if _has_succeeded(pod)}) == self.nodes

    def _by_age(self) -> list[KubeObject]:
        return sorted(self.pods.values(), key=lambda pod: str(pod["metadata"]["creationTimestamp"]))

    @property
    def _has_ended(self) -> bool:
        return self.has_succeeded or self.has_failed

    @property
    def _last_pod_has_ended(self) -> bool:
        """Whether the newest pod's end is known, so that its log is complete; true if it is not known in time."""
        pod = newest(list(self.pods.values()))
        has_ended = pod is not None and pod["status"].get("phase") in ("Succeeded", "Failed")
        return has_ended or time.monotonic() - self._ended_s > _POD_END_DELAY_S

    def _update_job(self, change: str, job: KubeObject) -> None:
        if job["metadata"]["uid"] == self._uid:  # not a later Job of the same name
            self.job = job
            self.is_removed = self.is_removed or change == "DELETED"
            if self._ended_s == math.inf and self._has_ended:
                self._ended_s = time.monotonic()

    def _update_pod(self, change: str, pod: KubeObject) -> None:
        uid = pod["metadata"]["uid"]
        if not any(owner["uid"] == self._uid for owner in pod["metadata"].get("ownerReferences") or ()):
            return
        if change == "DELETED" and self.is_removed:
            self.pods.pop(uid, None)
        else:
            self.pods[uid] = pod
        if change == "DELETED":
            self._deleting_since_s.pop(uid, None)
        elif "deletionTimestamp" in pod["metadata"]:
            self._deleting_since_s.setdefault(uid, time.monotonic())
        if has_started(pod) and uid not in self._has_reader:
            self._has_reader.add(uid)
            self._reading.add(uid)
            log = PodLog(self._cluster, pod["metadata"]["name"], self._container, self._after)
            self._start(self._read, pod, log)

    def _watch(self, kind: str, selector: dict[str, str]) -> None:
        for change, item in self._cluster.watch(kind, stopped=self._closed.is_set, **selector):
            self._queue.put((kind, change, item))

    def _read(self, pod: KubeObject, log: PodLog) -> None:
        is_first = node_index(pod) == 0
        for line in log.lines():
            # Only the first node's timestamps count for resuming the log: the other nodes write few lines.
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


def _has_succeeded(pod: KubeObject) -> bool:
    return bool(pod["status"].get("phase") == "Succeeded")
