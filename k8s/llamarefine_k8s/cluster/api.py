"""The API server: the only module that talks to it. Objects are plain dictionaries, in the API's own form.

The client library brings kubeconfig, certificates, tokens and their renewal; each failure leaves here as one line.
A watch survives what a watch meets: its end, silence, 410 Gone, an expired token, a server that restarts. An outage
is waited out with the `retry_policy` of whoever asks.
"""

import contextlib
import functools
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode

from llamarefine_jobs.contract.errors import AccessError, LlamaRefineError, StoreError
from llamarefine_jobs.contract.retry import RetryPolicy
from llamarefine_jobs.untrusted.log_redaction import redact_logs
from llamarefine_k8s.cluster.api_errors import grant_advice, kubeconfig_error_text, network_cause, sentence

Object = dict[str, Any]
Query = Sequence[tuple[str, Any]]
Result = TypeVar("Result")

_CONNECT_S, _READ_S = 5, 30
_WATCH_S = 60  # the server ends a watch so soon
_SILENCE_S = 15  # what has said nothing for so much longer is a broken line
_PAUSES_S = (0.2, 0.5, 1.0, 2.0, 5.0)  # between watches that break off at once, though lists are answered
_DOUBT_S = 30.0  # a server that starts refuses, for a while, those whom it accepted before
_PATHS = {
    "Job": "/apis/batch/v1/namespaces/{namespace}/jobs",
    "ConfigMap": "/api/v1/namespaces/{namespace}/configmaps",
    "Pod": "/api/v1/namespaces/{namespace}/pods",
    "Event": "/api/v1/namespaces/{namespace}/events",
    "ServiceAccount": "/api/v1/namespaces/{namespace}/serviceaccounts",
    "Service": "/api/v1/namespaces/{namespace}/services",
    "Secret": "/api/v1/namespaces/{namespace}/secrets",
    "ResourceQuota": "/api/v1/namespaces/{namespace}/resourcequotas",
    "LocalSubjectAccessReview": "/apis/authorization.k8s.io/v1/namespaces/{namespace}/localsubjectaccessreviews",
    "SelfSubjectAccessReview": "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews",
    "SelfSubjectReview": "/apis/authentication.k8s.io/v1/selfsubjectreviews",
    "Namespace": "/api/v1/namespaces",
    "Node": "/api/v1/nodes",
    "PodAnywhere": "/api/v1/pods",
}
_FORBIDDEN = re.compile(
    r'User "(?P<user>[^"]+)" cannot (?P<verb>\S+) resource "(?P<resource>[^"]+)" in API group "(?P<group>[^"]*)"'
)


class Cluster:
    """One namespace of one cluster, as the person, or the pod, that asks may see it."""

    def __init__(
        self, context: str | None = None, namespace: str | None = None, retry_policy: RetryPolicy | None = None
    ) -> None:
        self.retry_policy = retry_policy or RetryPolicy()
        self._context = context
        self._allowed: set[str] = set()  # what the server let us do before
        self.namespace = namespace or "default"
        self._client = self._connect()
        if not namespace:
            self.namespace = self._own_namespace() or "default"

    @property
    def host(self) -> str:
        """The API server's address."""
        return str(self._client.configuration.host)

    def get(self, kind: str, name: str) -> Object | None:
        """An object, or None."""
        return self._ask("GET", kind, name, missing_ok=True)

    def objects(self, kind: str, *, labels: str = "", fields: str = "") -> list[Object]:
        """The objects that the selectors name."""
        return self._listed(kind, labels, fields)[0]

    def create(self, manifest: Object) -> Object | None:
        """Make an object; None where one of that name is there."""
        return self._ask("POST", manifest["kind"], body=manifest, existing_ok=True)

    def try_out(self, manifest: Object) -> list[str]:
        """Have the server check an object without making it: its warnings. Raises what it would be refused for."""
        try:
            with self._errors():
                response = self._call("POST", self._path(manifest["kind"]), manifest, [("dryRun", "All")])
        except _RefusedError as refused:
            if refused.status == 409:
                return []
            raise self._from_status(refused) from None
        said = ", ".join(response.headers.getlist("Warning"))
        return [text.replace('\\"', '"') for text in re.findall(r'299 \S+ "((?:[^"\\]|\\.)*)"', said)]

    def patch(self, kind: str, name: str, patch: Object) -> Object | None:
        """Merge a patch into an object; None where there is none."""
        return self._ask("PATCH", kind, name, patch, missing_ok=True)

    def delete(self, kind: str, name: str, grace_s: int | None = None) -> None:
        """Remove an object, and in the background what it owns; nothing happens where there is none."""
        options: Object = {"propagationPolicy": "Background"}
        if grace_s is not None:
            options["gracePeriodSeconds"] = grace_s
        self._ask("DELETE", kind, name, options, missing_ok=True)

    def abandon(self, pod: Object) -> None:
        """Take a pod for failed and remove it, unless it changed since: only then does its Job make another.

        Kubernetes' own garbage collector does the same, but not before its node is gone from the API server, too.
        """
        name, version = pod["metadata"]["name"], pod["metadata"]["resourceVersion"]
        failed = {"metadata": {"resourceVersion": version}, "status": {"phase": "Failed", "reason": "NodeLost"}}
        if self._ask("PATCH", "Pod", f"{name}/status", failed, missing_ok=True, existing_ok=True):
            self.delete("Pod", name, grace_s=0)

    def log(self, pod: str, container: str, *, since: str | None, follow: bool) -> Iterator[bytes]:
        """The lines of a container's log, each with its time before it and its end of line, which a part of one lacks.

        Ends early where the connection breaks, and waits out nothing: StoreError where it cannot be read now.
        """
        query: list[tuple[str, Any]] = [("container", container), ("timestamps", "true")]
        query += [("follow", "true")] if follow else []
        query += [("sinceTime", since)] if since else []
        yield from _lines(self._open(f"{self._path('Pod', pod)}/log", query))

    def watch(
        self, kind: str, *, labels: str = "", fields: str = "", stopped: Callable[[], bool]
    ) -> Iterator[tuple[str, Object]]:
        """What is there, as ADDED, then each change, until `stopped`.

        After anything lost the objects are listed again: a change may be told twice, the last state always is, and
        what vanished meanwhile comes as DELETED. Raises what no retry_policy mends (403), and an outage that lasts.
        """
        known: dict[str, Object] = {}
        breaks = 0
        while not stopped():
            objects, version = self._listed(kind, labels, fields)
            there = {item["metadata"]["uid"]: item for item in objects}
            yield from (("DELETED", known[uid]) for uid in known.keys() - there.keys())
            yield from (("ADDED", item) for item in objects)
            known = there
            for change, item in self._changes(kind, labels, fields, version, stopped):
                breaks = 0
                uid = item["metadata"]["uid"]
                known[uid] = item
                if change == "DELETED":
                    del known[uid]
                yield change, item
            time.sleep(_PAUSES_S[min(breaks, len(_PAUSES_S) - 1)])
            breaks += 1

    def _changes(
        self, kind: str, labels: str, fields: str, version: str, stopped: Callable[[], bool]
    ) -> Iterator[tuple[str, Object]]:
        """Changes after `version`, watch after watch, until one breaks off or its version is too old."""
        while not stopped():
            query = [("watch", "true"), ("allowWatchBookmarks", "true"), *_selectors(labels, fields)]
            query += [("resourceVersion", version), ("timeoutSeconds", _WATCH_S)]
            try:
                response = self._patiently(functools.partial(self._open, self._path(kind), query), f"WATCH {kind}")
            except _GoneError:
                return
            began_s = time.monotonic()
            for line in _lines(response):
                event = _event(line)
                if event is None or event["type"] == "ERROR":  # 410 Gone, or a server that asks for a new list
                    response.close()
                    return
                version = event["object"]["metadata"]["resourceVersion"]
                if event["type"] != "BOOKMARK":
                    yield event["type"], event["object"]
            if time.monotonic() - began_s < _WATCH_S / 2:  # not the end that was agreed
                return

    def _open(self, path: str, query: Query) -> Any:
        """A response that goes on: silence for longer than a watch lasts is a broken line."""
        with self._errors():
            return self._call("GET", path, query=query, read_timeout_s=_WATCH_S + _SILENCE_S)

    def _listed(self, kind: str, labels: str, fields: str) -> tuple[list[Object], str]:
        found = self._ask("GET", kind, query=_selectors(labels, fields)) or {}
        return found["items"], found["metadata"]["resourceVersion"]

    def _path(self, kind: str, name: str = "") -> str:
        return _PATHS[kind].format(namespace=self.namespace) + (f"/{name}" if name else "")

    def _ask(
        self,
        method: str,
        kind: str,
        name: str = "",
        body: Object | None = None,
        *,
        query: Query = (),
        missing_ok: bool = False,
        existing_ok: bool = False,
    ) -> Object | None:
        """One request, tried again where the server or the way to it failed; what cannot be mended is raised."""
        expected = [status for status, ok in ((404, missing_ok), (409, existing_ok)) if ok]

        def ask() -> Object | None:
            with self._errors():
                try:
                    found: Object = json.loads(self._call(method, self._path(kind, name), body, query).data)
                except _RefusedError as refused:
                    if refused.status not in expected:
                        raise
                    return None
                return found

        return self._patiently(ask, f"{method} {kind}")

    def _patiently(self, ask: Callable[[], Result], what: str) -> Result:
        """What `ask` returns, an outage waited out; of `what` was allowed before, a starting server's refusal too."""
        refused_until_s: float | None = None
        while True:
            try:
                found = self.retry_policy.call(ask)
            except AccessError as refused:
                now_s = time.monotonic()
                refused_until_s = refused_until_s or now_s + min(_DOUBT_S, self.retry_policy.limit_s)
                if not self._is_doubtful(refused, what) or now_s > refused_until_s:
                    raise
                time.sleep(_PAUSES_S[2])
            else:
                self._allowed.add(what)
                return found

    def _is_doubtful(self, refused: AccessError, what: str) -> bool:
        """Whether a refusal is at odds with what the server said before."""
        if isinstance(refused, _UnknownError):
            return bool(self._allowed)
        return isinstance(refused, _ForbiddenError) and what in self._allowed

    def _call(
        self, method: str, path: str, body: Object | None = None, query: Query = (), read_timeout_s: float = _READ_S
    ) -> Any:
        """One request's response, its body still to be read; credentials that were not accepted are read anew, once."""
        from urllib3 import Timeout

        for renewed in (False, True):
            token = self._client.configuration.auth_settings().get("BearerToken", {}).get("value")
            patch = "application/merge-patch+json"
            response = self._client.rest_client.pool_manager.request(
                method,
                f"{self._client.configuration.host}{path}?{urlencode(query)}".rstrip("?"),
                body=None if body is None else json.dumps(body),
                headers={
                    "Accept": "application/json",
                    "Content-Type": patch if method == "PATCH" else "application/json",
                    **({"Authorization": token} if token else {}),
                },
                timeout=Timeout(connect=_CONNECT_S, read=read_timeout_s),
                retries=False,
                preload_content=False,
            )
            if response.status < 400:
                return response
            refused = _RefusedError(response.status, response.data)
            if refused.status != 401 or renewed:
                break
            self._client = self._connect()
        if refused.status == 429 or refused.status >= 500:
            failed = StoreError(f"the API server answered {refused.status}: {refused}")
            asked_s = response.headers.get("Retry-After", "")
            failed.retry_after_s = float(asked_s) if asked_s.isdecimal() else 0.0
            raise failed
        raise refused

    def _connect(self) -> Any:
        """A client for the kubeconfig's context, or for the pod that this runs in."""
        from kubernetes import client, config

        redact_logs()
        settings = client.Configuration()
        try:
            if self._context is None and "KUBERNETES_SERVICE_HOST" in os.environ:
                config.load_incluster_config(client_configuration=settings)
            else:
                config.load_kube_config(context=self._context, client_configuration=settings)
        except config.ConfigException as error:
            raise AccessError(kubeconfig_error_text(self._context, error)) from None
        except Exception as error:  # a kubeconfig that is no YAML, or names files that are not there
            why = "it is none" if isinstance(error, TypeError | AttributeError | KeyError) else sentence(error)
            raise AccessError(f"the kubeconfig cannot be used: {why}; set KUBECONFIG") from None
        return client.ApiClient(settings)

    def _own_namespace(self) -> str | None:
        from kubernetes import config

        inside = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
        if self._context is None and inside.is_file():
            return inside.read_text().strip()
        with contextlib.suppress(Exception):
            contexts, active = config.list_kube_config_contexts()
            for each in contexts:
                if each["name"] == (self._context or active["name"]):
                    namespace: str | None = each["context"].get("namespace")
                    return namespace
        return None

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn what the network does into a StoreError, and a refusal into the error of its kind."""
        from urllib3.exceptions import HTTPError

        try:
            yield
        except _RefusedError as refused:
            raise self._from_status(refused) from None
        except json.JSONDecodeError:
            raise StoreError("the API server's answer broke off") from None
        except (HTTPError, OSError) as error:
            raise StoreError(
                f"the API server at {self._client.configuration.host} cannot be reached: {network_cause(error)}; "
                "is the cluster up, and the kubeconfig's context the right one?"
            ) from None

    def _from_status(self, refused: "_RefusedError") -> LlamaRefineError:
        match refused.status:
            case 401:
                return _UnknownError(
                    "the API server does not accept these credentials (401): the token may have expired; log in to "
                    "the cluster again"
                )
            case 403:
                return self._forbidden(str(refused))
            case 404:
                return AccessError(f"the cluster has no such thing: {refused}")
            case 410:
                return _GoneError(str(refused))
            case status:
                return LlamaRefineError(f"the API server refused ({status}): {refused}")

    def _forbidden(self, message: str) -> AccessError:
        found = _FORBIDDEN.search(message)
        if not found:  # a quota, an admission rule: the server says it best
            return AccessError(f"the cluster forbids it: {sentence(message)}")
        what = found["resource"] + (f".{found['group']}" if found["group"] else "")
        return _ForbiddenError(
            f"{found['user']} may not {found['verb']} {what} in namespace {self.namespace}; "
            f"{grant_advice(found['user'], self.namespace)}"
        )


class _RefusedError(Exception):
    """An answer of 400 to 499, in the server's words."""

    def __init__(self, status: int, body: bytes) -> None:
        try:
            message = str(json.loads(body)["message"])
        except (TypeError, ValueError, KeyError):
            message = body.decode(errors="replace")
        super().__init__(sentence(message))
        self.status = status


class _UnknownError(AccessError):
    """We are not known; a server that has only just started says so to everybody."""


class _ForbiddenError(AccessError):
    """We may not do this; the same."""


class _GoneError(AccessError):
    """A version that the server has forgotten."""


def _selectors(labels: str, fields: str) -> Query:
    return [(name, value) for name, value in (("labelSelector", labels), ("fieldSelector", fields)) if value]


def _lines(response: Any) -> Iterator[bytes]:
    """The lines of a body that comes bit by bit, each with its end; what ends it, ends it."""
    from urllib3.exceptions import HTTPError

    pending = b""
    try:
        for chunk in response.stream(amt=1 << 16, decode_content=False):
            *lines, pending = (pending + chunk).split(b"\n")
            yield from (line + b"\n" for line in lines)
    except (HTTPError, OSError):
        return
    finally:
        response.close()
    if pending:  # a line without an end, or the first part of one: the end of a broken connection may look clean
        yield pending


def _event(line: bytes) -> Object | None:
    """A watch's event; None where the line broke off."""
    with contextlib.suppress(ValueError):
        event: Object = json.loads(line)
        return event
    return None
