"""Create, adopt and update the objects of a run: its ConfigMap, and the Job and Service of each stage.

Each object has an owner, so that Kubernetes deletes it with its owner. A Job that already works on the same task is
followed instead of created again, so a driver may die at any moment.
"""

import os
import time
from collections.abc import Callable

from llamarefine_jobs.contract.errors import AccessError, LlamaRefineError, PreemptedError
from llamarefine_k8s.cluster import KubeObject
from llamarefine_k8s.cluster.api import Cluster
from llamarefine_k8s.cluster.manifests import (
    JOB_NAME,
    RUN,
    SETTINGS_MAP,
    TEMPLATE_DIGEST,
    owner_reference,
    run_config_map,
    stage_job,
    stage_service,
)
from llamarefine_k8s.cluster.reasons import condition
from llamarefine_k8s.runs.pipeline import Task
from llamarefine_k8s.runs.records import DRIVER_JOB, DRIVER_UID
from llamarefine_k8s.settings import Settings

_POLL_S = 0.2
_GONE_S = 60.0
_LATE_S = 15.0  # a pod that exists for so long after its grace period is killed


class StageObjects:
    """The Jobs and Services of a run's stages, owned by the driver's Job or, without one, by the run's ConfigMap."""

    def __init__(self, cluster: Cluster, settings: Settings) -> None:
        self.is_driver = DRIVER_UID in os.environ  # whether this process is a pod of the run's driver Job
        self._cluster = cluster
        self._settings = settings
        self._owner: KubeObject | None = None

    def ensure_job(self, task: Task, is_cancelled: Callable[[], bool] = lambda: False) -> KubeObject:
        """Return the Job of a task: the one that already works on it, or a new one in place of an outdated one.

        A new Job is created only after the pods of a deleted one have ended, so that no step is trained twice at the
        same time. Raises PreemptedError if `is_cancelled` returns true meanwhile.
        """
        owner = self._ensure_owner(task)
        service = stage_service(task, owner)
        if service:
            self._ensure_service(service, task.run)
        manifest = stage_job(task, self._settings, owner)
        name = manifest["metadata"]["name"]
        existing = self._cluster.get("Job", name)
        if existing and self._may_be_followed(existing, manifest):
            return existing
        if existing:
            require_own(existing, task.run)
            delete_and_wait(self._cluster, "Job", existing)
        self._end_leftover_pods(task, name, is_cancelled)
        created = self._cluster.create(manifest) or self._cluster.get("Job", name)
        if created is None or not self._may_be_followed(created, manifest):
            raise LlamaRefineError(f"another process created the Job {name} just now; is the run driven twice?")
        return created

    def delete_owner(self) -> None:
        """Delete the ConfigMap that owns the stages' Jobs; do nothing if the driver's Job owns them.

        Unlike a Job, a ConfigMap has no time after which Kubernetes deletes it.
        """
        if self._owner and self._owner["kind"] == "ConfigMap":
            self._cluster.delete("ConfigMap", self._owner["name"], uid=self._owner["uid"])

    def owner_exists(self) -> bool:
        """Whether the owner of the stages' Jobs exists; a Job that is created after its deletion is deleted, too."""
        if self._owner is None:
            return False
        owner = self._cluster.get(self._owner["kind"], self._owner["name"])
        return (
            owner is not None
            and owner["metadata"]["uid"] == self._owner["uid"]
            and "deletionTimestamp" not in owner["metadata"]
        )

    def _end_leftover_pods(self, task: Task, job: str, is_cancelled: Callable[[], bool]) -> None:
        """Wait until no pod of a deleted Job runs; the pod may be saving a checkpoint.

        A pod without an owner (`kubectl delete --cascade=orphan`) is deleted first. A pod that runs for longer than its
        grace period is killed. Returns at once if another driver creates the Job meanwhile.
        """
        began_s = time.monotonic()
        deleted: set[str] = set()
        while pods := self._running_pods(task.run, job):
            if is_cancelled():
                raise PreemptedError(f"{task.stage} was cancelled")
            if self._cluster.get("Job", job):
                return
            for pod in pods:
                name, limit_s = pod["metadata"]["name"], pod["spec"].get("terminationGracePeriodSeconds", 30) + _LATE_S
                if time.monotonic() - began_s > limit_s:
                    self._cluster.delete("Pod", name, grace_s=0)
                elif name not in deleted and not pod["metadata"].get("ownerReferences"):
                    deleted.add(name)
                    self._cluster.delete("Pod", name)
            time.sleep(_POLL_S)

    def _running_pods(self, run: str, job: str) -> list[KubeObject]:
        pods = self._cluster.objects("Pod", labels=f"{RUN}={run},{JOB_NAME}={job}")
        return [pod for pod in pods if pod["status"].get("phase") not in ("Succeeded", "Failed")]

    def _ensure_service(self, manifest: KubeObject, run: str) -> None:
        """Create a stage's Service. An existing one gets the current owner, because its own may be deleted soon."""
        name = manifest["metadata"]["name"]
        if self._cluster.create(manifest):
            return
        existing = self._cluster.get("Service", name)
        if existing:
            require_own(existing | {"kind": "Service"}, run)
        owners = {"metadata": {"ownerReferences": manifest["metadata"]["ownerReferences"]}}
        if not self._cluster.patch("Service", name, owners):
            self._cluster.create(manifest)

    def _may_be_followed(self, existing: KubeObject, manifest: KubeObject) -> bool:
        """Whether a Job equals `manifest`, and either is active or was created by an earlier pod of this driver."""
        metadata = existing["metadata"]
        digest = manifest["metadata"]["annotations"][TEMPLATE_DIGEST]
        if (metadata.get("annotations") or {}).get(TEMPLATE_DIGEST) != digest:
            return False
        is_from_this_driver = self.is_driver and any(
            owner["uid"] == os.environ[DRIVER_UID] for owner in metadata.get("ownerReferences") or ()
        )
        return is_active(existing) or (is_from_this_driver and "deletionTimestamp" not in metadata)

    def _ensure_owner(self, task: Task) -> KubeObject:
        """Return the owner reference for the stage's objects; creates or updates the run's ConfigMap the first time."""
        if self._owner is None:
            driver = None
            if self.is_driver:
                driver = owner_reference("Job", os.environ[DRIVER_JOB], os.environ[DRIVER_UID])
            parent = driver or release_owner(self._cluster)
            config_map = put_run_config_map(
                self._cluster, run_config_map(task.run, task.recipe, self._settings, parent)
            )
            self._owner = driver or owner_reference("ConfigMap", task.run, config_map["metadata"]["uid"])
        return self._owner


def delete_and_wait(cluster: Cluster, kind: str, item: KubeObject) -> None:
    """Delete an object and wait until it is gone; one that another process created in its place is kept."""
    name, uid = item["metadata"]["name"], item["metadata"]["uid"]
    cluster.delete(kind, name, uid=uid)

    def is_gone() -> bool:
        existing = cluster.get(kind, name)
        return existing is None or existing["metadata"]["uid"] != uid

    wait_until(is_gone, f"the {kind} {name} was not deleted")


def put_run_config_map(cluster: Cluster, manifest: KubeObject) -> KubeObject:
    """Return a run's ConfigMap: the existing one with a new owner, or a new one if there is none or it differs.

    One that differs is replaced, because it is immutable, or because somebody replaced it with one that is not.
    """
    name = manifest["metadata"]["name"]
    existing = cluster.get("ConfigMap", name)
    if existing:
        require_own(existing | {"kind": "ConfigMap"}, manifest["metadata"]["labels"][RUN])
        if all(existing.get(part) == manifest[part] for part in ("data", "immutable")):
            # Without a new owner, deleting the owner from an earlier drive would delete this drive's stages too.
            owners = {"ownerReferences": manifest["metadata"].get("ownerReferences")}
            return cluster.patch("ConfigMap", name, {"metadata": owners}) or existing
        delete_and_wait(cluster, "ConfigMap", existing)
    found = cluster.create(manifest) or cluster.get("ConfigMap", name)
    if found is None:
        raise LlamaRefineError(f"the ConfigMap {name} was deleted while the run started; submit again")
    return found


def release_owner(cluster: Cluster) -> KubeObject | None:
    """Return an owner reference to the chart's ConfigMap; None if the chart is not installed.

    Uninstalling the chart then deletes its runs too: without the chart's permissions they could not go on.
    """
    config_map = cluster.get("ConfigMap", SETTINGS_MAP)
    return owner_reference("ConfigMap", SETTINGS_MAP, config_map["metadata"]["uid"]) if config_map else None


def is_active(job: KubeObject) -> bool:
    """Whether a Job has neither ended nor is being deleted."""
    return condition(job, "Complete", "Failed") is None and "deletionTimestamp" not in job["metadata"]


def require_own(existing: KubeObject, run: str) -> None:
    """Raise AccessError if an object with a name of this run was not created for this run."""
    if (existing["metadata"].get("labels") or {}).get(RUN) != run:
        raise AccessError(
            f"{existing.get('kind', 'an object')} {existing['metadata']['name']} exists but was not created by "
            "llamarefine; remove or rename it, or give the recipe another name"
        )


def wait_until(is_true: Callable[[], bool], complaint: str, timeout_s: float = _GONE_S) -> None:
    """Wait until `is_true` returns true; raises LlamaRefineError with `complaint` after `timeout_s`."""
    until_s = time.monotonic() + timeout_s
    while not is_true():
        if time.monotonic() > until_s:
            raise LlamaRefineError(f"{complaint} within {timeout_s:g} s; `kubectl describe` it")
        time.sleep(_POLL_S)
