"""A container's log, each line once and in order, although connections break.

The API server can start a log at a second, not at a line. So lines are requested with their timestamps; after a break
the log is read again from a little before the last line, and lines that were yielded already are skipped. A broken
connection may look like the end of the log: the log is complete only when reading it again brings nothing new.
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
_OVERLAP = timedelta(seconds=1)  # two streams write one log: a line may follow a line of the next second
_MAX_EMPTY_READS = 5  # reads without a new line: lines that were rotated away cannot be found again
_UNREADABLE_S = 60.0  # an ended container's log is retried for so long: its node may be lost


class PodLog:
    """The log of one container. `after` is the timestamp of a line: that line and earlier ones are left out."""

    def __init__(self, cluster: Cluster, pod: str, container: str, after: str | None = None) -> None:
        self._cluster = cluster
        self._pod = pod
        self._container = container
        if after and not _has_time(after.encode()):  # from the bucket, where anyone with write access may change it
            after = None
        self._after = _instant(after.encode()) if after else None
        self._since: datetime | None = _second(after.encode()) - _OVERLAP if after else None
        self._yielded: list[bytes] = []  # the lines since then
        self._count = 0  # of all yielded lines
        self._part = b""  # the last line of the last read, if it had no newline
        self._is_whole = True  # whether the last read contained all of `_yielded`
        self.read_to: str | None = after

    def lines(self, follow: bool = True) -> Iterator[str]:
        """Yield every line up to the container's end; without `follow`, only the lines written so far."""
        failures = 0
        while follow and not self._is_over():  # checked first: lines written by then are read below
            try:
                yield from self._new_lines(follow=True)
                failures = 0
            except LlamaRefineError:  # the node is unreachable, the pod is deleted, or its container is about to start
                failures += 1
            time.sleep(_PAUSES_S[min(failures, len(_PAUSES_S) - 1)])
        yield from self._remaining_lines(has_ended=follow)

    def _remaining_lines(self, *, has_ended: bool) -> Iterator[str]:
        """Yield the lines not yet yielded; reads the log until a complete read brings nothing new.

        The log of a container that may still run is read a few times only: each read may bring new lines.
        """
        reads, empty_reads, until_s = 0, 0, time.monotonic() + _UNREADABLE_S
        while empty_reads < _MAX_EMPTY_READS and (has_ended or reads < _MAX_EMPTY_READS):
            count, part = self._count, self._part
            try:
                yield from self._new_lines(follow=False)
            except StoreError as error:
                if time.monotonic() > until_s:
                    yield f"llamarefine: the rest of this log cannot be read: {error}"
                    return
                time.sleep(_PAUSES_S[-1])
                continue
            except LlamaRefineError:  # the pod is deleted
                return
            reads += 1
            is_unchanged = self._is_whole and (self._count, self._part) == (count, part)
            if is_unchanged and (count or empty_reads):
                break
            empty_reads = 0 if self._count > count else empty_reads + 1
        if self._part and self._is_new(self._part):
            yield self._record(self._part)

    def _new_lines(self, *, follow: bool) -> Iterator[str]:
        """Read the log once, from a little before the last line, and yield the lines not yet yielded."""
        expected, self._part = Counter(self._yielded), b""
        since = self._since.isoformat().replace("+00:00", "Z") if self._since else None
        for raw in self._cluster.log(self._pod, self._container, since=since, follow=follow):
            if not raw.endswith(b"\n"):
                self._part = raw
            elif expected[raw]:
                expected[raw] -= 1
            elif self._is_new(raw):
                yield self._record(raw)
        self._is_whole = not expected.total()

    def _is_new(self, raw: bytes) -> bool:
        return _has_time(raw) and (self._after is None or _instant(raw) > self._after)

    def _record(self, raw: bytes) -> str:
        """Record a line as yielded, and return its text."""
        found = _TIME.match(raw)
        assert found
        since = _second(raw) - _OVERLAP
        if self._since is None or since > self._since:
            self._since = since
            self._yielded = [line for line in self._yielded if _second(line) >= since]
        self._yielded.append(raw)
        self._count += 1
        self.read_to = max(self.read_to or "", found[0].decode().strip(), key=lambda at: _instant(at.encode()))
        return _text(raw[found.end() :])

    def _is_over(self) -> bool:
        pod = self._cluster.get("Pod", self._pod)
        return pod is None or "terminated" in container_state(pod)


def _has_time(raw: bytes) -> bool:
    """Whether a line begins with a valid timestamp, as every line from an API server does."""
    found = _TIME.match(raw)
    with contextlib.suppress(ValueError, OverflowError):
        return found is not None and bool(datetime.fromisoformat((found[1] + found[3]).decode()) - _OVERLAP)
    return False


def _instant(raw: bytes) -> tuple[bytes, bytes]:
    """Return a line's timestamp in a form that compares: the API server omits trailing zeros of the nanoseconds."""
    found = _TIME.match(raw)
    return (found[1], (found[2] or b"").ljust(9, b"0")) if found else (b"", b"")


def _second(raw: bytes) -> datetime:
    """Return the timestamp of a line, without its fraction of a second."""
    found = _TIME.match(raw)
    assert found
    return datetime.fromisoformat((found[1] + found[3]).decode())


def _text(line: bytes) -> str:
    """Return a line as text; of a line redrawn by carriage returns only its last state."""
    return line.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2].rstrip()
