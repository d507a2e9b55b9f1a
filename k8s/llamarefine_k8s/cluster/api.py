"""The API server: credentials from the kubeconfig or the pod, and the operations on one namespace's objects.

This is the only module that imports the Kubernetes client. Objects are plain dictionaries, as in the API's JSON.
Every failure is a LlamaRefineError with a message of one line; outages are retried by the `retry_policy`.
"""

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from llamarefine_jobs.contract.errors import AccessError
from llamarefine_jobs.contract.retry import RetryPolicy
from llamarefine_jobs.untrusted.log_redaction import redact_logs
from llamarefine_k8s.cluster import KubeObject, api_watch
from llamarefine_k8s.cluster.api_errors import RefusedError, one_line
from llamarefine_k8s.cluster.api_requests import ApiRequests, Query, response_lines

_DRY_RUN = [("dryRun", "All")]
_POD_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class Cluster:
    """One namespace of one cluster, with the permissions of the kubeconfig's user or of this pod.

    `context` and `namespace` default to the kubeconfig's current ones; inside a pod, to the pod's own.
    """

    def __init__(
        self, context: str | None = None, namespace: str | None = None, retry_policy: RetryPolicy | None = None
    ) -> None:
        redact_logs()  # before any credential is read
        self.namespace = namespace or _default_namespace(context) or "default"
        self._requests = ApiRequests(
            functools.partial(_connect, context), self.namespace, retry_policy or RetryPolicy()
        )

    @property
    def host(self) -> str:
        """The API server's address."""
        return self._requests.host

    @property
    def retry_policy(self) -> RetryPolicy:
        """How long outages are retried; may be replaced at any time."""
        return self._requests.retry_policy

    @retry_policy.setter
    def retry_policy(self, retry_policy: RetryPolicy) -> None:
        self._requests.retry_policy = retry_policy

    def get(self, kind: str, name: str) -> KubeObject | None:
        """Return an object, or None if it does not exist."""
        return self._requests.send("GET", kind, name, missing_ok=True)

    def objects(self, kind: str, *, labels: str = "", fields: str = "") -> list[KubeObject]:
        """Return the objects of a kind that match the label and field selectors."""
        return self._requests.list_objects(kind, _selectors(labels, fields))[0]

    def create(self, manifest: KubeObject) -> KubeObject | None:
        """Create an object and return it; None if an object of its name exists already."""
        return self._requests.send("POST", manifest["kind"], body=manifest, existing_ok=True)

    def dry_run_create(self, manifest: KubeObject) -> list[str]:
        """Let the server validate an object without creating it, and return the server's warnings.

        The server looks for an object of the same name only after it has accepted the new one, so an existing one is
        no failure. Raises the LlamaRefineError that creating the object would raise otherwise.
        """

        def send_once() -> str:
            with self._requests.translated_errors():
                try:
                    response = self._requests.call("POST", self._requests.path(manifest["kind"]), manifest, _DRY_RUN)
                except RefusedError as refused:
                    if refused.status == 409 and "already exists" in str(refused):
                        return ""
                    raise
                return ", ".join(response.headers.getlist("Warning"))

        warnings = self._requests.retried(send_once, f"dry run of {manifest['kind']}")
        return [text.replace('\\"', '"') for text in re.findall(r'299 \S+ "((?:[^"\\]|\\.)*)"', warnings)]

    def patch(self, kind: str, name: str, patch: KubeObject) -> KubeObject | None:
        """Merge a patch into an object and return the object; None if it does not exist."""
        return self._requests.send("PATCH", kind, name, patch, missing_ok=True)

    def delete(self, kind: str, name: str, grace_s: int | None = None, uid: str | None = None) -> None:
        """Delete an object if it exists; Kubernetes deletes what the object owns in the background.

        With `uid`, an object that was created in its place meanwhile is kept.
        """
        options: KubeObject = {"propagationPolicy": "Background"}
        if grace_s is not None:
            options["gracePeriodSeconds"] = grace_s
        if uid is not None:
            options["preconditions"] = {"uid": uid}
        self._requests.send("DELETE", kind, name, options, missing_ok=True, existing_ok=uid is not None)

    def abandon(self, pod: KubeObject) -> None:
        """Mark a pod of a lost node as failed and delete it, unless it changed since it was read.

        A Job replaces the pod only then. Kubernetes' garbage collector does the same, but only once the node is
        removed from the API server.
        """
        name, version = pod["metadata"]["name"], pod["metadata"]["resourceVersion"]
        failed = {"metadata": {"resourceVersion": version}, "status": {"phase": "Failed", "reason": "NodeLost"}}
        if self._requests.send("PATCH", "Pod", f"{name}/status", failed, missing_ok=True, existing_ok=True):
            self.delete("Pod", name, grace_s=0)

    def log(self, pod: str, container: str, *, since: str | None, follow: bool) -> Iterator[bytes]:
        """Yield the lines of a container's log, each with its timestamp in front and its newline at the end.

        The last line lacks its newline if it is incomplete. Ends early if the connection breaks. Nothing is retried:
        raises StoreError if the log cannot be read now.
        """
        query: list[tuple[str, Any]] = [("container", container), ("timestamps", "true")]
        query += [("follow", "true")] if follow else []
        query += [("sinceTime", since)] if since else []
        path = f"{self._requests.path('Pod', pod)}/log"
        yield from response_lines(self._requests.open_stream(path, query, api_watch.WATCH_S + api_watch.SILENCE_S))

    def watch(
        self,
        kind: str,
        *,
        labels: str = "",
        fields: str = "",
        stopped: Callable[[], bool],
        expected: Sequence[KubeObject] = (),
    ) -> Iterator[tuple[str, KubeObject]]:
        """Yield the existing objects as ADDED, then each change, until `stopped` returns true.

        At least every minute, and after a lost connection, the objects are listed again: a change may be yielded
        twice, but the last state of each object is always yielded, and objects that vanished meanwhile are yielded as
        DELETED. So are those of the `expected` objects that do not exist. Raises errors that retrying cannot fix
        (403), and StoreError for an outage that outlasts the retry policy.
        """
        return api_watch.watch(self._requests, kind, _selectors(labels, fields), stopped, expected)


def parse_quantity(text: str) -> Decimal:
    """Return a Kubernetes quantity such as `500m` or `4Gi` as a number."""
    from kubernetes.utils import quantity

    number: Decimal = quantity.parse_quantity(text)
    return number


def _connect(context: str | None) -> Any:
    """Return a Kubernetes client with credentials from the kubeconfig's context, or from the pod that this runs in."""
    from kubernetes import client, config

    settings = client.Configuration()
    try:
        if context is None and "KUBERNETES_SERVICE_HOST" in os.environ:
            config.load_incluster_config(client_configuration=settings)
        else:
            config.load_kube_config(context=context, client_configuration=settings)
    except config.ConfigException as error:
        raise AccessError(_kubeconfig_error_text(context, error)) from None
    except Exception as error:  # a kubeconfig that is not YAML, or names files that do not exist
        is_malformed = isinstance(error, TypeError | AttributeError | KeyError)
        why = "it is not a kubeconfig" if is_malformed else one_line(error)
        raise AccessError(f"the kubeconfig cannot be used: {why}; set KUBECONFIG") from None
    return client.ApiClient(settings)


def _default_namespace(context: str | None) -> str | None:
    """Return this pod's namespace or the one that the kubeconfig's context names; None if neither is known."""
    from kubernetes import config

    if context is None and _POD_NAMESPACE.is_file():
        return _POD_NAMESPACE.read_text().strip()
    with contextlib.suppress(Exception):  # `_connect` reports what is wrong with the kubeconfig
        contexts, active = config.list_kube_config_contexts()
        for each in contexts:
            if each["name"] == (context or active["name"]):
                namespace: str | None = each["context"].get("namespace")
                return namespace
    return None


def _kubeconfig_error_text(context: str | None, error: Exception) -> str:
    """Return what is wrong with the kubeconfig or with the requested context."""
    from kubernetes import config

    try:
        contexts, _ = config.list_kube_config_contexts()
    except Exception:
        return f"no cluster to talk to: {one_line(error)}; set KUBECONFIG, or log in to a cluster first"
    names = ", ".join(each["name"] for each in contexts) or "none"
    return f"the kubeconfig has no context `{context}`; there are {names}" if context else one_line(error)


def _selectors(labels: str, fields: str) -> Query:
    return [(name, value) for name, value in (("labelSelector", labels), ("fieldSelector", fields)) if value]
