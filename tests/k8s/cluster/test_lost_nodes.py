"""A node that is gone says nothing any more: its pods are given up, and another one goes on."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.retry import RetryPolicy
from llamarefine_k8s.cluster import job_feed, run_status, submission
from llamarefine_k8s.cluster.api import Cluster
from llamarefine_k8s.cluster.executor import ClusterExecutor
from llamarefine_k8s.cluster.manifests import JOB_NAME
from llamarefine_k8s.runs.pipeline import Task
from llamarefine_k8s.settings import Settings
from tests.k8s import control_plane
from tests.k8s.api_server import ApiServer, Fault, eventually, use

Object = dict[str, Any]
RUN, JOB = "small-00000000", "small-00000000-sft"
TOLD_TO_STOP = {"deletionTimestamp": "2026-11-25T00:00:00Z", "deletionGracePeriodSeconds": 0}
RUNNING = {"phase": "Running", "containerStatuses": [{"state": {"running": {}}}]}
SUCCEEDED = {"phase": "Succeeded", "containerStatuses": [{"state": {"terminated": {"exitCode": 0}}}]}


@pytest.fixture
def cluster(server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    use(server.kubeconfig(tmp_path), monkeypatch)
    monkeypatch.setattr(job_feed, "_LOST_S", 0.3)
    return Cluster(retry_policy=RetryPolicy(20))


class Running:
    """A stage that is executed in a thread of its own."""

    def __init__(self, cluster: Cluster, recipe: Recipe) -> None:
        self.lines: list[str] = []
        self.error: BaseException | None = None
        self._task = Task(RUN, "sft", "0" * 64, recipe, "s3://models/llama")
        self._executor = ClusterExecutor(cluster, Settings(store="s3://models/llama", gpu_resource=None))
        self.thread = threading.Thread(target=self._execute, daemon=True)
        self.thread.start()

    def _execute(self) -> None:
        try:
            self._executor.execute(self._task, self.lines.append)
        except BaseException as error:
            self.error = error


@pytest.fixture
def running(server: ApiServer, cluster: Cluster, recipe: Callable[..., Recipe]) -> Running:
    made = Running(cluster, recipe())
    eventually(lambda: ("jobs", JOB) in server.objects)
    return made


def put_pod(server: ApiServer, name: str, status: Object, **metadata: Any) -> None:
    uid = server.objects["jobs", JOB]["metadata"]["uid"]
    metadata |= {
        "name": name,
        "labels": {JOB_NAME: JOB},
        "ownerReferences": [{"kind": "Job", "name": JOB, "uid": uid}],
    }
    server.put("pods", {"metadata": metadata, "spec": {"nodeName": "gone"}, "status": status})


def finish(server: ApiServer, running: Running) -> None:
    """What the Job's controller and another node do."""
    put_pod(server, "two", SUCCEEDED, creationTimestamp="2099-01-01T00:00:00Z")
    server.ended |= {"one", "two"}
    server.change("jobs", JOB, {"status": {"conditions": [{"type": "Complete", "status": "True"}]}})
    running.thread.join(60)
    assert not running.thread.is_alive()


def test_a_pod_that_outlives_its_grace_period_is_declared_failed_and_then_removed(
    server: ApiServer, running: Running
) -> None:
    put_pod(server, "one", RUNNING, **TOLD_TO_STOP)
    server.write_log("one", "step 1")
    eventually(lambda: ("pods", "one") not in server.objects)
    asked = [request for request in server.requests if "/pods/one" in request and not request.startswith("GET")]
    assert [request.split("?")[0].replace("/api/v1/namespaces/default", "") for request in asked] == [
        "PATCH /pods/one/status",
        "DELETE /pods/one",
    ]
    finish(server, running)
    assert running.error is None
    assert running.lines.count("sft: the node gone does not answer; its pod one is abandoned") == 1
    assert "step 1" in running.lines


@pytest.mark.parametrize(("status", "metadata"), [(RUNNING, {}), (SUCCEEDED, TOLD_TO_STOP)])
def test_a_pod_that_nobody_told_to_stop_or_that_said_how_it_ended_is_left_alone(
    server: ApiServer, cluster: Cluster, running: Running, status: Object, metadata: Object
) -> None:
    put_pod(server, "one", status, **metadata)
    with job_feed.JobFeed(cluster, server.objects["jobs", JOB], "stage") as its_feed:
        eventually(lambda: its_feed.pods or list(its_feed.lines(0.1)))
        its_feed._deleting_since_s = dict.fromkeys(its_feed._deleting_since_s, -1e9)  # long ago
        assert its_feed.lost_pods() == []


def test_a_role_that_forbids_it_is_named_and_the_stage_goes_on_once_the_pod_is_gone(
    server: ApiServer, running: Running
) -> None:
    server.faults.append(Fault(r"PATCH .*/pods/one/status", status=403, times=100))
    put_pod(server, "one", RUNNING, **TOLD_TO_STOP)
    eventually(lambda: any("cannot be abandoned" in line for line in running.lines))
    server.remove("pods", "one")
    finish(server, running)
    assert running.error is None


def test_whoever_follows_a_driver_whose_node_is_gone_gives_its_pod_up(server: ApiServer, cluster: Cluster) -> None:
    """As `submit` does again: no other driver would come."""
    job = server.put("jobs", {"metadata": {"name": JOB}, "spec": {}})
    put_pod(server, "one", RUNNING, **TOLD_TO_STOP)
    said: list[str] = []
    given = Settings(store="s3://models/llama", gpu_resource=None)
    following = threading.Thread(target=submission.follow, args=(cluster, job, given, said.append), daemon=True)
    following.start()
    eventually(lambda: ("pods", "one") not in server.objects)
    put_pod(server, "two", SUCCEEDED, creationTimestamp="2099-01-01T00:00:00Z")
    server.ended |= {"one", "two"}
    server.change("jobs", JOB, {"status": {"conditions": [{"type": "Complete", "status": "True"}]}})
    following.join(60)
    assert not following.is_alive()
    assert said == ["the node gone does not answer; its pod one is abandoned"]


def test_status_tells_of_a_node_that_does_not_answer(server: ApiServer, cluster: Cluster, running: Running) -> None:
    unready = RUNNING | {"conditions": [{"type": "Ready", "status": "False"}]}
    put_pod(server, "one", unready)
    server.change("pods", "one", {"metadata": {"labels": {"llamarefine/run": RUN}}})
    (found,) = run_status.stage_statuses(cluster, RUN)
    assert found.state == "waits"
    assert "the node gone does not answer" in str(found.reason)


@pytest.mark.skipif(not all(map(control_plane.find, control_plane.PROGRAMS)), reason="no kube-apiserver at hand")
def test_a_real_api_server_lets_a_pod_be_abandoned_only_as_it_was_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    with control_plane.serve() as kubeconfig:
        use(kubeconfig, monkeypatch)
        cluster = Cluster()
        pod: Object = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "one", "finalizers": ["batch.kubernetes.io/job-tracking"]},
            "spec": {"nodeName": "gone", "containers": [{"name": "stage", "image": "none"}]},
        }
        seen = cluster.create(pod)
        assert seen
        cluster.delete("Pod", "one")
        cluster.abandon(seen)
        told = cluster.get("Pod", "one")
        assert told
        assert told["status"]["phase"] == "Pending", "it changed since it was seen"
        cluster.abandon(told)
        given_up = cluster.get("Pod", "one")
        assert given_up
        assert given_up["status"]["phase"] == "Failed"
        assert given_up["metadata"]["deletionGracePeriodSeconds"] == 0
