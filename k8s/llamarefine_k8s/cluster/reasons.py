"""Why a pod does not start, and what to do about it; how a container ended. Pure: reads what the API server said."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llamarefine_jobs.contract.errors import (
    AccessError,
    LlamaRefineError,
    OutOfMemoryError,
    PeerLostError,
    PreemptedError,
    by_exit_code,
)

Object = dict[str, Any]

_QUOTA, _SECURITY = "exceeded quota", "violates PodSecurity"
_IMAGE = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError")


@dataclass(frozen=True)
class Reason:
    """What keeps a stage from running. `patient`: it is in a queue, or a node for it is on its way."""

    word: str
    text: str
    hint: str
    kind: type[LlamaRefineError] = LlamaRefineError
    patient: bool = False

    def __str__(self) -> str:
        return f"{self.word}: {self.text}; {self.hint}"


def why_waiting(name: str, job: Object, pods: Sequence[Object], events: Sequence[Object]) -> Reason | None:
    """What keeps `name`, a stage or the driver, from running; None where it runs, or nothing is known against it.

    `events` are those of the Job and of its pods.
    """
    if job["spec"].get("suspend"):
        queue = job["metadata"]["labels"].get("kueue.x-k8s.io/queue-name")
        where = f"in the queue {queue}" if queue else "by someone"
        return Reason("Suspended", f"the Job is held {where}", "it starts when it is let go", patient=True)
    pod = newest([pod for pod in pods if pod["status"].get("phase") == "Pending"]) or newest(pods)
    if pod is None or pod["status"].get("phase") in ("Failed", "Succeeded"):
        return _not_created(name, events)
    if pod["status"].get("phase") != "Pending":
        return None
    return _unscheduled(name, pod, events) or _not_started(name, pod) or _not_mounted(pod, events)


def newest(pods: Sequence[Object]) -> Object | None:
    """The pod that was made last."""
    return max(pods, key=lambda pod: str(pod["metadata"]["creationTimestamp"]), default=None)


def node_index(pod: Object) -> int:
    """Which of its Job's nodes a pod is; 0 in a Job of one."""
    return int((pod["metadata"].get("labels") or {}).get("batch.kubernetes.io/job-completion-index", 0))


def with_node_prefix(pod: Object, line: str) -> str:
    """A line of a pod's log; that of another node than the first says so."""
    return f"node {node_index(pod)}: {line}" if node_index(pod) else line


def container_state(pod: Object) -> Object:
    """The state of the pod's container, such as ``{"running": …}``; empty while nothing is known."""
    statuses = pod["status"].get("containerStatuses") or [{}]
    state: Object = statuses[0].get("state") or {}
    return state


def silent_node(pod: Object) -> str | None:
    """The name of a pod's node that does not answer, so that nobody knows what the pod does.

    Kubernetes then takes the pod for not ready. One that ends is not ready either, but says how it ended.
    """
    conditions = pod["status"].get("conditions") or ()
    unready = any(each["type"] == "Ready" and each["status"] == "False" for each in conditions)
    is_silent = unready and pod["status"].get("phase") == "Running" and "running" in container_state(pod)
    return str(pod["spec"].get("nodeName")) if is_silent else None


def has_begun(pod: Object) -> bool:
    """Whether its container runs or has run: there is a log."""
    state = container_state(pod)
    return "running" in state or "terminated" in state


def condition(job: Object, *types: str) -> Object | None:
    """The first of the Job's conditions that is one of `types` and holds."""
    for each in job["status"].get("conditions") or ():
        if each["type"] in types and each["status"] == "True":
            found: Object = each
            return found
    return None


def how_it_ended(name: str, job: Object, pods: Sequence[Object]) -> LlamaRefineError:
    """The error that a failed Job means, in the stage's own words where it left some."""
    failed = condition(job, "Failed", "FailureTarget") or {}
    if failed.get("reason") == "DeadlineExceeded":
        limit_s = job["spec"].get("activeDeadlineSeconds")
        return LlamaRefineError(f"{name} was stopped after {limit_s} s, its deadline; raise deadline_s in the settings")
    ended_pods = [pod for pod in pods if "terminated" in container_state(pod)]
    latest = {
        node_index(pod): pod for pod in sorted(ended_pods, key=lambda pod: str(pod["metadata"]["creationTimestamp"]))
    }
    # Of several nodes the one that failed by itself tells why; the others only lost it.
    causes = [pod for pod in latest.values() if _exit_code(pod) not in (0, PeerLostError.exit_code)]
    pod = newest(causes) or newest(ended_pods)
    if pod is None:
        return LlamaRefineError(f"{name} failed: {failed.get('message') or 'its pod is gone'}")
    ended = container_state(pod)["terminated"]
    if is_killed_for_memory(pod):
        return out_of_memory(name, pod)
    code, message = ended.get("exitCode", 1), (ended.get("message") or "").strip()
    kind = by_exit_code(code)
    try:
        return kind(str(json.loads(message)["message"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        last = message.splitlines()[-1] if message else "it left no word; its log may say more"
        return kind(re.sub(r"^(\w+: )?error: ", "", last) if message else f"{name} ended with exit code {code}: {last}")


def _exit_code(pod: Object) -> int:
    code: int = container_state(pod)["terminated"].get("exitCode", 1)
    return code


def is_killed_for_memory(pod: Object) -> bool:
    """Whether the kernel ended its container for its memory limit: another pod would end so, too."""
    return bool(container_state(pod).get("terminated", {}).get("reason") == "OOMKilled")


def out_of_memory(name: str, pod: Object) -> LlamaRefineError:
    """The error that such an end means."""
    limit = pod["spec"]["containers"][0].get("resources", {}).get("limits", {}).get("memory", "the node's memory")
    return OutOfMemoryError(
        f"{name} was killed for want of memory: it may use {limit}; raise resources.{name}.limits.memory"
    )


def _not_created(name: str, events: Sequence[Object]) -> Reason | None:
    """What forbids the Job controller to make the pod."""
    message = _last(events, "FailedCreate")
    return why_refused(name, message) if message is not None else None


def why_refused(name: str, message: str) -> Reason:
    """What forbids the pod of `name`, in the API server's words."""
    found = message.partition("is forbidden: ")[2] or message
    if _QUOTA in message:
        hint = f"ask for less (resources.{name}), wait for others to end, or have the quota raised"
        return Reason("QuotaExceeded", found, hint, AccessError)
    if _SECURITY in message:
        return Reason("PodSecurity", found, "take out the patch that loosens the pod's security", AccessError)
    if "serviceaccount" in message.lower() and "not found" in message:
        return Reason("NoServiceAccount", found, "install the chart into this namespace: it brings it", AccessError)
    return Reason("FailedCreate", found, "change the settings, or have the namespace's rules changed", AccessError)


def _unscheduled(name: str, pod: Object, events: Sequence[Object]) -> Reason | None:
    scheduled: Object = next(
        (each for each in pod["status"].get("conditions") or () if each["type"] == "PodScheduled"), {}
    )
    if scheduled.get("status") != "False":
        return None
    message = str(scheduled.get("message") or "no node was found")
    if scheduled.get("reason") == "SchedulingGated":
        return Reason("SchedulingGated", message, "it starts when its queue lets it", patient=True)
    if _last(events, "TriggeredScaleUp"):
        return Reason("Unschedulable", message, "a node is being added", patient=True)
    missing = re.findall(r"Insufficient ([\w./-]+)", message)
    if any("/" in each for each in missing):
        hint = f"no node has such GPUs free: wait, add one, or lower resources.{name}.gpus (0 trains on CPUs)"
    elif missing:
        hint = f"lower resources.{name}.requests ({', '.join(dict.fromkeys(missing))}), or add a larger node"
    elif "taint" in message:
        hint = "put tolerations into the settings, or take the taint off a node"
    elif "selector" in message or "affinity" in message:
        hint = "no node has the labels of node_selector; correct it, or label a node"
    else:
        hint = "`kubectl describe nodes` shows what each has"
    return Reason("Unschedulable", message, hint)


def _not_started(name: str, pod: Object) -> Reason | None:
    waiting = container_state(pod).get("waiting") or {}
    word, message = str(waiting.get("reason") or ""), " ".join(str(waiting.get("message") or "").split())
    image = pod["spec"]["containers"][0]["image"]
    if word in _IMAGE:
        hint = "check image_registry and image_tag, and image_pull_secrets where the registry asks who you are"
        return Reason(word, f"{image} cannot be pulled: {message or 'the node says no more'}", hint, AccessError)
    if word == "CreateContainerConfigError":
        secret = re.search(r'secret "([^"]+)" not found', message)
        missing = secret[1] if secret else next(iter(re.findall(r"in Secret \S+/(\S+)", message)), None)
        hint = (
            f"kubectl create secret generic {missing} --from-literal=AWS_ACCESS_KEY_ID=… "
            "--from-literal=AWS_SECRET_ACCESS_KEY=…, or correct secret_name"
            if missing
            else "correct the settings, or the object that they name"
        )
        return Reason(word, message, hint, AccessError)
    if word in ("CreateContainerError", "RunContainerError", "StartError"):
        return Reason(word, message, f"is {image} an image of llamarefine, built for this node's processor?")
    return None


def _not_mounted(pod: Object, events: Sequence[Object]) -> Reason | None:
    message = _last([each for each in events if each["involvedObject"].get("kind") == "Pod"], "FailedMount")
    if message is None or has_begun(pod):
        return None
    return Reason("FailedMount", message, "is what the volume names in this namespace?")


def _last(events: Sequence[Object], reason: str) -> str | None:
    """The newest message of a kind of event."""
    found = [each for each in events if each.get("reason") == reason]
    last = max(found, key=lambda each: str(each.get("lastTimestamp") or each.get("eventTime") or ""), default=None)
    return " ".join(str(last.get("message") or "").split()) if last else None


def why_replaced(pod: Object) -> str:
    """In words, how a pod ended that another one follows."""
    code = container_state(pod).get("terminated", {}).get("exitCode")
    disrupted = any(
        each["type"] == "DisruptionTarget" and each["status"] == "True"
        for each in pod["status"].get("conditions") or ()
    )
    if disrupted:
        return "its pod was taken off its node"
    if code is None:
        return "its pod is gone"
    kind = by_exit_code(code)
    return (
        "its pod was told to stop" if kind is PreemptedError else f"its pod ended with exit code {code} ({kind.reason})"
    )
