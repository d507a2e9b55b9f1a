"""A watch on the API server's objects that survives disconnects, silence, 410 Gone, expired tokens and restarts."""

import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence

from llamarefine_jobs.contract.errors import StoreError
from llamarefine_k8s.cluster import KubeObject
from llamarefine_k8s.cluster.api_errors import GoneError
from llamarefine_k8s.cluster.api_requests import ApiRequests, Query, response_lines

WATCH_S = 40  # the server ends each watch request after this time; then the objects are listed again
SILENCE_S = 15  # a connection that is silent for this much longer than WATCH_S is broken
_PAUSES_S = (0.2, 0.5, 1.0, 2.0, 5.0)  # between watches that break off at once although lists succeed


def watch(
    requests: ApiRequests,
    kind: str,
    selectors: Query,
    stopped: Callable[[], bool],
    expected: Sequence[KubeObject] = (),
) -> Iterator[tuple[str, KubeObject]]:
    """Yield the existing objects as ADDED, then each change, until `stopped` returns true; see `Cluster.watch`.

    Each watch request is followed by a new list, so a change that no watch delivered is yielded within a minute.
    """
    known = {item["metadata"]["uid"]: item for item in expected}
    breaks = 0
    while not stopped():
        objects, version = requests.list_objects(kind, selectors)
        found = {item["metadata"]["uid"]: item for item in objects}
        yield from (("DELETED", known[uid]) for uid in known.keys() - found.keys())
        yield from (("ADDED", item) for item in objects)
        known = found
        began_s, pause_s = time.monotonic(), 0.0
        try:
            for change, item in _changes(requests, kind, selectors, version):
                breaks = 0
                uid = item["metadata"]["uid"]
                known[uid] = item
                if change == "DELETED":
                    del known[uid]
                yield change, item
        except GoneError:
            pass
        except StoreError as error:  # the list is what is retried: it ends the outage, or gives up
            pause_s = error.retry_after_s or 0.0
        if time.monotonic() - began_s < WATCH_S / 2:  # it broke before the server's own timeout
            time.sleep(max(pause_s, _PAUSES_S[min(breaks, len(_PAUSES_S) - 1)]))
            breaks += 1


def _changes(requests: ApiRequests, kind: str, selectors: Query, version: str) -> Iterator[tuple[str, KubeObject]]:
    """Yield the changes after `version`, from one watch request.

    Raises GoneError if the version has expired, StoreError if the watch cannot be opened now.
    """
    query = [("watch", "true"), ("allowWatchBookmarks", "true"), *selectors]
    query += [("resourceVersion", version), ("timeoutSeconds", WATCH_S)]
    open_watch = functools.partial(requests.open_stream, requests.path(kind), query, WATCH_S + SILENCE_S)
    response = requests.granted(open_watch, f"WATCH {kind}")
    until_s = time.monotonic() + WATCH_S
    for line in response_lines(response):
        event = _parse_event(line)
        if event is None or event["type"] == "ERROR":  # 410 Gone, or another reason to list again
            response.close()
            return
        if event["type"] != "BOOKMARK":
            yield event["type"], event["object"]
        if time.monotonic() > until_s:  # the server does not keep its timeout
            response.close()
            return


def _parse_event(line: bytes) -> KubeObject | None:
    """Return a watch event; None if the line broke off."""
    with contextlib.suppress(ValueError):
        event: KubeObject = json.loads(line)
        return event
    return None
