"""One Job as it runs: its state, the states of its pods and their log lines, read by threads into one queue."""

import math
import threading
import time
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Any, Self

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
_DELETION_DELAY_S = 10.0  # the longest wait, after the Job's deletion, until its pods are being deleted
_LOG_END_DELAY_S = 10.0  # the longest wait, after a pod's removal, for the end of its log
_STARTED_PHASES = ("Running", "Succeeded")
_ENDED_PHASES = ("Succeeded", "Failed")


class JobFeed:
    """Watches a Job and its pods, and reads the log of every pod.

    Background threads only put into a queue; `lines` reads the queue and updates `job` and `pods`. `pods` also
    contains the pods that no longer exist, in their last known state. `after` is the timestamp of a log line: that
    line and earlier ones are left out.

    Job and pods are listed at least every minute. `is_over` becomes true within a bounded time after the Job has ended
    or is being deleted, in whatever order its pods end, vanish or lose their owner.
    """

    def __init__(self, cluster: Cluster, job: KubeObject, container: str, after: str | None = None) -> None:
        self.job = job
        self.pods: dict[str, KubeObject] = {}
        self.read_to = after  # timestamp of the last line that `lines` yielded
        self.is_removed = False  # whether the Job is deleted or being deleted: nothing replaces its pods any more
        self._uid = job["metadata"]["uid"]
        self._name = job["metadata"]["name"]
        self._container = container
        self._cluster = cluster
        self._after = after
        self._has_reader: set[str] = set()  # uids of the pods whose log is or was read
        self._gone_since_s: dict[str, float] = {}  # by uid of each pod that was removed, or lost its owner
        self._deleting_since_s: dict[str, float] = {}  # by pod uid: when its deletion was first seen
        self._reading: set[str] = set()  # uids of the pods whose log is not read to its end
        self._queue: SimpleQueue[tuple[str, Any, Any]] = SimpleQueue()
        self._closed = threading.Event()
        self._ended_s = math.inf  # when the Job's end or deletion was first seen

    def __enter__(self) -> Self:
        self._start(self._watch, "Job", {"fields": f"metadata.name={self._name}"}, [self.job])
        self._start(self._watch, "Pod", {"labels": f"{JOB_NAME}={self._name}"}, [])
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._closed.set()  # the threads end with their current watch request; they are not joined

    def lines(self, wait_s: float) -> Iterator[str]:
        """Yield the log lines that arrive within `wait_s`, and update `job` and `pods`.

        Raises the error of a background thread.
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
        if any(self._is_awaited(uid) for uid in self._reading):
            return False
        return (
            self._pods_succeeded
            or (self._has_ended and self._last_pod_has_ended)
            or (self.is_removed and self._removed_pods_have_ended)
        )

    @property
    def existing_pods(self) -> list[KubeObject]:
        """The Job's pods, without those that were removed or no longer belong to it."""
        return [pod for uid, pod in self.pods.items() if uid not in self._gone_since_s]

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
        last = {node_index(pod): pod for pod in self._by_age() if pod["metadata"]["uid"] not in self._gone_since_s}
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
        has_ended = pod is not None and pod["status"].get("phase") in _ENDED_PHASES
        return has_ended or time.monotonic() - self._ended_s > _POD_END_DELAY_S

    @property
    def _removed_pods_have_ended(self) -> bool:
        """Whether no pod of the deleted Job runs any more; true if that is not known in time."""
        if not self.pods:  # there are none, or they are not listed yet
            return time.monotonic() - self._ended_s > _POD_END_DELAY_S
        running = [pod for pod in self.existing_pods if pod["status"].get("phase") not in _ENDED_PHASES]
        return not any(self._is_awaited(pod["metadata"]["uid"]) for pod in running)

    def _is_awaited(self, uid: str) -> bool:
        """Whether a pod may still end, or more of its log arrive. Limited in time once the pod or its Job is gone.

        A pod of a deleted Job that is not even being deleted in time is an orphan, or there is no garbage collector.
        """
        if uid in self._gone_since_s:
            return time.monotonic() - self._gone_since_s[uid] < _LOG_END_DELAY_S
        return not self.is_removed or time.monotonic() - self._ended_s < _deletion_limit_s(self.pods[uid])

    def _update_job(self, change: str, job: KubeObject) -> None:
        if job["metadata"]["uid"] == self._uid:  # not a later Job of the same name
            self.job = job
            self.is_removed = self.is_removed or change == "DELETED" or "deletionTimestamp" in job["metadata"]
            if self._ended_s == math.inf and (self._has_ended or self.is_removed):
                self._ended_s = time.monotonic()

    def _update_pod(self, change: str, pod: KubeObject) -> None:
        uid = pod["metadata"]["uid"]
        is_owned = any(owner["uid"] == self._uid for owner in pod["metadata"].get("ownerReferences") or ())
        if not is_owned and uid not in self.pods:
            return
        self.pods[uid] = pod
        if change == "DELETED" or not is_owned:
            self._gone_since_s.setdefault(uid, time.monotonic())
            self._deleting_since_s.pop(uid, None)
        else:
            self._gone_since_s.pop(uid, None)
            if "deletionTimestamp" in pod["metadata"]:
                self._deleting_since_s.setdefault(uid, time.monotonic())
        if has_started(pod) and uid not in self._has_reader:
            self._has_reader.add(uid)
            self._reading.add(uid)
            log = PodLog(self._cluster, pod["metadata"]["name"], self._container, self._after)
            self._start(self._read, pod, log)

    def _watch(self, kind: str, selector: dict[str, str], expected: list[KubeObject]) -> None:
        for change, item in self._cluster.watch(kind, stopped=self._closed.is_set, expected=expected, **selector):
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
            except Exception as error:  # a bug, too: without this thread nobody would learn of the Job's end
                self._queue.put(("error", None, error))

        threading.Thread(target=run, daemon=True).start()


def _has_succeeded(pod: KubeObject) -> bool:
    return bool(pod["status"].get("phase") == "Succeeded")


def _deletion_limit_s(pod: KubeObject) -> float:
    """Return for how many seconds after its Job's deletion a pod may run, if its node and the controllers work."""
    if "deletionTimestamp" not in pod["metadata"]:
        return _DELETION_DELAY_S
    grace_s: float = pod["metadata"].get("deletionGracePeriodSeconds") or 0
    return _DELETION_DELAY_S + grace_s + _LOST_S
