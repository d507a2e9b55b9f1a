"""A container's log, each line once and in order, whatever happens to the connection meanwhile.

The API server can start a log at a second, not at a line. So every line is asked for with its time; after a break the
log starts again at the last line's second, and the lines of that second which were given already are left out.
"""

import re
import time
from collections import Counter
from collections.abc import Iterator

from llamarefine_jobs.contract.errors import LlamaRefineError, StoreError
from llamarefine_k8s.api import Cluster
from llamarefine_k8s.reasons import container_state

_TIME = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d+))?(Z|[+-]\d\d:\d\d) ?")
_PAUSE_S = 0.3


class PodLog:
    """The log of one container. `after` is the time of a line: that one and all before it are left out."""

    def __init__(self, cluster: Cluster, pod: str, container: str, after: str | None = None) -> None:
        self._cluster = cluster
        self._pod = pod
        self._container = container
        self._after = _instant(after.encode() + b" ") if after else None
        self._since: str | None = None
        self._given: list[bytes] = []  # the lines of the second that `_since` names
        self.read_to: str | None = after

    def lines(self, follow: bool = True) -> Iterator[str]:
        """Every line up to the container's end; those that are there now where it is not to be followed."""
        while True:
            last = self._is_over() if follow else True  # asked first: what was written by then is read below
            try:
                yield from self._new_lines(follow=not last)
            except StoreError:
                last = False
            except LlamaRefineError:  # the pod is gone, or its container only about to start
                last = last or self._is_over()
            if last:
                return
            time.sleep(_PAUSE_S)

    def _new_lines(self, *, follow: bool) -> Iterator[str]:
        given = Counter(self._given)
        for raw in self._cluster.log(self._pod, self._container, since=self._since, follow=follow):
            if given[raw]:
                given[raw] -= 1
                continue
            found = _TIME.match(raw)
            if not found:
                continue
            if self._after and _instant(raw) <= self._after:
                continue
            since = (found[1] + found[3]).decode()
            if since != self._since:
                self._since, self._given = since, []
            self._given.append(raw)
            self.read_to = found[0].decode().strip()
            yield _text(raw[found.end() :])

    def _is_over(self) -> bool:
        try:
            pod = self._cluster.get("Pod", self._pod)
        except StoreError:
            return False
        return pod is None or "terminated" in container_state(pod)


def _instant(raw: bytes) -> tuple[bytes, bytes]:
    """A line's time as something that compares: the nanoseconds come without their last zeros."""
    found = _TIME.match(raw)
    return (found[1], (found[2] or b"").ljust(9, b"0")) if found else (b"", b"")


def _text(line: bytes) -> str:
    """A line as text, of a redrawn one what stood there last."""
    return line.decode(errors="replace").rstrip("\r").rpartition("\r")[2].rstrip()
