"""Why a pod does not start and what to do about it; how a container ended. Pure: reads objects of the API server."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from llamarefine_jobs.contract.errors import (
    AccessError,
    LlamaRefineError,
    OutOfMemoryError,
    PeerLostError,
    PreemptedError,
    by_exit_code,
)
from llamarefine_k8s.cluster import KubeObject

_QUOTA, _SECURITY = "exceeded quota", "violates PodSecurity"
_IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError")


@dataclass(frozen=True)
class Reason:
    """Why a stage does not run, and what to do about it."""

    name: str  # Kubernetes' own reason if there is one, such as `Unschedulable`; else ours
    text: str
    hint: str
    kind: type[LlamaRefineError] = LlamaRefineError
    is_expected: bool = False  # the stage waits in a queue or for a node that is being added; no start timeout applies

    def __str__(self) -> str:
        return f"{self.name}: {self.text}; {self.hint}"


def why_waiting(name: str, job: KubeObject, pods: Sequence[KubeObject], events: Sequence[KubeObject]) -> Reason | None:
    """Return why `name`, a stage or the driver, does not run; None if it runs or no reason is known.

    `events` are the Events about the Job and its pods.
    """
    if job["spec"].get("suspend"):
        queue = job["metadata"]["labels"].get("kueue.x-k8s.io/queue-name")
        if queue:
            text, hint = f"the Job waits in the queue {queue}", "it starts when the queue admits it"
        else:
            text, hint = "the Job is suspended", "it starts when someone resumes it"
        return Reason("Suspended", text, hint, is_expected=True)
    pod = newest([pod for pod in pods if pod["status"].get("phase") == "Pending"]) or newest(pods)
    if pod is None or pod["status"].get("phase") in ("Failed", "Succeeded"):
        return _not_created(name, events)
    if pod["status"].get("phase") != "Pending":
        return None
    return _unscheduled(name, pod, events) or _not_started(name, pod) or _not_mounted(pod, events)


def newest(pods: Sequence[KubeObject]) -> KubeObject | None:
    """Return the pod that was created last; None without pods."""
    return max(pods, key=lambda pod: str(pod["metadata"]["creationTimestamp"]), default=None)


def node_index(pod: KubeObject) -> int:
    """Return the index of a pod's node within its Job; 0 if the Job runs on one node."""
    return int((pod["metadata"].get("labels") or {}).get("batch.kubernetes.io/job-completion-index", 0))


def with_node_prefix(pod: KubeObject, line: str) -> str:
    """Return a line of a pod's log, with `node <index>: ` in front unless the pod is the first node."""
    return f"node {node_index(pod)}: {line}" if node_index(pod) else line


def container_state(pod: KubeObject) -> KubeObject:
    """Return the state of a pod's container, such as ``{"running": …}``; empty while it is unknown."""
    statuses = pod["status"].get("containerStatuses") or [{}]
    state: KubeObject = statuses[0].get("state") or {}
    return state


def silent_node(pod: KubeObject) -> str | None:
    """Return the name of a pod's node if that node does not answer, so that the pod's state is unknown; else None.

    Kubernetes then marks the pod as not ready. A pod that ends is not ready either, but its container is terminated.
    """
    conditions = pod["status"].get("conditions") or ()
    is_unready = any(each["type"] == "Ready" and each["status"] == "False" for each in conditions)
    is_silent = is_unready and pod["status"].get("phase") == "Running" and "running" in container_state(pod)
    return str(pod["spec"].get("nodeName")) if is_silent else None


def has_started(pod: KubeObject) -> bool:
    """Whether a pod's container runs or has run, so that there is a log."""
    state = container_state(pod)
    return "running" in state or "terminated" in state


def condition(job: KubeObject, *types: str) -> KubeObject | None:
    """Return the first condition of a Job whose type is in `types` and whose status is True; None if there is none."""
    for each in job["status"].get("conditions") or ():
        if each["type"] in types and each["status"] == "True":
            found: KubeObject = each
            return found
    return None


def how_it_ended(name: str, job: KubeObject, pods: Sequence[KubeObject]) -> LlamaRefineError:
    """Return the error of a failed Job, with the stage's own message if its container left one."""
    failed = condition(job, "Failed", "FailureTarget") or {}
    if failed.get("reason") == "DeadlineExceeded":
        limit_s = job["spec"].get("activeDeadlineSeconds")
        return LlamaRefineError(f"{name} was stopped after {limit_s} s, its deadline; raise deadline_s in the settings")
    ended_pods = [pod for pod in pods if "terminated" in container_state(pod)]
    latest = {
        node_index(pod): pod for pod in sorted(ended_pods, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))
    }
    # On several nodes only the node that failed first has the cause; the others merely lost their peer.
    causes = [pod for pod in latest.values() if _exit_code(pod) not in (0, PeerLostError.exit_code)]
    pod = newest(causes) or newest(ended_pods)
    if pod is None:
        return LlamaRefineError(f"{name} failed: {failed.get('message') or 'its pod is gone'}")
    ended = container_state(pod)["terminated"]
    if is_killed_for_memory(pod):
        return out_of_memory_error(name, pod)
    code, message = ended.get("exitCode", 1), (ended.get("message") or "").strip()
    kind = by_exit_code(code)
    try:
        return kind(str(json.loads(message)["message"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        last = message.splitlines()[-1] if message else "it left no termination message; see its log"
        return kind(re.sub(r"^(\w+: )?error: ", "", last) if message else f"{name} ended with exit code {code}: {last}")


def _exit_code(pod: KubeObject) -> int:
    code: int = container_state(pod)["terminated"].get("exitCode", 1)
    return code


def is_killed_for_memory(pod: KubeObject) -> bool:
    """Whether the kernel killed a pod's container at its memory limit. Another pod would end the same way."""
    return bool(container_state(pod).get("terminated", {}).get("reason") == "OOMKilled")


def out_of_memory_error(name: str, pod: KubeObject) -> LlamaRefineError:
    """Return the error of a pod that was killed at its memory limit."""
    limit = pod["spec"]["containers"][0].get("resources", {}).get("limits", {}).get("memory", "the node's memory")
    return OutOfMemoryError(
        f"{name} was killed because it ran out of memory: its limit is {limit}; raise resources.{name}.limits.memory"
    )


def _not_created(name: str, events: Sequence[KubeObject]) -> Reason | None:
    """Return why the Job controller could not create the pod."""
    message = _last_message(events, "FailedCreate")
    return why_refused(name, message) if message is not None else None


def why_refused(name: str, message: str) -> Reason:
    """Return why the API server refuses the pod of `name`, a stage or the driver."""
    text = message.partition("is forbidden: ")[2] or message
    if _QUOTA in message:
        hint = f"ask for less (resources.{name}), wait for others to end, or have the quota raised"
        return Reason("QuotaExceeded", text, hint, AccessError)
    if _SECURITY in message:
        return Reason("PodSecurity", text, "remove the patch that loosens the pod's security", AccessError)
    if "serviceaccount" in message.lower() and "not found" in message:
        return Reason(
            "NoServiceAccount", text, "install the chart into this namespace: it creates the account", AccessError
        )
    return Reason("FailedCreate", text, "change the settings, or have the namespace's rules changed", AccessError)


def _unscheduled(name: str, pod: KubeObject, events: Sequence[KubeObject]) -> Reason | None:
    scheduled: KubeObject = next(
        (each for each in pod["status"].get("conditions") or () if each["type"] == "PodScheduled"), {}
    )
    if scheduled.get("status") != "False":
        return None
    message = str(scheduled.get("message") or "no node was found")
    if scheduled.get("reason") == "SchedulingGated":
        return Reason("SchedulingGated", message, "it starts when its queue admits it", is_expected=True)
    if _last_message(events, "TriggeredScaleUp"):
        return Reason("Unschedulable", message, "a node is being added", is_expected=True)
    missing = re.findall(r"Insufficient ([\w./-]+)", message)
    if any("/" in each for each in missing):
        hint = f"no node has such GPUs free: wait, add one, or lower resources.{name}.gpus (0 trains on CPUs)"
    elif missing:
        hint = f"lower resources.{name}.requests ({', '.join(dict.fromkeys(missing))}), or add a larger node"
    elif "taint" in message:
        hint = "add tolerations to the settings, or remove the taint from a node"
    elif "selector" in message or "affinity" in message:
        hint = "no node has the labels of node_selector; correct it, or label a node"
    else:
        hint = "`kubectl describe nodes` shows the resources of each node"
    return Reason("Unschedulable", message, hint)


def _not_started(name: str, pod: KubeObject) -> Reason | None:
    waiting = container_state(pod).get("waiting") or {}
    reason, message = str(waiting.get("reason") or ""), " ".join(str(waiting.get("message") or "").split())
    image = pod["spec"]["containers"][0]["image"]
    if reason in _IMAGE_REASONS:
        hint = "check image_registry and image_tag, and image_pull_secrets if the registry requires a login"
        return Reason(reason, f"{image} cannot be pulled: {message or 'the node gives no cause'}", hint, AccessError)
    if reason == "CreateContainerConfigError":
        secret = re.search(r'secret "([^"]+)" not found', message)
        missing = secret[1] if secret else next(iter(re.findall(r"in Secret \S+/(\S+)", message)), None)
        hint = (
            f"kubectl create secret generic {missing} --from-literal=AWS_ACCESS_KEY_ID=… "
            "--from-literal=AWS_SECRET_ACCESS_KEY=…, or correct secret_name"
            if missing
            else "correct the settings, or the object that they name"
        )
        return Reason(reason, message, hint, AccessError)
    if reason in ("CreateContainerError", "RunContainerError", "StartError"):
        return Reason(reason, message, f"is {image} an image of llamarefine, built for this node's processor?")
    return None


def _not_mounted(pod: KubeObject, events: Sequence[KubeObject]) -> Reason | None:
    message = _last_message([each for each in events if each["involvedObject"].get("kind") == "Pod"], "FailedMount")
    if message is None or has_started(pod):
        return None
    return Reason("FailedMount", message, "does the object that the volume names exist in this namespace?")


def _last_message(events: Sequence[KubeObject], reason: str) -> str | None:
    """Return the message of the newest Event with a reason; None if there is none."""
    found = [each for each in events if each.get("reason") == reason]
    last = max(found, key=lambda each: str(each.get("lastTimestamp") or each.get("eventTime") or ""), default=None)
    return " ".join(str(last.get("message") or "").split()) if last else None


def why_replaced(pod: KubeObject) -> str:
    """Return how a replaced pod ended, as a clause such as "its pod was stopped"."""
    code = container_state(pod).get("terminated", {}).get("exitCode")
    is_disrupted = any(
        each["type"] == "DisruptionTarget" and each["status"] == "True"
        for each in pod["status"].get("conditions") or ()
    )
    if is_disrupted:
        return "its pod was evicted from its node"
    if code is None:
        return "its pod is gone"
    kind = by_exit_code(code)
    return "its pod was stopped" if kind is PreemptedError else f"its pod ended with exit code {code} ({kind.reason})"
