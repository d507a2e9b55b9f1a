"""A container's log, each line once and in order, whatever happens to the connection meanwhile.

The API server can start a log at a second, not at a line. So every line is asked for with its time; after a break the
log starts again a little before the last line, and what was given already is left out. A broken connection may look
like an end: what was read is the whole log only when reading it again brings nothing new.
"""

import contextlib
import re
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timedelta

from llamarefine_jobs.contract.errors import LlamaRefineError, StoreError
from llamarefine_k8s.cluster.api import Cluster
from llamarefine_k8s.cluster.reasons import container_state

_TIME = re.compile(rb"(\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d)(?:\.(\d+))?(Z|[+-]\d\d:\d\d) ?")
_PAUSES_S = (0.3, 0.3, 0.5, 1.0, 2.0)
_OVERLAP = timedelta(seconds=1)  # two streams write one log: a line may stand behind one of the next second
_READINGS = 5  # that bring nothing new, at most: what was rotated away is not found again
_UNREADABLE_S = 60.0  # an ended container's log is tried for so long: its node may be gone


class PodLog:
    """The log of one container. `after` is the time of a line: that one and all before it are left out."""

    def __init__(self, cluster: Cluster, pod: str, container: str, after: str | None = None) -> None:
        self._cluster = cluster
        self._pod = pod
        self._container = container
        if after and not _has_time(after.encode()):  # whoever may write the bucket may write that, too
            after = None
        self._after = _instant(after.encode()) if after else None
        self._since: datetime | None = _second(after.encode()) - _OVERLAP if after else None
        self._given: list[bytes] = []  # the lines since then
        self._count = 0
        self._part = b""  # what stood last without an end of line
        self._is_whole = True  # whether the last reading had all that was given
        self.read_to: str | None = after

    def lines(self, follow: bool = True) -> Iterator[str]:
        """Every line up to the container's end; those that are there now where it is not to be followed."""
        failures = 0
        while follow and not self._is_over():  # asked first: what was written by then is read below
            try:
                yield from self._new_lines(follow=True)
                failures = 0
            except LlamaRefineError:  # the node is away, the pod gone, or its container only about to start
                failures += 1
            time.sleep(_PAUSES_S[min(failures, len(_PAUSES_S) - 1)])
        yield from self._rest()

    def _rest(self) -> Iterator[str]:
        """What is there and was not given, read until a whole reading brings nothing new."""
        fruitless, until_s = 0, time.monotonic() + _UNREADABLE_S
        while fruitless < _READINGS:
            count, part = self._count, self._part
            try:
                yield from self._new_lines(follow=False)
            except StoreError as error:
                if time.monotonic() > until_s:
                    yield f"llamarefine: the rest of this log cannot be read: {error}"
                    return
                time.sleep(_PAUSES_S[-1])
                continue
            except LlamaRefineError:  # the pod is gone
                return
            is_same = self._is_whole and (self._count, self._part) == (count, part)
            if is_same and (count or fruitless):
                break
            fruitless = 0 if self._count > count else fruitless + 1
        if self._part and self._is_new(self._part):
            yield self._give(self._part)

    def _new_lines(self, *, follow: bool) -> Iterator[str]:
        given, self._part = Counter(self._given), b""
        since = self._since.isoformat().replace("+00:00", "Z") if self._since else None
        for raw in self._cluster.log(self._pod, self._container, since=since, follow=follow):
            if not raw.endswith(b"\n"):
                self._part = raw
            elif given[raw]:
                given[raw] -= 1
            elif self._is_new(raw):
                yield self._give(raw)
        self._is_whole = not given.total()

    def _is_new(self, raw: bytes) -> bool:
        return _has_time(raw) and (self._after is None or _instant(raw) > self._after)

    def _give(self, raw: bytes) -> str:
        """Take note of a line; its text."""
        found = _TIME.match(raw)
        assert found
        since = _second(raw) - _OVERLAP
        if self._since is None or since > self._since:
            self._since = since
            self._given = [line for line in self._given if _second(line) >= since]
        self._given.append(raw)
        self._count += 1
        self.read_to = max(self.read_to or "", found[0].decode().strip(), key=lambda at: _instant(at.encode()))
        return _text(raw[found.end() :])

    def _is_over(self) -> bool:
        pod = self._cluster.get("Pod", self._pod)
        return pod is None or "terminated" in container_state(pod)


def _has_time(raw: bytes) -> bool:
    """Whether a line begins with a time that there is, as every line from an API server does."""
    found = _TIME.match(raw)
    with contextlib.suppress(ValueError, OverflowError):
        return found is not None and bool(datetime.fromisoformat((found[1] + found[3]).decode()) - _OVERLAP)
    return False


def _instant(raw: bytes) -> tuple[bytes, bytes]:
    """A line's time as something that compares: the nanoseconds come without their last zeros."""
    found = _TIME.match(raw)
    return (found[1], (found[2] or b"").ljust(9, b"0")) if found else (b"", b"")


def _second(raw: bytes) -> datetime:
    """The second of a line that begins with its time."""
    found = _TIME.match(raw)
    assert found
    return datetime.fromisoformat((found[1] + found[3]).decode())


def _text(line: bytes) -> str:
    """A line as text, of a redrawn one what stood there last."""
    return line.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2].rstrip()
