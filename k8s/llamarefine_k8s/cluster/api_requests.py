"""Requests to the API server: credentials renewed, errors translated, outages retried."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar
from urllib.parse import urlencode

from llamarefine_jobs.contract.errors import AccessError, StoreError
from llamarefine_jobs.contract.retry import RetryPolicy
from llamarefine_k8s.cluster import KubeObject
from llamarefine_k8s.cluster.api_errors import (
    ForbiddenError,
    RefusedError,
    UnauthenticatedError,
    error_from_response,
    network_cause,
)

Query = Sequence[tuple[str, Any]]
Result = TypeVar("Result")

_CONNECT_S, _READ_S = 5, 30
_STARTING_S = 30.0  # how long a starting API server may refuse users whom it accepted before
_STARTING_PAUSE_S = 1.0
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


class ApiRequests:
    """Sends requests about one namespace to one API server. Threads may share it.

    `connect` returns a Kubernetes client with freshly read credentials. `retry_policy` may be replaced at any time.
    """

    def __init__(self, connect: Callable[[], Any], namespace: str, retry_policy: RetryPolicy) -> None:
        self.namespace = namespace
        self.retry_policy = retry_policy
        self._connect = connect
        self._client = connect()
        self._allowed: set[str] = set()  # the kinds of requests that the server has granted before

    @property
    def host(self) -> str:
        """The API server's address."""
        return str(self._client.configuration.host)

    def path(self, kind: str, name: str = "") -> str:
        """Return the URL path of a kind, or of one object of that kind."""
        return _PATHS[kind].format(namespace=self.namespace) + (f"/{name}" if name else "")

    def send(
        self,
        method: str,
        kind: str,
        name: str = "",
        body: KubeObject | None = None,
        *,
        query: Query = (),
        missing_ok: bool = False,
        existing_ok: bool = False,
    ) -> KubeObject | None:
        """Send a request, retry it through an outage, and return the response's object.

        Returns None for a 404 with `missing_ok` and for a 409 with `existing_ok`. Raises the LlamaRefineError of
        any other refusal at once, and StoreError for an outage that outlasts the retry policy.
        """
        expected = [status for status, is_ok in ((404, missing_ok), (409, existing_ok)) if is_ok]

        def send_once() -> KubeObject | None:
            with self.translated_errors():
                try:
                    found: KubeObject = json.loads(self.call(method, self.path(kind, name), body, query).data)
                except RefusedError as refused:
                    if refused.status not in expected:
                        raise
                    return None
                return found

        return self.retried(send_once, f"{method} {kind}")

    def list_objects(self, kind: str, query: Query) -> tuple[list[KubeObject], str]:
        """Return the selected objects of a kind and the resource version of the list."""
        found = self.send("GET", kind, query=query) or {}
        return found["items"], found["metadata"]["resourceVersion"]

    def open_stream(self, path: str, query: Query, silence_s: float) -> Any:
        """Return a response that arrives piece by piece; it breaks off after `silence_s` without a byte."""
        with self.translated_errors():
            return self.call("GET", path, query=query, read_timeout_s=silence_s)

    def retried(self, request: Callable[[], Result], request_kind: str) -> Result:
        """Return the result of `request`, retried through an outage; a refusal is treated as by `granted`."""
        return self.granted(lambda: self.retry_policy.call(request), request_kind)

    def granted(self, request: Callable[[], Result], request_kind: str) -> Result:
        """Return the result of `request`, which is not retried through an outage.

        A refusal is retried, for a short time, if the server granted the same `request_kind` before: a starting API
        server refuses users whom it accepted a moment ago.
        """
        refused_until_s: float | None = None
        while True:
            try:
                result = request()
            except AccessError as error:
                now_s = time.monotonic()
                refused_until_s = refused_until_s or now_s + min(_STARTING_S, self.retry_policy.limit_s)
                if not self._contradicts_earlier_answer(error, request_kind) or now_s > refused_until_s:
                    raise
                time.sleep(_STARTING_PAUSE_S)
            else:
                self._allowed.add(request_kind)
                return result

    def _contradicts_earlier_answer(self, error: AccessError, request_kind: str) -> bool:
        if isinstance(error, UnauthenticatedError):
            return bool(self._allowed)
        return isinstance(error, ForbiddenError) and request_kind in self._allowed

    def call(
        self,
        method: str,
        path: str,
        body: KubeObject | None = None,
        query: Query = (),
        read_timeout_s: float = _READ_S,
    ) -> Any:
        """Send one HTTP request and return its response, whose body is still unread.

        After a 401 the credentials are read again and the request is sent once more. Raises StoreError for a 429 or
        a 5xx, RefusedError for any other error status.
        """
        from urllib3 import Timeout

        for is_renewed in (False, True):
            token = self._client.configuration.auth_settings().get("BearerToken", {}).get("value")
            patch_type = "application/merge-patch+json"
            response = self._client.rest_client.pool_manager.request(
                method,
                f"{self.host}{path}?{urlencode(query)}".rstrip("?"),
                body=None if body is None else json.dumps(body),
                headers={
                    "Accept": "application/json",
                    "Content-Type": patch_type if method == "PATCH" else "application/json",
                    **({"Authorization": token} if token else {}),
                },
                timeout=Timeout(connect=_CONNECT_S, read=read_timeout_s),
                retries=False,
                preload_content=False,
            )
            if response.status < 400:
                return response
            refused = RefusedError(response.status, response.data)
            if refused.status != 401 or is_renewed:
                break
            self._client = self._connect()
        if refused.status == 429 or refused.status >= 500:
            failed = StoreError(f"the API server answered {refused.status}: {refused}")
            retry_after = response.headers.get("Retry-After", "")
            failed.retry_after_s = float(retry_after) if retry_after.isdecimal() else 0.0
            raise failed
        raise refused

    @contextlib.contextmanager
    def translated_errors(self) -> Iterator[None]:
        """Translate network errors to StoreError and refusals to their LlamaRefineError."""
        from urllib3.exceptions import HTTPError

        try:
            yield
        except RefusedError as refused:
            raise error_from_response(refused, self.namespace) from None
        except json.JSONDecodeError:
            raise StoreError("the API server's answer broke off") from None
        except (HTTPError, OSError) as error:
            raise StoreError(
                f"the API server at {self.host} cannot be reached: {network_cause(error)}; "
                "is the cluster up, and the kubeconfig's context the right one?"
            ) from None


def response_lines(response: Any) -> Iterator[bytes]:
    """Yield the lines of a response as they arrive, each with its newline, until the connection ends or breaks.

    The last line lacks its newline if it broke off.
    """
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
    if pending:  # no newline, or the first part of a line: the end of a broken connection may look clean
        yield pending
