"""Why something does not start, from what the API server says, as it said it on a real cluster."""

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
    ("pods", "events", "word", "said", "to_do"),
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
def test_what_keeps_a_stage_from_running_is_named_with_what_to_do(
    pods: list[Object], events: list[Object], word: str, said: str, to_do: str
) -> None:
    reason = why_waiting("sft", JOB, pods, events)
    assert reason is not None
    assert reason.name == word
    assert said in reason.text
    assert to_do in reason.hint
    assert not reason.is_expected
    assert "\n" not in str(reason)


@pytest.mark.parametrize(
    "pods", [[], [pod()], [pod(state={"waiting": {"reason": "ContainerCreating"}})], [pod("Running", {"running": {}})]]
)
def test_nothing_is_made_up_where_nothing_is_wrong(pods: list[Object]) -> None:
    assert why_waiting("sft", JOB, pods, []) is None


def test_a_queue_and_a_node_that_comes_are_waited_for() -> None:
    held = JOB | {"spec": {"suspend": True}, "metadata": {"labels": {"kueue.x-k8s.io/queue-name": "gpus"}}}
    reasons = [
        why_waiting("sft", held, [], []),
        why_waiting(
            "sft", JOB, [unscheduled("Insufficient nvidia.com/gpu")], [event("TriggeredScaleUp", "1->2", "Pod")]
        ),
    ]
    assert all(reason and reason.is_expected for reason in reasons)
    assert "gpus" in str(reasons[0])


def test_a_stages_own_words_and_kind_come_back() -> None:
    words = '{"stage": "prepare", "reason": "data", "exit_code": 11, "message": "no column `q`"}'
    error = how_it_ended("prepare", JOB, [ended(11, words)])
    assert type(error) is DataError
    assert str(error) == "no column `q`"


def test_where_a_stage_left_only_its_log_the_last_line_is_taken() -> None:
    error = how_it_ended("sft", JOB, [ended(20, "a warning\nsft: error: the bucket answered 503\n")])
    assert type(error) is StoreError
    assert str(error) == "the bucket answered 503"


def test_a_container_out_of_memory_names_its_limit() -> None:
    error = how_it_ended("sft", JOB, [ended(137, reason="OOMKilled")])
    assert type(error) is OutOfMemoryError
    assert "1Gi" in str(error)
    assert "resources.sft.limits.memory" in str(error)


def test_a_deadline_is_named_as_such() -> None:
    failed = JOB | {"status": {"conditions": [{"type": "Failed", "status": "True", "reason": "DeadlineExceeded"}]}}
    assert "after 60 s, its deadline" in str(how_it_ended("sft", failed, [ended(30)]))


def test_a_job_without_a_pod_says_what_its_controller_said() -> None:
    failed = JOB | {"status": {"conditions": [{"type": "Failed", "status": "True", "message": "backoff limit"}]}}
    error = how_it_ended("sft", failed, [])
    assert type(error) is LlamaRefineError
    assert "backoff limit" in str(error)


def test_of_several_nodes_the_one_that_failed_by_itself_tells_why() -> None:
    words = '{"message": "the loss is nan"}'
    nodes = [of(ended(21, "sft: error: lost it"), 0, made=1), of(ended(15, words), 1, made=1)]
    for pods in (nodes, nodes[::-1], [of(ended(20), 1, made=0), *nodes]):
        error = how_it_ended("sft", JOB, pods)
        assert type(error) is DivergedError
        assert str(error) == "the loss is nan"
    assert type(how_it_ended("sft", JOB, nodes[:1])) is PeerLostError


def test_a_node_that_cannot_start_is_told_while_another_runs() -> None:
    waits = of(unscheduled("0/1 nodes are available: 1 Insufficient nvidia.com/gpu."), 0, made=0)
    reason = why_waiting("sft", JOB, [waits, of(pod("Running"), 1, made=1)], [])
    assert reason is not None
    assert reason.name == "Unschedulable"


def test_lines_of_other_nodes_than_the_first_name_it() -> None:
    assert with_node_prefix(of(pod(), 0), "a line") == with_node_prefix(pod(), "a line") == "a line"
    assert with_node_prefix(of(pod(), 1), "a line") == "node 1: a line"


def of(pod: Object, index: int, made: int = 0) -> Object:
    """A pod as one of an Indexed Job."""
    metadata = pod["metadata"] | {"labels": {"batch.kubernetes.io/job-completion-index": str(index)}}
    return pod | {"metadata": metadata | {"creationTimestamp": f"2026-11-24T00:00:0{made}Z"}}


def test_a_pod_that_was_replaced_is_explained() -> None:
    assert why_replaced(ended(30)) == "its pod was stopped"
    assert why_replaced(ended(20)) == "its pod ended with exit code 20 (store)"
    drained = pod("Failed", conditions=({"type": "DisruptionTarget", "status": "True"},))
    assert why_replaced(drained) == "its pod was evicted from its node"
