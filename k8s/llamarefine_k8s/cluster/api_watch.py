"""A watch on the API server's objects that survives disconnects, silence, 410 Gone, expired tokens and restarts."""

import contextlib
import functools
import json
import time
from collections.abc import Callable, Iterator

from llamarefine_k8s.cluster import KubeObject
from llamarefine_k8s.cluster.api_errors import GoneError
from llamarefine_k8s.cluster.api_requests import ApiRequests, Query, response_lines

WATCH_S = 60  # the server ends each watch request after this time
SILENCE_S = 15  # a connection that is silent for this much longer than WATCH_S is broken
_PAUSES_S = (0.2, 0.5, 1.0, 2.0, 5.0)  # between watches that break off at once although lists succeed


def watch(
    requests: ApiRequests, kind: str, selectors: Query, stopped: Callable[[], bool]
) -> Iterator[tuple[str, KubeObject]]:
    """Yield the existing objects as ADDED, then each change, until `stopped` returns true; see `Cluster.watch`."""
    known: dict[str, KubeObject] = {}
    breaks = 0
    while not stopped():
        objects, version = requests.list_objects(kind, selectors)
        found = {item["metadata"]["uid"]: item for item in objects}
        yield from (("DELETED", known[uid]) for uid in known.keys() - found.keys())
        yield from (("ADDED", item) for item in objects)
        known = found
        for change, item in _changes(requests, kind, selectors, version, stopped):
            breaks = 0
            uid = item["metadata"]["uid"]
            known[uid] = item
            if change == "DELETED":
                del known[uid]
            yield change, item
        time.sleep(_PAUSES_S[min(breaks, len(_PAUSES_S) - 1)])
        breaks += 1


def _changes(
    requests: ApiRequests, kind: str, selectors: Query, version: str, stopped: Callable[[], bool]
) -> Iterator[tuple[str, KubeObject]]:
    """Yield the changes after `version`, over several watch requests, until one breaks off or the version expires."""
    while not stopped():
        query = [("watch", "true"), ("allowWatchBookmarks", "true"), *selectors]
        query += [("resourceVersion", version), ("timeoutSeconds", WATCH_S)]
        open_watch = functools.partial(requests.open_stream, requests.path(kind), query, WATCH_S + SILENCE_S)
        try:
            response = requests.retried(open_watch, f"WATCH {kind}")
        except GoneError:
            return
        began_s = time.monotonic()
        for line in response_lines(response):
            event = _parse_event(line)
            if event is None or event["type"] == "ERROR":  # 410 Gone, or another reason to list again
                response.close()
                return
            version = event["object"]["metadata"]["resourceVersion"]
            if event["type"] != "BOOKMARK":
                yield event["type"], event["object"]
        if time.monotonic() - began_s < WATCH_S / 2:  # the connection broke before the server's own timeout
            return


def _parse_event(line: bytes) -> KubeObject | None:
    """Return a watch event; None if the line broke off."""
    with contextlib.suppress(ValueError):
        event: KubeObject = json.loads(line)
        return event
    return None
