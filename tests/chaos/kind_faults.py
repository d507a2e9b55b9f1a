"""What can happen to a run on a cluster, and when. Each fault is over when its function returns."""

import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.k8s.acting import LESSONS, LESSONS_A_CHECKPOINT

from .kind_world import MINIO, NAMESPACE, STAGES_NODE, World

STAGE = "sft"  # the one that is disturbed
_OUTAGE_S = (15, 25)
_LONG_OUTAGE_S = 120
_CUT_EVERY_S = 3.0


@dataclass
class Scene:
    """A run at the moment of its fault: `pods` is the stage's and the driver's, by role."""

    world: World
    draw: random.Random
    pods: dict[str, list[str]]
    cut: Callable[[], None]  # breaks every connection between pods and bucket
    is_over: Callable[[], bool]


def _nothing(scene: Scene) -> None:
    pass


def _delete(*roles: str, grace: tuple[str, ...] = ()) -> Callable[[Scene], None]:
    def delete(scene: Scene) -> None:
        pods = [pod for role in roles for pod in scene.pods[role]]
        scene.world.kubectl("delete", "pod", "--wait=false", "--ignore-not-found", *grace, *pods)

    return delete


def _evict(scene: Scene) -> None:
    (pod,) = scene.pods["stage"]
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": pod, "namespace": NAMESPACE}}
    path = f"/api/v1/namespaces/{NAMESPACE}/pods/{pod}/eviction"
    scene.world.kubectl("create", "--raw", path, "--filename", "-", stdin=json.dumps(eviction))


def _drain(scene: Scene) -> None:
    """The only node: driver, stage and MinIO go together, and wait until it is back.

    Where MinIO goes first, a stage waits for it with its checkpoint until its grace period of 120 s is over.
    """
    node = scene.world.node
    force = ("--force", "--ignore-daemonsets", "--delete-emptydir-data")
    try:
        scene.world.kubectl("drain", node, *force, "--timeout=240s")
        time.sleep(5)
    finally:
        scene.world.kubectl("uncordon", node)


def _kill_api_server(scene: Scene) -> None:
    """The kubelet starts it again."""
    scene.world.on_node("pkill", "-9", "kube-apiserver")
    time.sleep(1)
    while scene.world.kubectl("get", "--raw", "/readyz", check=False).strip() != "ok":
        time.sleep(0.5)


def _api_server_away(scene: Scene) -> None:
    """The kubelet stops it when its manifest is gone, and starts it when that is back."""
    manifest, aside = "/etc/kubernetes/manifests/kube-apiserver.yaml", "/etc/kubernetes/kube-apiserver.aside"
    scene.world.on_node("mv", manifest, aside)
    time.sleep(_LONG_OUTAGE_S)
    scene.world.on_node("mv", aside, manifest)
    while scene.world.kubectl("get", "--raw", "/readyz", check=False).strip() != "ok":
        time.sleep(0.5)


def _stop_minio(scene: Scene) -> None:
    _minio_away(scene, scene.draw.uniform(*_OUTAGE_S))


def _minio_away(scene: Scene, seconds: float = _LONG_OUTAGE_S) -> None:
    scene.world.kubectl("scale", f"deployment/{MINIO}", "--replicas=0")
    time.sleep(seconds)
    scene.world.kubectl("scale", f"deployment/{MINIO}", "--replicas=1")


def _lose_node(scene: Scene) -> None:
    """The stage's node says nothing from one moment to the next, as where its power is cut; the other one is left."""
    scene.world.kubectl("label", "node", scene.world.node, STAGES_NODE)
    scene.world.engine("pause", scene.world.worker)
    time.sleep(5)  # what was heard of it comes into the run's record


def _cut_connections(scene: Scene) -> None:
    while not scene.is_over():
        scene.cut()
        time.sleep(_CUT_EVERY_S)


FAULTS: dict[str, Callable[[Scene], None]] = {
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
    "API server away": _api_server_away,
    "MinIO away": _minio_away,
    "drain node": _drain,
    "lose node": _lose_node,
}
UNHEARD = ("delete both", "drain node", "lose node")  # the stage speaks on for a while, and nobody hears it
# Every run of the cluster meets these.
SHARED = ("kill API server", "stop MinIO", "API server away", "MinIO away", "drain node", "lose node")

PHASES = {
    "start": "",  # its container runs and has said nothing
    "download": f"{STAGE}: download artifacts/",
    "step": "progress .* step={step} ",
    "checkpoint": f"{STAGE}: upload checkpoints/",
    "its manifest": f"{STAGE}: create checkpoints/",
    "after it": f"{STAGE}: kept a checkpoint",
    "upload": f"{STAGE}: upload artifacts/",
    "manifest": f"{STAGE}: create artifacts/",
}

CASES = (
    ("nothing", "step"),
    *((fault, phase) for fault in ("delete stage", "kill stage") for phase in PHASES),
    ("evict stage", "step"),
    ("evict stage", "upload"),
    ("delete driver", "start"),
    ("delete driver", "step"),
    ("kill driver", "step"),
    ("kill driver", "manifest"),
    ("delete both", "step"),
    ("delete both", "upload"),
    ("cut connections", "start"),
    ("kill API server", "start"),
    ("kill API server", "step"),
    ("kill API server", "manifest"),
    *(("stop MinIO", phase) for phase in ("download", "step", "checkpoint", "upload", "manifest")),
    ("API server away", "step"),
    ("MinIO away", "step"),
    ("drain node", "step"),
    ("lose node", "step"),
)
# Of runs whose stages train: minutes each.
TRAINED_CASES = (
    ("nothing", "step"),
    ("delete stage", "start"),
    ("delete stage", "step"),
    ("kill stage", "step"),
    ("evict stage", "step"),
    ("delete both", "step"),
    ("cut connections", "start"),
    ("kill API server", "step"),
    ("API server away", "step"),
    ("MinIO away", "step"),
    ("drain node", "step"),
)


def moment(phase: str, draw: random.Random) -> Callable[[list[str]], bool]:
    """Whether a stage that runs and said these lines is in `phase`; a step is drawn, none that ends in a checkpoint.

    Stages that train (`kind_trials.TRAINED`) have as many steps and checkpoints; of the phases only start and step.
    """
    steps = [step for step in range(2, LESSONS) if step % LESSONS_A_CHECKPOINT]
    wanted = PHASES[phase].format(step=draw.choice(steps))
    return lambda lines: any(re.search(wanted, line) for line in lines) if wanted else True
