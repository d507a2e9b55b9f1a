"""The Role grants exactly the verbs that the launcher uses on the API server."""

import ast
import re
from collections.abc import Iterator

from llamarefine_k8s.cluster import run_status
from llamarefine_k8s.cluster.access import PERMISSIONS

from .rendering import BUCKET, ROOT, needs_helm, one, render

RESOURCES = {
    "Job": "jobs",
    "ConfigMap": "configmaps",
    "Service": "services",
    "Pod": "pods",
    "Event": "events",
    "ServiceAccount": "serviceaccounts",
}
# Method of `Cluster` -> verb of the API.
VERBS = {"get": "get", "objects": "list", "create": "create", "patch": "patch", "delete": "delete", "watch": "watch"}

# Verbs and kinds of calls that pass the kind in a variable.
INDIRECT = {
    *(("list", kind) for kind in run_status._KINDS),
    *(("delete", kind) for kind in run_status._KINDS),
    *(("watch", kind) for kind in ("Job", "Pod")),  # compared with the source below; a watch lists first
    *(("list", kind) for kind in ("Job", "Pod")),
    *(("create", kind) for kind in ("Job", "ConfigMap", "Service")),  # manifests.py builds no other kind
}


def granted() -> set[tuple[str, str]]:
    """Return every verb and resource that the chart's Role grants."""
    rules = one(render(BUCKET), "Role")["rules"]
    return {(verb, resource) for rule in rules for resource in rule["resources"] for verb in rule["verbs"]}


# These report what they are not permitted to read, so the Role does not grant it.
OPTIONAL_READERS = {"access", "placement", "preflight"}


def sources() -> list[str]:
    """Return the text of each module of the launcher, in whichever folder it is."""
    paths = [path for path in (ROOT / "k8s/llamarefine_k8s").rglob("*.py") if path.stem not in OPTIONAL_READERS]
    return [path.read_text(encoding="utf-8") for path in paths]


def used() -> set[tuple[str, str]]:
    """Return every verb and kind of the calls of `Cluster` that name the kind."""
    text = "\n".join(sources())
    calls = re.findall(r'cluster\.(\w+)\(\s*"([A-Z]\w+)"', text)
    assert len(calls) > 10
    return {(VERBS[call], kind) for call, kind in calls}


@needs_helm
def test_the_role_grants_exactly_what_the_launcher_uses() -> None:
    needed = {(verb, RESOURCES[kind]) for verb, kind in used() | INDIRECT}
    assert granted() == needed | {("get", "pods/log"), ("patch", "pods/status")}


@needs_helm
def test_preflight_checks_every_granted_permission() -> None:
    rules = one(render(BUCKET), "Role")["rules"]
    resources = {
        f"{resource}.{group}" if group else resource: tuple(rule["verbs"])
        for rule in rules
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }
    assert resources == PERMISSIONS


def test_the_launcher_watches_only_jobs_and_pods() -> None:
    """INDIRECT assumes it: a watch is started in a thread, with the kind as an argument."""
    assert {kind for source in sources() for kind in watched_kinds(source)} == {"Job", "Pod"}


def watched_kinds(source: str) -> Iterator[str]:
    """Yield each kind passed to a function named `watch` or `_watch`, directly or through a call that starts it."""
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        functions = [call.func, *call.args, *(keyword.value for keyword in call.keywords)]
        names = {getattr(node, "attr", getattr(node, "id", "")) for node in functions}
        if names & {"watch", "_watch"}:
            constants = (node.value for node in ast.walk(call) if isinstance(node, ast.Constant))
            yield from (value for value in constants if value in RESOURCES)
