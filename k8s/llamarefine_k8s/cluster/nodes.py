"""Which node has room for a pod, and how much memory its GPUs have. Pure: reads objects of the API server.

A simplified scheduler: it checks readiness, taints, the node selector, and requested against free resources. It
ignores affinities, volumes and topology.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from llamarefine_k8s.cluster import KubeObject
from llamarefine_k8s.cluster.api import parse_quantity

# Labels of node pools that autoscalers often enlarge when a pod waits.
_AUTOSCALED_POOL_LABELS = (
    "karpenter.sh/nodepool",
    "cloud.google.com/gke-nodepool",
    "eks.amazonaws.com/nodegroup",
    "kubernetes.azure.com/agentpool",
)
# Labels of Karpenter and EKS Auto Mode: memory of one GPU in MiB.
_MIB_LABELS = ("karpenter.k8s.aws/instance-gpu-memory", "eks.amazonaws.com/instance-gpu-memory")
# GPU memory in GB by GKE's product names that do not contain it: https://cloud.google.com/compute/docs/gpus
_GKE_GB = {
    "nvidia-tesla-p4": 8,
    "nvidia-tesla-p100": 16,
    "nvidia-tesla-v100": 16,
    "nvidia-tesla-t4": 16,
    "nvidia-l4": 24,
    "nvidia-tesla-a100": 40,
    "nvidia-b200": 180,
}


def requests_of(pod: Mapping[str, Any]) -> dict[str, Decimal]:
    """Return the sum of a pod's requests by resource; a limit without a request counts as one. `pod` is its spec."""
    requests = {"pods": Decimal(1)}
    for container in pod.get("containers") or ():
        resources = container.get("resources") or {}
        for name, quantity in ((resources.get("limits") or {}) | (resources.get("requests") or {})).items():
            requests[name] = requests.get(name, Decimal(0)) + parse_quantity(quantity)
    return requests


def free_of(node: KubeObject, pods: Iterable[KubeObject]) -> dict[str, Decimal]:
    """Return a node's free resources: what it can allocate, less the requests of the pods on it."""
    free = {name: parse_quantity(quantity) for name, quantity in (node["status"].get("allocatable") or {}).items()}
    for pod in pods:
        if pod["spec"].get("nodeName") == node["metadata"]["name"] and _has_not_ended(pod):
            for name, quantity in requests_of(pod["spec"]).items():
                free[name] = free.get(name, Decimal(0)) - quantity
    return free


def candidates(pod: Mapping[str, Any], nodes: Sequence[KubeObject]) -> list[KubeObject]:
    """Return the nodes that a pod fits on if no other pod is on them."""
    return [node for node in nodes if not why_not(pod, node)]


def why_not(pod: Mapping[str, Any], node: KubeObject) -> str | None:
    """Return why a pod does not fit on a node even if no other pod is on it; None if it fits."""
    labels = node["metadata"].get("labels") or {}
    missing = [
        f"{name}={value}" for name, value in (pod.get("nodeSelector") or {}).items() if labels.get(name) != value
    ]
    if missing:
        return f"does not have the label {', '.join(missing)}"
    taints = [
        taint for taint in node["spec"].get("taints") or () if not _tolerated(taint, pod.get("tolerations") or ())
    ]
    if taints:
        return f"has the taint {taints[0]['key']}"
    if node["spec"].get("unschedulable"):
        return "accepts no pods (cordoned)"
    if not any(each["type"] == "Ready" and each["status"] == "True" for each in node["status"].get("conditions") or ()):
        return "is not ready"
    return lacks(pod, free_of(node, ()))


def lacks(pod: Mapping[str, Any], free: Mapping[str, Decimal]) -> str | None:
    """Return which requests of a pod exceed the `free` resources; None if the pod fits."""
    shortages = []
    for name, requested in requests_of(pod).items():
        left = max(free.get(name, Decimal(0)), Decimal(0))
        if requested > left:
            shortages.append(f"{_text(name, left)} {name}, not {_text(name, requested)}")
    return f"has {'; '.join(shortages)}" if shortages else None


def over_quota(pod: Mapping[str, Any], quota: KubeObject) -> str | None:
    """Return which requests of a pod exceed what a ResourceQuota has left; None if it fits. Ignores scopes."""
    hard, used = ((quota.get("status") or {}).get(part) or {} for part in ("hard", "used"))
    requests = requests_of(pod)
    shortages = []
    for name, limit in hard.items():
        left = parse_quantity(limit) - parse_quantity(used.get(name, "0"))
        requested = requests.get(name.removeprefix("requests."), Decimal(0))
        if requested > left and not name.startswith("limits."):
            shortages.append(f"has {_text(name, left)} of {name} left, the pod requests {_text(name, requested)}")
    return "; ".join(shortages) or None


def may_grow(nodes: Iterable[KubeObject]) -> bool:
    """Whether some node belongs to a pool that an autoscaler may enlarge."""
    return any(label in (node["metadata"].get("labels") or {}) for node in nodes for label in _AUTOSCALED_POOL_LABELS)


def card_bytes(node: KubeObject, gpu_resource: str) -> int | None:
    """Return the memory of one GPU of a node, from its labels or the resource's name; None if neither contains it."""
    labels = node["metadata"].get("labels") or {}
    # The first label is GPU feature discovery's; it covers MIG slices too.
    for label in (f"{gpu_resource}.memory", *_MIB_LABELS):
        if str(labels.get(label, "")).isdecimal():
            return int(labels[label]) << 20
    product = labels.get("cloud.google.com/gke-accelerator", "")
    for name in (gpu_resource, product):  # nvidia.com/mig-3g.71gb, nvidia-h100-80gb
        if found := re.search(r"(\d+)gb\b", name):
            return int(found[1]) * 10**9
    return _GKE_GB[product] * 10**9 if product in _GKE_GB else None


def on_node(image: str, nodes: Iterable[KubeObject]) -> Iterator[str]:
    """Yield the names of the nodes that list an image as present. A node lists only its fifty largest images."""
    for node in nodes:
        names = {name for each in node["status"].get("images") or () for name in each.get("names") or ()}
        if names & {image, f"docker.io/{image}", f"docker.io/library/{image}"}:
            yield node["metadata"]["name"]


def _has_not_ended(pod: KubeObject) -> bool:
    return pod["status"].get("phase") not in ("Succeeded", "Failed")


def _tolerated(taint: KubeObject, tolerations: Iterable[KubeObject]) -> bool:
    if taint.get("effect") == "PreferNoSchedule":
        return True
    return any(
        toleration.get("effect") in (None, "", taint.get("effect"))
        and toleration.get("key") in (None, "", taint["key"])
        and (toleration.get("operator") == "Exists" or toleration.get("value", "") == taint.get("value", ""))
        for toleration in tolerations
    )


def _text(name: str, quantity: Decimal) -> str:
    if name.removeprefix("requests.") in ("memory", "ephemeral-storage"):
        return f"{quantity / 2**30:.1f}Gi"
    return f"{quantity.normalize():f}"
