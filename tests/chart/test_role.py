"""The Role grants what the launcher asks of the API server, no verb more and none less."""

import re

from llamarefine_k8s.cluster import job_feed, run_status
from llamarefine_k8s.cluster.access import PERMISSIONS

from .rendering import BUCKET, ROOT, needs_helm, one, render

pytestmark = needs_helm

RESOURCES = {
    "Job": "jobs",
    "ConfigMap": "configmaps",
    "Service": "services",
    "Pod": "pods",
    "Event": "events",
    "ServiceAccount": "serviceaccounts",
}
VERBS = {"get": "get", "objects": "list", "create": "create", "patch": "patch", "delete": "delete", "watch": "watch"}

# Calls whose kind is a variable: what it ranges over.
INDIRECT = {
    *(("list", kind) for kind in run_status._KINDS),
    *(("delete", kind) for kind in run_status._KINDS),
    *(("watch", kind) for kind in ("Job", "Pod")),  # job_feed.JobFeed follows both, and lists before it watches
    *(("list", kind) for kind in ("Job", "Pod")),
    *(("create", kind) for kind in ("Job", "ConfigMap", "Service")),  # manifests.py makes no other kind
}


def granted() -> set[tuple[str, str]]:
    rules = one(render(BUCKET), "Role")["rules"]
    return {(verb, resource) for rule in rules for resource in rule["resources"] for verb in rule["verbs"]}


LOOKS = {"access", "placement", "preflight"}  # what these may not look at, they say; so it is not granted for them


def asked() -> set[tuple[str, str]]:
    """Every verb and kind that a call of `Cluster` names in the launcher's source."""
    paths = [path for path in (ROOT / "k8s/llamarefine_k8s").rglob("*.py") if path.stem not in LOOKS]
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    calls = re.findall(r'cluster\.(\w+)\(\s*"([A-Z]\w+)"', text)
    assert len(calls) > 10
    return {(VERBS[call], kind) for call, kind in calls}


def test_the_role_is_what_is_asked() -> None:
    needed = {(verb, RESOURCES[kind]) for verb, kind in asked() | INDIRECT}
    assert granted() == needed | {("get", "pods/log"), ("patch", "pods/status")}


def test_preflight_asks_about_all_that_is_granted() -> None:
    rules = one(render(BUCKET), "Role")["rules"]
    resources = {
        f"{resource}.{group}" if group else resource: tuple(rule["verbs"])
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    assert resources == PERMISSIONS


def test_what_is_watched_is_as_assumed() -> None:
    source = (ROOT / "k8s/llamarefine_k8s/cluster/job_feed.py").read_text(encoding="utf-8")
    assert job_feed.JobFeed
    assert set(re.findall(r'"(Job|Pod|ConfigMap|Event)"', source)) == {"Job", "Pod"}
