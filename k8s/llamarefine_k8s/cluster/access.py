"""Checks whether the user and the driver's service account have the permissions that the launcher needs."""

from collections.abc import Iterator, Mapping

from llamarefine_jobs.contract.errors import AccessError, LlamaRefineError
from llamarefine_k8s.cluster import KubeObject
from llamarefine_k8s.cluster.api import Cluster
from llamarefine_k8s.cluster.api_errors import grant_advice
from llamarefine_k8s.runs.checks import Check, fail, ok, warning

# Needed to submit, drive, inspect or cancel a run. A test compares it with the chart's Role.
PERMISSIONS: Mapping[str, tuple[str, ...]] = {
    "jobs.batch": ("create", "get", "list", "watch", "delete"),
    "configmaps": ("create", "get", "list", "patch", "delete"),
    "services": ("create", "get", "list", "patch", "delete"),
    "pods": ("get", "list", "watch", "delete"),
    "pods/status": ("patch",),  # a pod of a lost node is marked as failed
    "pods/log": ("get",),
    "events": ("list",),
    "serviceaccounts": ("get",),
}


def check_access(cluster: Cluster) -> Iterator[Check]:
    """Check that the cluster answers and that the user has every permission that the launcher needs."""
    user = current_user(cluster)
    yield ok("cluster", f"{cluster.host} answers{f', to {user}' if user else ''}")
    yield _check_permissions(cluster, "permissions", user or "you", None)


def check_driver(cluster: Cluster, account: str) -> Iterator[Check]:
    """Check that the driver's service account has every permission, if the user may check another user's."""
    user = f"system:serviceaccount:{cluster.namespace}:{account}"
    if current_user(cluster) == user:
        return  # `check_access` checked the driver itself
    try:
        yield _check_permissions(cluster, "driver's permissions", user, user)
    except AccessError:
        text = "not checked: you may not check the permissions of another user"
        yield warning("driver's permissions", text, "`helm test` checks them as the driver itself")


def current_user(cluster: Cluster) -> str | None:
    """Return the user's name from the API server; None if the server does not return one."""
    try:
        review = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
        name: str = (cluster.create(review) or {})["status"]["userInfo"]["username"]
        return name
    except (LlamaRefineError, KeyError):
        return None


def _check_permissions(cluster: Cluster, name: str, subject: str, user: str | None) -> Check:
    """Return the check `name` over all PERMISSIONS of `user`, or of the current user if it is None."""
    refused = []
    for what, verbs in PERMISSIONS.items():
        lacking = [verb for verb in verbs if not _is_granted(cluster, verb, what, user)]
        refused += [f"{', '.join(lacking)} {what}"] if lacking else []
    if refused:
        grant = grant_advice(subject, cluster.namespace)
        return fail(name, f"{subject} may not {'; '.join(refused)} in namespace {cluster.namespace}", grant)
    return ok(name, f"all {sum(map(len, PERMISSIONS.values()))} are granted in namespace {cluster.namespace}")


def _is_granted(cluster: Cluster, verb: str, what: str, user: str | None) -> bool:
    resource, _, group = what.partition(".")
    resource, _, part = resource.partition("/")
    attributes = {"namespace": cluster.namespace, "verb": verb, "group": group, "resource": resource}
    attributes["subresource"] = part
    review: KubeObject = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview"}
    spec: KubeObject = {"resourceAttributes": attributes}
    if user:
        groups = ["system:serviceaccounts", f"system:serviceaccounts:{cluster.namespace}", "system:authenticated"]
        review |= {"kind": "LocalSubjectAccessReview", "metadata": {"namespace": cluster.namespace}}
        spec |= {"user": user, "groups": groups}
    answer = cluster.create(review | {"spec": spec}) or {}
    return bool(answer.get("status", {}).get("allowed"))
