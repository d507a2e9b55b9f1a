"""Which node a pod fits on and how much memory its GPUs have, from nodes, pods and quotas of the API server."""

from decimal import Decimal
from typing import Any

import pytest

from llamarefine_k8s.cluster import nodes

Object = dict[str, Any]
GPU = "nvidia.com/gpu"


def node(name: str = "one", *, taints: tuple[Object, ...] = (), ready: str = "True", **labels: str) -> Object:
    status = {
        "allocatable": {"cpu": "3920m", "memory": "16Gi", GPU: "2", "pods": "110"},
        "conditions": [{"type": "Ready", "status": ready}],
        "images": [{"names": ["registry.example.com/llamarefine-sft:1", "docker.io/library/mine:1"]}],
    }
    spec = {"taints": list(taints)} if taints else {}
    return {"metadata": {"name": name, "labels": dict(labels)}, "spec": spec, "status": status}


def pod(
    requests: dict[str, str],
    limits: dict[str, str] | None = None,
    *,
    node_name: str = "",
    phase: str = "Running",
    **more: Any,
) -> Object:
    resources = {"requests": requests, "limits": limits or {}}
    spec = {"containers": [{"resources": resources}], "nodeName": node_name, **more}
    return {"spec": spec, "status": {"phase": phase}}


def test_free_resources_are_the_allocatable_ones_less_the_pods_requests() -> None:
    pods = [
        pod({"cpu": "1", "memory": "4Gi"}, {GPU: "1"}, node_name="one"),
        pod({"cpu": "500m"}, node_name="one", phase="Pending"),
        pod({"cpu": "2"}, node_name="one", phase="Succeeded"),
        pod({"cpu": "2"}, node_name="two"),
    ]
    free = nodes.free_of(node(), pods)
    assert (free["cpu"], free["memory"], free[GPU]) == (Decimal("2.42"), 12 * 2**30, 1)
    assert nodes.lacks(pod({"cpu": "2420m", "memory": "12Gi"}, {GPU: "1"})["spec"], free) is None
    assert nodes.lacks(pod({}, {GPU: "2"})["spec"], free) == f"has 1 {GPU}, not 2"
    assert nodes.lacks(pod({"memory": "13Gi"})["spec"], free) == "has 12.0Gi memory, not 13.0Gi"


def test_a_limit_without_a_request_counts_as_a_request() -> None:
    requests = nodes.requests_of(pod({"cpu": "1"}, {"cpu": "4", "memory": "1Gi"})["spec"])
    assert (requests["cpu"], requests["memory"]) == (1, 2**30)


@pytest.mark.parametrize(
    ("candidate", "pod_spec", "why"),
    [
        (node(), {}, None),
        (node(ready="False"), {}, "is not ready"),
        (node() | {"spec": {"unschedulable": True}}, {}, "cordoned"),
        (node(gpu="a100"), {"nodeSelector": {"gpu": "h200"}}, "does not have the label gpu=h200"),
        (node(gpu="h200"), {"nodeSelector": {"gpu": "h200"}}, None),
    ],
)
def test_why_a_pod_does_not_fit_on_a_node(candidate: Object, pod_spec: Object, why: str | None) -> None:
    found = nodes.why_not(pod({}, **pod_spec)["spec"], candidate)
    assert found == why or (why and found and why in found)


@pytest.mark.parametrize(
    ("toleration", "is_tolerated"),
    [
        ({"key": GPU, "operator": "Exists"}, True),
        ({"key": GPU, "operator": "Exists", "effect": "NoSchedule"}, True),
        ({"key": GPU, "operator": "Exists", "effect": "NoExecute"}, False),
        ({"key": GPU, "value": "present"}, True),
        ({"key": GPU, "operator": "Equal", "value": "other"}, False),
        ({"operator": "Exists"}, True),
        ({"key": "other", "operator": "Exists"}, False),
    ],
)
def test_tolerations_match_taints_as_in_kubernetes(toleration: Object, is_tolerated: bool) -> None:
    tainted = node(taints=({"key": GPU, "value": "present", "effect": "NoSchedule"},))
    assert (nodes.why_not(pod({}, tolerations=[toleration])["spec"], tainted) is None) is is_tolerated


def test_a_taint_that_prefers_no_schedule_keeps_no_pod_away() -> None:
    assert nodes.why_not(pod({})["spec"], node(taints=({"key": "x", "effect": "PreferNoSchedule"},))) is None


@pytest.mark.parametrize(
    ("resource", "labels", "size_bytes"),
    [
        (GPU, {"nvidia.com/gpu.memory": "143771"}, 143771 << 20),
        (
            "nvidia.com/mig-1g.18gb",
            {"nvidia.com/gpu.memory": "143771", "nvidia.com/mig-1g.18gb.memory": "16384"},
            2**34,
        ),
        ("nvidia.com/mig-3g.71gb", {}, 71 * 10**9),
        (GPU, {"karpenter.k8s.aws/instance-gpu-memory": "24576"}, 24 * 2**30),
        (GPU, {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}, 80 * 10**9),
        (GPU, {"cloud.google.com/gke-accelerator": "nvidia-l4"}, 24 * 10**9),
        (GPU, {"cloud.google.com/gke-accelerator": "nvidia-of-tomorrow"}, None),
        (GPU, {"nvidia.com/gpu.memory": "much"}, None),
        (GPU, {}, None),
    ],
)
def test_the_memory_of_a_gpu_is_read_from_node_labels_or_the_resource_name(
    resource: str, labels: dict[str, str], size_bytes: int | None
) -> None:
    assert nodes.card_bytes(node(**labels), resource) == size_bytes


def test_a_pod_is_compared_with_what_a_quota_has_left() -> None:
    status = {
        "hard": {"requests.memory": "10Gi", f"requests.{GPU}": "1", "pods": "9"},
        "used": {"requests.memory": "7Gi"},
    }
    quota = {"status": status}
    assert nodes.over_quota(pod({"memory": "3Gi"}, {GPU: "1"})["spec"], quota) is None
    assert nodes.over_quota(pod({"memory": "4Gi"})["spec"], quota) == (
        "has 3.0Gi of requests.memory left, the pod requests 4.0Gi"
    )
    assert GPU in (nodes.over_quota(pod({}, {GPU: "2"})["spec"], quota) or "")


def test_an_image_is_found_under_each_name_that_a_node_lists() -> None:
    assert list(nodes.on_node("registry.example.com/llamarefine-sft:1", [node()])) == ["one"]
    assert list(nodes.on_node("mine:1", [node()])) == ["one"]
    assert list(nodes.on_node("mine:2", [node()])) == []
