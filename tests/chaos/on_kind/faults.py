"""What can happen to a run on a cluster, and in which phase. Each fault is over when its function returns."""

import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.chart.kind_cluster import eventually
from tests.k8s.acting import LEARN_STEPS, LEARN_STEPS_PER_CHECKPOINT

from .namespace import MINIO, NAMESPACE, STAGES_NODE, ChaosNamespace

STAGE = "sft"  # the stage that is disturbed
# How long the outages of these faults last; nothing waits for an event meanwhile.
_OUTAGE_S = (15, 25)
_LONG_OUTAGE_S = 120
_DRAINED_S = 5
_CUT_EVERY_S = 3.0


@dataclass
class Target:
    """The run that a fault hits. `pods` are the names of the running pods of the roles "stage" and "driver"."""

    namespace: ChaosNamespace
    draw: random.Random
    pods: dict[str, list[str]]
    cut: Callable[[], None]  # breaks every connection between pods and bucket
    is_over: Callable[[], bool]  # whether the run has ended


def _nothing(target: Target) -> None:
    pass


def _delete(*roles: str, grace: tuple[str, ...] = ()) -> Callable[[Target], None]:
    def delete(target: Target) -> None:
        pods = [pod for role in roles for pod in target.pods[role]]
        target.namespace.kubectl("delete", "pod", "--wait=false", "--ignore-not-found", *grace, *pods)

    return delete


def _evict(target: Target) -> None:
    (pod,) = target.pods["stage"]
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": NAMESPACE}}
    path = f"/api/v1/namespaces/{NAMESPACE}/pods/{pod}/eviction"
    target.namespace.kubectl("create", "--raw", path, "--filename", "-", stdin=json.dumps(eviction))


def _drain(target: Target) -> None:
    """Drain the only node, so that driver, stage and MinIO are evicted together, and make it schedulable again.

    If MinIO goes first, the stage retries the upload of its checkpoint until its grace period of 120 s is over.
    """
    node = target.namespace.node
    force = ("--force", "--ignore-daemonsets", "--delete-emptydir-data")
    try:
        target.namespace.kubectl("drain", node, *force, "--timeout=240s")
        time.sleep(_DRAINED_S)
    finally:
        target.namespace.kubectl("uncordon", node)


def _kill_api_server(target: Target) -> None:
    """Kill the API server; the kubelet starts it again."""

    def process_ids() -> str:
        return target.namespace.on_node("sh", "-c", "pgrep kube-apiserver || true").strip()

    before = process_ids()
    target.namespace.on_node("pkill", "-9", "kube-apiserver")
    eventually(lambda: process_ids() not in ("", before), within_s=600)
    _wait_for_api_server(target)


def _stop_api_server(target: Target) -> None:
    """Move the API server's manifest away, upon which the kubelet stops it, and back after two minutes."""
    manifest, aside = "/etc/kubernetes/manifests/kube-apiserver.yaml", "/etc/kubernetes/kube-apiserver.aside"
    target.namespace.on_node("mv", manifest, aside)
    time.sleep(_LONG_OUTAGE_S)
    target.namespace.on_node("mv", aside, manifest)
    _wait_for_api_server(target)


def _wait_for_api_server(target: Target) -> None:
    eventually(lambda: target.namespace.kubectl("get", "--raw", "/readyz", check=False).strip() == "ok", within_s=600)


def _stop_minio(target: Target) -> None:
    _scale_minio_down(target, target.draw.uniform(*_OUTAGE_S))


def _scale_minio_down(target: Target, seconds: float = _LONG_OUTAGE_S) -> None:
    target.namespace.kubectl("scale", f"deployment/{MINIO}", "--replicas=0")
    time.sleep(seconds)
    target.namespace.kubectl("scale", f"deployment/{MINIO}", "--replicas=1")


def _lose_node(target: Target) -> None:
    """Freeze the stage's node, as a power cut would, and let the stages run on the other node."""
    target.namespace.kubectl("label", "node", target.namespace.node, STAGES_NODE)
    target.namespace.engine("pause", target.namespace.worker)
    time.sleep(5)  # the driver writes the run's record every 2 s: what it has read of the stage is in it by then


def _cut_connections(target: Target) -> None:
    while not target.is_over():
        target.cut()
        time.sleep(_CUT_EVERY_S)


FAULTS: dict[str, Callable[[Target], None]] = {
    "nothing": _nothing,
    "delete stage": _delete("stage"),
    "kill stage": _delete("stage", grace=("--grace-period=1",)),
    "evict stage": _evict,
    "delete driver": _delete("driver"),
    "kill driver": _delete("driver", grace=("--grace-period=1",)),
    "delete both": _delete("driver", "stage"),
    "cut connections": _cut_connections,
    "kill API server": _kill_api_server,
    "stop MinIO": _stop_minio,
    "API server down": _stop_api_server,
    "MinIO down": _scale_minio_down,
    "drain node": _drain,
    "lose node": _lose_node,
}
# After these the stage prints lines for a while that no driver reads, and they are lost with its pod.
LOSES_LINES = ("delete both", "drain node", "lose node")
# These hit every run on the cluster, so each of them runs alone.
CLUSTER_WIDE = ("kill API server", "stop MinIO", "API server down", "MinIO down", "drain node", "lose node")

# Phase -> the line of the stage's log with which it begins.
PHASES = {
    "start": "",  # the container runs and has printed nothing
    "download": f"{STAGE}: download artifacts/",
    "step": "progress .* step={step} ",
    "checkpoint": f"{STAGE}: upload checkpoints/",
    "checkpoint manifest": f"{STAGE}: create checkpoints/",
    "after checkpoint": f"{STAGE}: kept a checkpoint",
    "artifact": f"{STAGE}: upload artifacts/",
    "artifact manifest": f"{STAGE}: create artifacts/",
}

CASES = (
    ("nothing", "step"),
    *((fault, phase) for fault in ("delete stage", "kill stage") for phase in PHASES),
    ("evict stage", "step"),
    ("evict stage", "artifact"),
    ("delete driver", "start"),
    ("delete driver", "step"),
    ("kill driver", "step"),
    ("kill driver", "artifact manifest"),
    ("delete both", "step"),
    ("delete both", "artifact"),
    ("cut connections", "start"),
    ("kill API server", "start"),
    ("kill API server", "step"),
    ("kill API server", "artifact manifest"),
    *(("stop MinIO", phase) for phase in ("download", "step", "checkpoint", "artifact", "artifact manifest")),
    ("API server down", "step"),
    ("MinIO down", "step"),
    ("drain node", "step"),
    ("lose node", "step"),
)
# For runs whose stages train, which take minutes each.
TRAINED_CASES = (
    ("nothing", "step"),
    ("delete stage", "start"),
    ("delete stage", "step"),
    ("kill stage", "step"),
    ("evict stage", "step"),
    ("delete both", "step"),
    ("cut connections", "start"),
    ("kill API server", "step"),
    ("API server down", "step"),
    ("MinIO down", "step"),
    ("drain node", "step"),
)


def phase_test(phase: str, draw: random.Random) -> Callable[[list[str]], bool]:
    """Return a function that says whether a running stage that printed these lines has reached `phase`.

    For the phase "step" a step is drawn among those without a checkpoint. Stages that train (`trials.TRAINED_RECIPE`)
    take as many steps with the same checkpoints; of the phases, only "start" and "step" exist for them.
    """
    steps = [step for step in range(2, LEARN_STEPS) if step % LEARN_STEPS_PER_CHECKPOINT]
    wanted = PHASES[phase].format(step=draw.choice(steps))
    return lambda lines: any(re.search(wanted, line) for line in lines) if wanted else True
