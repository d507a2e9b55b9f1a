"""What can happen to a run on a cluster, and when. Each fault is over when its function returns."""

import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.k8s.acting import LESSONS, LESSONS_A_CHECKPOINT

from .kind_world import MINIO, NAMESPACE, World

STAGE = "sft"  # the one that is disturbed
_OUTAGE_S = (15, 25)
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
    """The only node: driver, stage and MinIO go together, and wait until it is back."""
    node = scene.world.node
    force = ("--force", "--ignore-daemonsets", "--delete-emptydir-data")
    try:
        scene.world.kubectl("drain", node, *force, "--timeout=120s")
        time.sleep(5)
    finally:
        scene.world.kubectl("uncordon", node)


def _kill_api_server(scene: Scene) -> None:
    """The kubelet starts it again."""
    scene.world.on_node("pkill", "-9", "kube-apiserver")
    time.sleep(1)
    while scene.world.kubectl("get", "--raw", "/readyz", check=False).strip() != "ok":
        time.sleep(0.5)


def _stop_minio(scene: Scene) -> None:
    scene.world.kubectl("scale", f"deployment/{MINIO}", "--replicas=0")
    time.sleep(scene.draw.uniform(*_OUTAGE_S))
    scene.world.kubectl("scale", f"deployment/{MINIO}", "--replicas=1")


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
    "drain node": _drain,
}
UNHEARD = ("delete both", "drain node")  # the stage speaks on for a while, and no driver runs
SHARED = ("kill API server", "stop MinIO", "drain node")  # every run of the cluster meets them

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
    ("drain node", "step"),
)


def moment(phase: str, draw: random.Random) -> Callable[[list[str]], bool]:
    """Whether a stage that runs and said these lines is in `phase`; a step is drawn, none that ends in a checkpoint."""
    steps = [step for step in range(2, LESSONS) if step % LESSONS_A_CHECKPOINT]
    wanted = PHASES[phase].format(step=draw.choice(steps))
    return lambda lines: any(re.search(wanted, line) for line in lines) if wanted else True
