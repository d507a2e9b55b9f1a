"""A lost node: its pods are abandoned, and another pod continues the stage."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.retry import RetryPolicy
from llamarefine_k8s.cluster import job_feed, run_status, submission
from llamarefine_k8s.cluster.api import Cluster
from llamarefine_k8s.settings import Settings
from tests.k8s import control_plane
from tests.k8s.api_server import ApiServer, Fault, Object, eventually, use_kubeconfig
from tests.k8s.running_stage import DELETED, JOB, RUN, RUNNING, SUCCEEDED, RunningStage, finish, put_pod


@pytest.fixture
def cluster(server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    use_kubeconfig(server.kubeconfig(tmp_path), monkeypatch)
    monkeypatch.setattr(job_feed, "_LOST_S", 0.3)
    return Cluster(retry_policy=RetryPolicy(20))


@pytest.fixture
def running(server: ApiServer, cluster: Cluster, recipe: Callable[..., Recipe]) -> RunningStage:
    stage = RunningStage(cluster, recipe())
    eventually(lambda: ("jobs", JOB) in server.objects)
    return stage


def test_a_pod_that_outlives_its_grace_period_is_declared_failed_and_then_removed(
    server: ApiServer, running: RunningStage
) -> None:
    put_pod(server, "one", RUNNING, **DELETED)
    server.write_log("one", "step 1")
    eventually(lambda: ("pods", "one") not in server.objects)
    changes = [request for request in server.requests if "/pods/one" in request and not request.startswith("GET")]
    assert [request.split("?")[0].replace("/api/v1/namespaces/default", "") for request in changes] == [
        "PATCH /pods/one/status",
        "DELETE /pods/one",
    ]
    finish(server, running)
    assert running.error is None
    assert running.lines.count("sft: the node gone does not answer; its pod one is abandoned") == 1
    assert "step 1" in running.lines


@pytest.mark.parametrize(("status", "metadata"), [(RUNNING, {}), (SUCCEEDED, DELETED)])
def test_a_pod_that_was_not_deleted_or_whose_end_is_known_is_not_abandoned(
    server: ApiServer, cluster: Cluster, running: RunningStage, status: Object, metadata: Object
) -> None:
    put_pod(server, "one", status, **metadata)
    with job_feed.JobFeed(cluster, server.objects["jobs", JOB], "stage") as feed:
        eventually(lambda: feed.pods or list(feed.lines(0.1)))
        feed._deleting_since_s = dict.fromkeys(feed._deleting_since_s, -1e9)  # long ago
        assert feed.lost_pods() == []


def test_a_role_that_forbids_abandoning_is_reported_and_the_stage_continues_once_the_pod_is_deleted(
    server: ApiServer, running: RunningStage
) -> None:
    server.faults.append(Fault(r"PATCH .*/pods/one/status", status=403, times=100))
    put_pod(server, "one", RUNNING, **DELETED)
    eventually(lambda: any("cannot be abandoned" in line for line in running.lines))
    server.remove("pods", "one")
    finish(server, running)
    assert running.error is None


def test_following_a_driver_on_a_lost_node_abandons_its_pod(server: ApiServer, cluster: Cluster) -> None:
    """Repeating `submit` does it: without it the Job would never start another driver."""
    job = server.put("jobs", {"metadata": {"name": JOB}, "spec": {}})
    put_pod(server, "one", RUNNING, **DELETED)
    reported: list[str] = []
    given = Settings(store="s3://models/llama", gpu_resource=None)
    following = threading.Thread(target=submission.follow, args=(cluster, job, given, reported.append), daemon=True)
    following.start()
    eventually(lambda: ("pods", "one") not in server.objects)
    put_pod(server, "two", SUCCEEDED, creationTimestamp="2099-01-01T00:00:00Z")
    server.ended |= {"one", "two"}
    server.change("jobs", JOB, {"status": {"conditions": [{"type": "Complete", "status": "True"}]}})
    following.join(60)
    assert not following.is_alive()
    assert reported == ["the node gone does not answer; its pod one is abandoned"]


def test_status_names_a_node_that_does_not_answer(server: ApiServer, cluster: Cluster, running: RunningStage) -> None:
    unready = RUNNING | {"conditions": [{"type": "Ready", "status": "False"}]}
    put_pod(server, "one", unready)
    (found,) = run_status.stage_statuses(cluster, RUN)
    assert found.state == "waits"
    assert "the node gone does not answer" in str(found.reason)


@pytest.mark.skipif(not all(map(control_plane.find, control_plane.PROGRAMS)), reason="kube-apiserver not found")
def test_a_real_api_server_abandons_a_pod_only_if_it_is_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    with control_plane.serve() as kubeconfig:
        use_kubeconfig(kubeconfig, monkeypatch)
        cluster = Cluster()
        pod: Object = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "one", "finalizers": ["batch.kubernetes.io/job-tracking"]},
            "spec": {"nodeName": "gone", "containers": [{"name": "stage", "image": "none"}]},
        }
        created = cluster.create(pod)
        assert created
        cluster.delete("Pod", "one")
        cluster.abandon(created)
        deleted = cluster.get("Pod", "one")
        assert deleted
        assert deleted["status"]["phase"] == "Pending", "it changed since it was read"
        cluster.abandon(deleted)
        abandoned = cluster.get("Pod", "one")
        assert abandoned
        assert abandoned["status"]["phase"] == "Failed"
        assert abandoned["metadata"]["deletionGracePeriodSeconds"] == 0
