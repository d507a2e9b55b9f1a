"""Which node has room for a pod, and how much memory its GPUs have. Pure: reads what the API server said.

A simple scheduler: readiness, taints, the node selector, what is asked against what is free. Affinities, volumes and
topology are the real one's business.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from llamarefine_k8s.cluster import KubeObject
from llamarefine_k8s.cluster.api import parse_quantity

# Labels of node pools that often grow by themselves when a pod waits.
_GROWING = (
    "karpenter.sh/nodepool",
    "cloud.google.com/gke-nodepool",
    "eks.amazonaws.com/nodegroup",
    "kubernetes.azure.com/agentpool",
)
# MiB of one GPU: Karpenter's and EKS Auto Mode's own labels.
_MIB_LABELS = ("karpenter.k8s.aws/instance-gpu-memory", "eks.amazonaws.com/instance-gpu-memory")
# GB by GKE's names that do not say it themselves: https://cloud.google.com/compute/docs/gpus
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
    """What a pod asks for in all, in its own units; a limit without a request is one. `pod` is a pod's spec."""
    asked = {"pods": Decimal(1)}
    for container in pod.get("containers") or ():
        resources = container.get("resources") or {}
        for name, much in ((resources.get("limits") or {}) | (resources.get("requests") or {})).items():
            asked[name] = asked.get(name, Decimal(0)) + parse_quantity(much)
    return asked


def free_of(node: KubeObject, pods: Iterable[KubeObject]) -> dict[str, Decimal]:
    """What a node has left beside the pods that are on it."""
    free = {name: parse_quantity(much) for name, much in (node["status"].get("allocatable") or {}).items()}
    for pod in pods:
        if pod["spec"].get("nodeName") == node["metadata"]["name"] and _holds(pod):
            for name, much in requests_of(pod["spec"]).items():
                free[name] = free.get(name, Decimal(0)) - much
    return free


def candidates(pod: Mapping[str, Any], nodes: Sequence[KubeObject]) -> list[KubeObject]:
    """The nodes that a pod may be put on, whatever is on them now."""
    return [node for node in nodes if not why_not(pod, node)]


def why_not(pod: Mapping[str, Any], node: KubeObject) -> str | None:
    """What keeps a pod from an empty node; None where nothing does."""
    labels = node["metadata"].get("labels") or {}
    wrong = [f"{name}={value}" for name, value in (pod.get("nodeSelector") or {}).items() if labels.get(name) != value]
    if wrong:
        return f"has not the label {', '.join(wrong)}"
    taints = [
        taint for taint in node["spec"].get("taints") or () if not _tolerated(taint, pod.get("tolerations") or ())
    ]
    if taints:
        return f"has the taint {taints[0]['key']}"
    if node["spec"].get("unschedulable"):
        return "takes no pods (cordoned)"
    if not any(each["type"] == "Ready" and each["status"] == "True" for each in node["status"].get("conditions") or ()):
        return "is not ready"
    return lacks(pod, free_of(node, ()))


def lacks(pod: Mapping[str, Any], free: Mapping[str, Decimal]) -> str | None:
    """What a pod asks for and `free` has not; None where it fits."""
    short = []
    for name, much in requests_of(pod).items():
        left = max(free.get(name, Decimal(0)), Decimal(0))
        if much > left:
            short.append(f"{_shown(name, left)} {name}, not {_shown(name, much)}")
    return f"has {'; '.join(short)}" if short else None


def over_quota(pod: Mapping[str, Any], quota: KubeObject) -> str | None:
    """What a pod asks for beyond what a ResourceQuota has left; None where it fits. Scopes are not looked at."""
    hard, used = ((quota.get("status") or {}).get(part) or {} for part in ("hard", "used"))
    asked = requests_of(pod)
    short = []
    for name, much in hard.items():
        left = parse_quantity(much) - parse_quantity(used.get(name, "0"))
        wanted = asked.get(name.removeprefix("requests."), Decimal(0))
        if wanted > left and not name.startswith("limits."):
            short.append(f"has {_shown(name, left)} of {name} left, asked for is {_shown(name, wanted)}")
    return "; ".join(short) or None


def may_grow(nodes: Iterable[KubeObject]) -> bool:
    """Whether some node is of a pool that may grow by itself."""
    return any(label in (node["metadata"].get("labels") or {}) for node in nodes for label in _GROWING)


def card_bytes(node: KubeObject, gpu_resource: str) -> int | None:
    """The memory of one GPU of a node, as its labels or the resource's name say; None where they do not."""
    labels = node["metadata"].get("labels") or {}
    for label in (f"{gpu_resource}.memory", *_MIB_LABELS):  # the first is GPU feature discovery's, slices included
        if str(labels.get(label, "")).isdecimal():
            return int(labels[label]) << 20
    product = labels.get("cloud.google.com/gke-accelerator", "")
    for name in (gpu_resource, product):  # nvidia.com/mig-3g.71gb, nvidia-h100-80gb
        if found := re.search(r"(\d+)gb\b", name):
            return int(found[1]) * 10**9
    return _GKE_GB[product] * 10**9 if product in _GKE_GB else None


def on_node(image: str, nodes: Iterable[KubeObject]) -> Iterator[str]:
    """The names of the nodes that say they have an image. A node says it of its fifty largest."""
    for node in nodes:
        names = {name for each in node["status"].get("images") or () for name in each.get("names") or ()}
        if names & {image, f"docker.io/{image}", f"docker.io/library/{image}"}:
            yield node["metadata"]["name"]


def _holds(pod: KubeObject) -> bool:
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


def _shown(name: str, much: Decimal) -> str:
    if name.removeprefix("requests.") in ("memory", "ephemeral-storage"):
        return f"{much / 2**30:.1f}Gi"
    return f"{much.normalize():f}"
