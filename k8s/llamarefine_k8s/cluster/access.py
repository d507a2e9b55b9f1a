"""Whether the API server grants what the launcher asks of it: to the person who asks, and to the driver's account."""

from collections.abc import Iterator, Mapping

from llamarefine_jobs.contract.errors import AccessError, LlamaRefineError
from llamarefine_k8s.cluster import KubeObject
from llamarefine_k8s.cluster.api import Cluster
from llamarefine_k8s.cluster.api_errors import grant_advice
from llamarefine_k8s.runs.checks import Check, fail, ok, warning

# What whoever submits, drives, looks at or cancels a run asks for. The chart's Role is the same, by a test.
PERMISSIONS: Mapping[str, tuple[str, ...]] = {
    "jobs.batch": ("create", "get", "list", "watch", "delete"),
    "configmaps": ("create", "get", "list", "patch", "delete"),
    "services": ("create", "get", "list", "patch", "delete"),
    "pods": ("get", "list", "watch", "delete"),
    "pods/status": ("patch",),  # a pod of a node that is gone is declared failed
    "pods/log": ("get",),
    "events": ("list",),
    "serviceaccounts": ("get",),
}


def check_access(cluster: Cluster) -> Iterator[Check]:
    """Who asks, of which cluster; and each verb that the launcher needs."""
    who = whoami(cluster)
    yield ok("cluster", f"{cluster.host} answers{f', to {who}' if who else ''}")
    yield _granted(cluster, "permissions", who or "you", None)


def check_driver(cluster: Cluster, account: str) -> Iterator[Check]:
    """Each verb that the driver needs, where the one who asks may ask for others."""
    user = f"system:serviceaccount:{cluster.namespace}:{account}"
    if whoami(cluster) == user:
        return  # the check before was of the driver itself
    try:
        yield _granted(cluster, "driver's permissions", user, user)
    except AccessError:
        yield warning("driver's permissions", "you may not ask for another's", "`helm test` asks as the driver itself")


def whoami(cluster: Cluster) -> str | None:
    """The name that the API server knows the asker by; None where it does not tell."""
    try:
        review = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
        name: str = (cluster.create(review) or {})["status"]["userInfo"]["username"]
        return name
    except (LlamaRefineError, KeyError):
        return None


def _granted(cluster: Cluster, name: str, who: str, user: str | None) -> Check:
    refused = []
    for what, verbs in PERMISSIONS.items():
        lacking = [verb for verb in verbs if not _is_granted(cluster, verb, what, user)]
        refused += [f"{', '.join(lacking)} {what}"] if lacking else []
    if refused:
        grant = grant_advice(who, cluster.namespace)
        return fail(name, f"{who} may not {'; '.join(refused)} in namespace {cluster.namespace}", grant)
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
