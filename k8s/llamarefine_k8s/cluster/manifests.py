"""Kubernetes manifests of a run: stage + recipe + settings → plain dictionaries in the API's own form. Pure.

(Not the manifest of an artifact, which is contract/artifact.py's.)

    ConfigMap <run>              the pinned recipe, and the settings it was submitted with
    Job <run>                    the driver: `llamarefine submit --foreground` inside the cluster
    Job <run>-<stage>            one for each stage that is due, created by the driver
    Service nodes-<run>-<stage>  for a training on several nodes: the name by which its pods find the first node

`--dry-run` prints the same objects, but without owners, and with zeros as the keys of all stages but the first. The
stage Jobs are owned by the driver Job, or by the ConfigMap if the driver runs on the user's machine; Kubernetes deletes
them with their owner.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import yaml

from llamarefine_jobs.contract import environment
from llamarefine_jobs.contract.artifact import short
from llamarefine_jobs.contract.environment import (
    BUCKET_KEYS,
    GIVE_UP_VARIABLE,
    OOM_VARIABLE,
    RENDEZVOUS_PORT,
    WORK_FOLDER,
)
from llamarefine_jobs.contract.errors import Disposition, LlamaRefineError, RecipeError, all_errors
from llamarefine_jobs.contract.recipe import Recipe, Training
from llamarefine_jobs.contract.retry import GIVE_UP_AFTER_S
from llamarefine_jobs.contract.version import __version__
from llamarefine_jobs.recipe_file import to_yaml
from llamarefine_k8s.cluster import KubeObject
from llamarefine_k8s.runs.pipeline import InterruptedRunError, Task
from llamarefine_k8s.runs.records import DRIVER_JOB, DRIVER_RUN, DRIVER_UID
from llamarefine_k8s.runs.signing import SIGNING_KEY
from llamarefine_k8s.settings import ALL, DRIVER, Settings

RUN, STAGE, KEY = "llamarefine/run", "llamarefine/stage", "llamarefine/key"
# Annotation with a digest of key and spec: an active Job is followed only if a new one would have the same digest.
TEMPLATE_DIGEST = "llamarefine/made-from"
JOB_NAME = "batch.kubernetes.io/job-name"
RECIPE_FILE = "/etc/llamarefine/recipe.yaml"
SETTINGS_MAP, SETTINGS_FILE = "llamarefine-settings", "/etc/llamarefine/llamarefine.yaml"
CONTAINER = "stage"
_CONFIG, _KEYS, _SCRATCH = "/etc/llamarefine", "/etc/llamarefine-keys", "/scratch"
_KEY_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
_DRIVER_RETRIES = 3


def stage_job(task: Task, settings: Settings, owner: KubeObject | None = None) -> KubeObject:
    """Return the Job of one stage, with a pod for each of its nodes."""
    nodes = nodes_of(task.recipe, task.stage)
    spec: KubeObject = {
        # One lost node ends the pods of all nodes, and each pod counts as one failure.
        "backoffLimit": settings.retries * nodes,
        "podFailurePolicy": pod_failure_policy(CONTAINER),
        "podReplacementPolicy": "Failed",  # the next pod starts only when this one has saved its checkpoint and ended
        "ttlSecondsAfterFinished": settings.ttl_s,
    }
    if nodes > 1:
        spec |= {"completionMode": "Indexed", "completions": nodes, "parallelism": nodes}
    if settings.deadline_s:
        spec["activeDeadlineSeconds"] = settings.deadline_s
    if settings.queue:
        spec["suspend"] = True  # Kueue resumes it when the queue admits it
    labels = _labels(task.run, task.stage) | {KEY: short(task.key)}
    spec["template"] = {"metadata": {"labels": labels}, "spec": _stage_pod(task, settings)}
    queue = {"kueue.x-k8s.io/queue-name": settings.queue} if settings.queue else {}
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(stage_job_name(task.run, task.stage), labels | queue, owner),
        "spec": spec,
    }
    for name in (ALL, task.stage):
        job = patched(job, settings.patches.get(name, {}))
    digest = hashlib.sha256(json.dumps([task.key, job["spec"]], sort_keys=True).encode()).hexdigest()[:16]
    return patched(job, {"metadata": {"annotations": {TEMPLATE_DIGEST: digest}}})


def stage_service(task: Task, owner: KubeObject | None = None) -> KubeObject | None:
    """Return the Service that gives DNS names to the pods of a training on several nodes; None for a single pod.

    It is owned by the owner of the stage's Job, not by that Job: a Job that is created again needs the Service at once.
    """
    if nodes_of(task.recipe, task.stage) == 1:
        return None
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(_service_name(task), _labels(task.run, task.stage), owner),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,  # the pods meet before they are ready
            "selector": {JOB_NAME: stage_job_name(task.run, task.stage)},
            "ports": [{"name": "meeting", "port": RENDEZVOUS_PORT}],
        },
    }


def nodes_of(recipe: Recipe, stage: str) -> int:
    """Return the number of nodes of a stage; each node is one pod."""
    section = recipe.section(stage)
    return section.nodes if isinstance(section, Training) else 1


def gpus_of(recipe: Recipe, stage: str, settings: Settings) -> int:
    """Return the number of GPUs of each pod of a stage: the recipe's count, or 0 if the settings put it on CPUs.

    Raises RecipeError if recipe and settings name different counts.
    """
    section = recipe.section(stage)
    default = settings.gpus_of(stage)
    if not isinstance(section, Training) or section.gpus == 1 or default == 0:
        return default
    in_settings = settings.resources_of(stage).gpus
    if in_settings is not None and in_settings != section.gpus:
        raise RecipeError(
            f"{stage}.gpus is {section.gpus} in the recipe, resources.{stage}.gpus is {in_settings} in the settings; "
            "leave it out of the settings, or set it to 0 to train on CPUs"
        )
    return section.gpus


def driver_job(run: str, settings: Settings, owner: KubeObject | None = None) -> KubeObject:
    """Return the Job that drives a run inside the cluster."""
    labels = _labels(run, DRIVER)
    container = {
        "name": DRIVER,
        "image": settings.image("launcher"),
        "imagePullPolicy": settings.image_pull_policy,
        "args": ["submit", RECIPE_FILE, "--foreground", "--settings", SETTINGS_FILE],
        "env": [
            *_environment(settings),
            # The driver is the Job, not the pod: a replacement pod continues the run and owns its objects.
            _from_label(DRIVER_JOB, JOB_NAME),
            _from_label(DRIVER_UID, "batch.kubernetes.io/controller-uid"),
            _from_label(DRIVER_RUN, RUN),
            *_signing_key(settings),
        ],
        "resources": _resources(settings, DRIVER),
        "securityContext": _CONTAINER_SECURITY,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "config", "mountPath": _CONFIG, "readOnly": True},
            {"name": "scratch", "mountPath": _SCRATCH},
            *_keys_mount(settings),
        ],
    }
    pod = {
        "serviceAccountName": settings.service_account,
        **settings.placement_of(DRIVER),
        **_pod(settings, container),
        "volumes": [
            {"name": "config", "configMap": {"name": run}},
            {"name": "scratch", "emptyDir": {}},
            *_keys_volume(settings),
        ],
        "terminationGracePeriodSeconds": 30,
    }
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": _metadata(run, labels, owner),
        "spec": {
            "backoffLimit": _DRIVER_RETRIES,
            "podFailurePolicy": pod_failure_policy(DRIVER),
            "podReplacementPolicy": "Failed",
            "ttlSecondsAfterFinished": settings.ttl_s,
            "template": {"metadata": {"labels": labels}, "spec": pod},
        },
    }
    return patched(job, settings.patches.get(DRIVER, {}))


def run_config_map(run: str, recipe: Recipe, settings: Settings, owner: KubeObject | None = None) -> KubeObject:
    """Return the ConfigMap of a run: its pinned recipe, and the settings with which it was submitted.

    It is immutable, because stages that start later read the recipe again.
    """
    submitted = settings.model_dump(mode="json", exclude_defaults=True, exclude={"context", "namespace"})
    files = {"recipe.yaml": to_yaml(recipe), "llamarefine.yaml": yaml.safe_dump(submitted, sort_keys=False)}
    metadata = _metadata(run, _labels(run), owner)
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "immutable": True, "data": files}


def _service_name(task: Task) -> str:
    """Return the Service's name, which must begin with a letter; a run's name may begin with a digit."""
    return f"nodes-{stage_job_name(task.run, task.stage)}"


def stage_job_name(run: str, stage: str) -> str:
    """Return the name of a stage's Job: at most 58 characters, since a run's name has at most 49 and a stage's 8."""
    return f"{run}-{stage}"


def owner_reference(kind: str, name: str, uid: str) -> KubeObject:
    """Return an owner reference, which makes Kubernetes delete an object together with the owner `name`."""
    version = {"Job": "batch/v1", "ConfigMap": "v1"}[kind]
    return {"apiVersion": version, "kind": kind, "name": name, "uid": uid, "controller": False}


def pod_failure_policy(container: str) -> KubeObject:
    """Return the dispositions of errors.py as rules of the Job controller; the first rule that matches decides.

    A pod on a drained or lost node does not count as a failure, whatever its exit code. Exit codes without a rule
    count, 137 (SIGKILL) too: only the container's reason shows whether the memory limit caused it, and the executor
    reads that.
    """
    codes: dict[Disposition, list[int]] = {disposition: [] for disposition in Disposition}
    kinds: list[type[LlamaRefineError]] = [LlamaRefineError, *all_errors(), InterruptedRunError]
    for kind in kinds:
        codes[kind.disposition].append(kind.exit_code)
    actions = {Disposition.RESUME: "Ignore", Disposition.FAIL: "FailJob", Disposition.RETRY: "Count"}
    rules = [
        {
            "action": action,
            "onExitCodes": {"containerName": container, "operator": "In", "values": sorted(codes[disposition])},
        }
        for disposition, action in actions.items()
    ]
    return {"rules": [{"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}, *rules]}


def patched(manifest: KubeObject, patch: KubeObject) -> KubeObject:
    """Return `manifest` with `patch` merged into it key by key; null removes a key.

    Lists whose items all have a `mountPath`, else a `name`, are merged by that key (containers, env, volumes,
    volumeMounts); any other list is replaced (args, tolerations).
    """
    kept = {name: item for name, item in manifest.items() if not (name in patch and patch[name] is None)}
    return kept | {name: _merged(manifest.get(name), item) for name, item in patch.items() if item is not None}


def _merged(value: Any, patch: Any) -> Any:
    if isinstance(patch, dict):
        return patched(value if isinstance(value, dict) else {}, patch)
    key = next((key for key in ("mountPath", "name") if _all_have(patch, key)), None)
    if key and _all_have(value, key):
        items = {item[key]: item for item in value}
        return list((items | {item[key]: _merged(items.get(item[key]), item) for item in patch}).values())
    return patch


def _all_have(items: Any, key: str) -> bool:
    return isinstance(items, list) and bool(items) and all(isinstance(item, dict) and key in item for item in items)


def _stage_pod(task: Task, settings: Settings) -> KubeObject:
    gpus = gpus_of(task.recipe, task.stage, settings)
    name, service = stage_job_name(task.run, task.stage), _service_name(task)
    is_one_pod = nodes_of(task.recipe, task.stage) == 1
    mounts: list[KubeObject] = [
        {"name": "recipe", "mountPath": _CONFIG, "readOnly": True},
        {"name": "scratch", "mountPath": _SCRATCH},
        *_keys_mount(settings),
    ]
    scratch = {"sizeLimit": settings.scratch} if settings.scratch else {}
    volumes: list[KubeObject] = [
        {
            "name": "recipe",
            "configMap": {"name": task.run, "items": [{"key": "recipe.yaml", "path": "recipe.yaml"}]},
        },
        {"name": "scratch", "emptyDir": scratch},
        *_keys_volume(settings),
    ]
    if gpus and settings.shared_memory:  # data loaders pass tensors in /dev/shm, which is 64 MiB otherwise
        mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})  # noqa: S108 the kernel defines this path
        volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shared_memory}})
    threads = task.recipe.cpu_threads
    container = {
        "name": CONTAINER,
        "image": settings.image(task.stage),
        "imagePullPolicy": settings.image_pull_policy,
        "args": ["--recipe", RECIPE_FILE, "--store", task.store_uri],
        "env": [
            *_environment(settings),
            {"name": environment.EXPECTED_KEY, "value": task.key},
            *([{"name": "OMP_NUM_THREADS", "value": str(threads)}] if threads else []),
            *([] if is_one_pod else [{"name": "MASTER_ADDR", "value": f"{name}-0.{service}"}]),
            *(
                [{"name": OOM_VARIABLE, "value": json.dumps(task.oom_micro_batch_rows)}]
                if task.oom_micro_batch_rows
                else []
            ),
        ],
        "resources": _resources(settings, task.stage, gpus),
        "securityContext": _CONTAINER_SECURITY,
        "terminationMessagePath": "/dev/termination-log",
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts,
    }
    account = settings.stage_service_account
    return {
        "automountServiceAccountToken": False,
        **({} if is_one_pod else {"subdomain": service}),
        **({"serviceAccountName": account} if account else {}),
        **settings.placement_of(task.stage),
        **_pod(settings, container),
        "volumes": volumes,
        "terminationGracePeriodSeconds": settings.grace_s,
    }


_CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
}
_POD_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": 1000,
    "runAsGroup": 1000,
    "fsGroup": 1000,
    "seccompProfile": {"type": "RuntimeDefault"},
}


def _pod(settings: Settings, container: KubeObject) -> KubeObject:
    """Return the part of a pod's spec that stages and driver share."""
    pod: KubeObject = {
        "restartPolicy": "Never",
        "enableServiceLinks": False,  # no environment variables for the namespace's services
        "securityContext": _POD_SECURITY,
        "containers": [container],
    }
    if settings.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": name} for name in settings.image_pull_secrets]
    if settings.priority_class:
        pod["priorityClassName"] = settings.priority_class
    return pod


def _environment(settings: Settings) -> list[KubeObject]:
    """Return the variables for the bucket, its credentials by reference, and writable folders on a read-only root."""
    plain = {"AWS_REGION": settings.s3_region}
    if settings.s3_endpoint:
        plain["AWS_ENDPOINT_URL_S3"] = settings.s3_endpoint
    if settings.give_up_after_s != GIVE_UP_AFTER_S:
        plain[GIVE_UP_VARIABLE] = str(settings.give_up_after_s)
    if settings.secret_name:
        plain[BUCKET_KEYS] = _KEYS
    plain |= {"HOME": _SCRATCH, "TMPDIR": _SCRATCH, WORK_FOLDER: _SCRATCH, "PYTHONUNBUFFERED": "1"}
    secret = [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": settings.secret_name, "key": name}}}
        for name in _KEY_VARIABLES
        if settings.secret_name
    ]
    return [{"name": name, "value": value} for name, value in plain.items()] + secret


def _keys_mount(settings: Settings) -> list[KubeObject]:
    return [{"name": "bucket-keys", "mountPath": _KEYS, "readOnly": True}] if settings.secret_name else []


def _keys_volume(settings: Settings) -> list[KubeObject]:
    """Return the volume with the bucket's keys as files, which follow the Secret while the pod runs.

    It is optional so that a missing Secret or key is still reported by the container, whose environment needs both.
    """
    if not settings.secret_name:
        return []
    items = [{"key": name, "path": name} for name in (*_KEY_VARIABLES, "AWS_SESSION_TOKEN")]
    return [{"name": "bucket-keys", "secret": {"secretName": settings.secret_name, "items": items, "optional": True}}]


def _signing_key(settings: Settings) -> list[KubeObject]:
    if not settings.signing_secret_name:
        return []
    reference = {"name": settings.signing_secret_name, "key": "signing-key.pem"}
    return [{"name": SIGNING_KEY, "valueFrom": {"secretKeyRef": reference}}]


def _from_label(variable: str, label: str) -> KubeObject:
    return {"name": variable, "valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['{label}']"}}}


def _resources(settings: Settings, name: str, gpus: int = 0) -> KubeObject:
    given = settings.resources_of(name)
    gpu = {str(settings.gpu_resource): str(gpus)} if gpus else {}
    limits: Mapping[str, str] = given.limits | gpu
    resources: KubeObject = {"requests": dict(given.requests)}
    return resources | ({"limits": dict(limits)} if limits else {})


def _labels(run: str, component: str | None = None) -> dict[str, str]:
    labels = {
        "app.kubernetes.io/name": "llamarefine",
        "app.kubernetes.io/instance": run,
        "app.kubernetes.io/version": __version__,
        "app.kubernetes.io/managed-by": "llamarefine",
        RUN: run,
    }
    if component == DRIVER:
        labels["app.kubernetes.io/component"] = DRIVER
    elif component:
        labels |= {"app.kubernetes.io/component": "stage", STAGE: component}
    return labels


def _metadata(name: str, labels: Mapping[str, str], owner: KubeObject | None = None) -> KubeObject:
    metadata: KubeObject = {"name": name, "labels": dict(labels)}
    return metadata | ({"ownerReferences": [owner]} if owner else {})
