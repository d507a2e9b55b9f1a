"""Why a stage does not start or how it ended, from objects and Events as a real API server returned them."""

from typing import Any

import pytest

from llamarefine_jobs.contract.errors import (
    DataError,
    DivergedError,
    LlamaRefineError,
    OutOfMemoryError,
    PeerLostError,
    StoreError,
)
from llamarefine_k8s.cluster.reasons import how_it_ended, why_replaced, why_waiting, with_node_prefix

Object = dict[str, Any]

JOB: Object = {"metadata": {"name": "run-sft", "labels": {}}, "spec": {"activeDeadlineSeconds": 60}, "status": {}}


def pod(phase: str = "Pending", state: Object | None = None, conditions: tuple[Object, ...] = ()) -> Object:
    statuses = [{"state": state}] if state else []
    return {
        "metadata": {"name": "run-sft-abcde", "creationTimestamp": "2026-11-24T00:00:00Z"},
        "spec": {"containers": [{"image": "llamarefine-sft:1", "resources": {"limits": {"memory": "1Gi"}}}]},
        "status": {"phase": phase, "containerStatuses": statuses, "conditions": list(conditions)},
    }


def unscheduled(message: str) -> Object:
    return pod(conditions=({"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message},))


def event(reason: str, message: str, kind: str = "Job") -> Object:
    return {
        "reason": reason,
        "message": message,
        "lastTimestamp": "2026-11-24T00:00:00Z",
        "involvedObject": {"kind": kind},
    }


def ended(code: int, message: str = "", reason: str = "Error") -> Object:
    return pod("Failed", {"terminated": {"exitCode": code, "message": message, "reason": reason}})


@pytest.mark.parametrize(
    ("pods", "events", "name", "text", "hint"),
    [
        (
            [unscheduled("0/1 nodes are available: 1 Insufficient nvidia.com/gpu.")],
            [],
            "Unschedulable",
            "0/1 nodes",
            "resources.sft.gpus",
        ),
        (
            [unscheduled("0/1 nodes are available: 1 Insufficient memory.")],
            [],
            "Unschedulable",
            "memory",
            "resources.sft.requests",
        ),
        ([unscheduled("1 node(s) had untolerated taint {gpu: }")], [], "Unschedulable", "taint", "tolerations"),
        (
            [unscheduled("1 node(s) didn't match Pod's node affinity/selector")],
            [],
            "Unschedulable",
            "selector",
            "node_selector",
        ),
        (
            [pod(state={"waiting": {"reason": "ImagePullBackOff", "message": "not found"}})],
            [],
            "ImagePullBackOff",
            "llamarefine-sft:1",
            "image_tag",
        ),
        (
            [pod(state={"waiting": {"reason": "CreateContainerConfigError", "message": 'secret "mine" not found'}})],
            [],
            "CreateContainerConfigError",
            '"mine" not found',
            "kubectl create secret generic mine",
        ),
        (
            [
                pod(
                    state={
                        "waiting": {
                            "reason": "CreateContainerConfigError",
                            "message": "couldn't find key AWS_SECRET_ACCESS_KEY in Secret ns/mine",
                        }
                    }
                )
            ],
            [],
            "CreateContainerConfigError",
            "AWS_SECRET_ACCESS_KEY",
            "kubectl create secret generic mine",
        ),
        (
            [],
            [event("FailedCreate", 'Error creating: pods "x" is forbidden: exceeded quota: q, requested: pods=1')],
            "QuotaExceeded",
            "exceeded quota: q",
            "raised",
        ),
        (
            [],
            [event("FailedCreate", 'Error creating: pods "x" is forbidden: violates PodSecurity "restricted:latest"')],
            "PodSecurity",
            "restricted",
            "patch",
        ),
        (
            [],
            [
                event(
                    "FailedCreate",
                    'pods "x" is forbidden: error looking up service account a/b: serviceaccount "b" not found',
                )
            ],
            "NoServiceAccount",
            '"b" not found',
            "chart",
        ),
        (
            [pod()],
            [event("FailedMount", 'configmap "run" not found', "Pod")],
            "FailedMount",
            '"run" not found',
            "volume",
        ),
    ],
)
def test_the_reason_why_a_stage_waits_has_a_name_a_text_and_a_hint(
    pods: list[Object], events: list[Object], name: str, text: str, hint: str
) -> None:
    reason = why_waiting("sft", JOB, pods, events)
    assert reason is not None
    assert reason.name == name
    assert text in reason.text
    assert hint in reason.hint
    assert not reason.is_expected
    assert "\n" not in str(reason)


@pytest.mark.parametrize(
    "pods", [[], [pod()], [pod(state={"waiting": {"reason": "ContainerCreating"}})], [pod("Running", {"running": {}})]]
)
def test_without_a_known_reason_there_is_none(pods: list[Object]) -> None:
    assert why_waiting("sft", JOB, pods, []) is None


def test_waiting_in_a_queue_or_for_a_new_node_is_expected() -> None:
    queued = JOB | {"spec": {"suspend": True}, "metadata": {"labels": {"kueue.x-k8s.io/queue-name": "gpus"}}}
    reasons = [
        why_waiting("sft", queued, [], []),
        why_waiting(
            "sft", JOB, [unscheduled("Insufficient nvidia.com/gpu")], [event("TriggeredScaleUp", "1->2", "Pod")]
        ),
    ]
    assert all(reason and reason.is_expected for reason in reasons)
    assert "gpus" in str(reasons[0])


def test_the_error_of_a_stage_has_its_own_message_and_type() -> None:
    message = '{"stage": "prepare", "reason": "data", "exit_code": 11, "message": "no column `q`"}'
    error = how_it_ended("prepare", JOB, [ended(11, message)])
    assert type(error) is DataError
    assert str(error) == "no column `q`"


def test_without_a_structured_message_the_last_log_line_is_the_message() -> None:
    error = how_it_ended("sft", JOB, [ended(20, "a warning\nsft: error: the bucket answered 503\n")])
    assert type(error) is StoreError
    assert str(error) == "the bucket answered 503"


def test_a_container_out_of_memory_names_its_limit() -> None:
    error = how_it_ended("sft", JOB, [ended(137, reason="OOMKilled")])
    assert type(error) is OutOfMemoryError
    assert "1Gi" in str(error)
    assert "resources.sft.limits.memory" in str(error)


def test_a_stage_stopped_at_its_deadline_names_the_deadline() -> None:
    failed = JOB | {"status": {"conditions": [{"type": "Failed", "status": "True", "reason": "DeadlineExceeded"}]}}
    assert "after 60 s, its deadline" in str(how_it_ended("sft", failed, [ended(30)]))


def test_a_failed_job_without_pods_has_its_controllers_message() -> None:
    failed = JOB | {"status": {"conditions": [{"type": "Failed", "status": "True", "message": "backoff limit"}]}}
    error = how_it_ended("sft", failed, [])
    assert type(error) is LlamaRefineError
    assert "backoff limit" in str(error)


def test_on_several_nodes_the_error_is_that_of_the_node_that_failed_first() -> None:
    message = '{"message": "the loss is nan"}'
    nodes = [on_node(ended(21, "sft: error: lost it"), 0, created=1), on_node(ended(15, message), 1, created=1)]
    for pods in (nodes, nodes[::-1], [on_node(ended(20), 1, created=0), *nodes]):
        error = how_it_ended("sft", JOB, pods)
        assert type(error) is DivergedError
        assert str(error) == "the loss is nan"
    assert type(how_it_ended("sft", JOB, nodes[:1])) is PeerLostError


def test_a_pending_pod_has_a_reason_while_another_node_runs() -> None:
    waits = on_node(unscheduled("0/1 nodes are available: 1 Insufficient nvidia.com/gpu."), 0, created=0)
    reason = why_waiting("sft", JOB, [waits, on_node(pod("Running"), 1, created=1)], [])
    assert reason is not None
    assert reason.name == "Unschedulable"


def test_log_lines_of_all_nodes_but_the_first_have_a_prefix() -> None:
    assert with_node_prefix(on_node(pod(), 0), "a line") == with_node_prefix(pod(), "a line") == "a line"
    assert with_node_prefix(on_node(pod(), 1), "a line") == "node 1: a line"


def on_node(pod: Object, index: int, created: int = 0) -> Object:
    """Return a pod as the one of a node in an Indexed Job."""
    metadata = pod["metadata"] | {"labels": {"batch.kubernetes.io/job-completion-index": str(index)}}
    return pod | {"metadata": metadata | {"creationTimestamp": f"2026-11-24T00:00:0{created}Z"}}


def test_why_a_pod_was_replaced() -> None:
    assert why_replaced(ended(30)) == "its pod was stopped"
    assert why_replaced(ended(20)) == "its pod ended with exit code 20 (store)"
    drained = pod("Failed", conditions=({"type": "DisruptionTarget", "status": "True"},))
    assert why_replaced(drained) == "its pod was evicted from its node"
