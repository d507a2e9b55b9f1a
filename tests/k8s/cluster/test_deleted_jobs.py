"""A stage's Job or pod that somebody deletes: the stage ends within seconds, or is made again."""

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from llamarefine_jobs.contract.errors import LlamaRefineError, PreemptedError
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.retry import RetryPolicy
from llamarefine_k8s.cluster import api_watch, executor, job_feed, run_objects, run_status, submission
from llamarefine_k8s.cluster.api import Cluster
from llamarefine_k8s.settings import Settings
from tests.k8s import control_plane
from tests.k8s.api_server import ApiServer, Object, eventually, use_kubeconfig
from tests.k8s.running_stage import DELETED, JOB, RUN, RUNNING, RunningStage, finish, put_pod


@pytest.fixture
def cluster(server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    use_kubeconfig(server.kubeconfig(tmp_path), monkeypatch)
    monkeypatch.setattr(api_watch, "WATCH_S", 1)
    monkeypatch.setattr(api_watch, "SILENCE_S", 0.5)
    monkeypatch.setattr(job_feed, "_LOG_END_DELAY_S", 0.5)
    return Cluster(retry_policy=RetryPolicy(20))


@pytest.fixture
def running(server: ApiServer, cluster: Cluster, recipe: Callable[..., Recipe]) -> RunningStage:
    """A stage whose pod `one` has printed a line."""
    stage = RunningStage(cluster, recipe())
    start_pod(server, stage)
    return stage


def start_pod(server: ApiServer, stage: RunningStage) -> None:
    eventually(lambda: ("jobs", JOB) in server.objects)
    put_pod(server, "one", RUNNING)
    server.write_log("one", "step 1")
    eventually(lambda: "step 1" in stage.lines)


def delete_in_foreground(server: ApiServer, job: str = JOB) -> None:
    """Delete a Job as `kubectl delete --cascade=foreground`: the Job goes after its pods."""
    server.change("jobs", job, {"metadata": DELETED | {"finalizers": ["foregroundDeletion"]}})
    server.change("pods", "one", {"metadata": DELETED})
    server.remove("pods", "one")
    server.remove("jobs", job)


def delete_in_background(server: ApiServer) -> None:
    server.remove("jobs", JOB)  # and then the pods that it owns


def delete_as_orphan(server: ApiServer) -> None:
    """Delete a Job as `kubectl delete --cascade=orphan`: its pod runs on and has no owner."""
    server.change("pods", "one", {"metadata": {"ownerReferences": []}})
    server.remove("jobs", JOB)


def delete_unseen(server: ApiServer) -> None:
    """Delete Job and pod, but let no watch say so."""
    with server.changed:
        delete_in_foreground(server)
        server.history.clear()


DELETIONS = (delete_in_foreground, delete_in_background, delete_as_orphan, delete_unseen)


def delete_and_wait_for_next(server: ApiServer, delete: Callable[[ApiServer], None]) -> None:
    """Delete the stage's Job and wait until the driver has created another one."""
    first = server.objects["jobs", JOB]["metadata"]["uid"]
    delete(server)
    eventually(lambda: server.objects.get(("jobs", JOB), {"metadata": {"uid": first}})["metadata"]["uid"] != first)


@pytest.mark.parametrize("delete", DELETIONS)
def test_a_deleted_job_is_created_again_and_the_stage_goes_on(
    server: ApiServer, running: RunningStage, delete: Callable[[ApiServer], None]
) -> None:
    delete_and_wait_for_next(server, delete)
    assert ("pods", "one") not in server.objects, "two pods would train at the same time"
    finish(server, running)
    assert running.error is None
    assert running.lines.count(f"sft: its Job {JOB} was deleted; it is created again") == 1


def test_a_job_whose_deletion_never_ends_is_reported(
    server: ApiServer, running: RunningStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finalizer that nobody removes keeps the Job."""
    monkeypatch.setattr(run_objects.wait_until, "__defaults__", (0.3,))
    monkeypatch.setattr(Cluster, "delete", lambda *arguments, **more: None)
    server.change("jobs", JOB, {"metadata": DELETED | {"finalizers": ["example.com/keep"]}})
    server.remove("pods", "one")
    running.thread.join(20)
    assert f"the Job {JOB} was not deleted within 0.3 s" in str(running.error)
    (status,) = run_status.stage_statuses(Cluster(), RUN)
    assert (status.state, status.reason) == ("waits", "its Job is being deleted")


def test_a_pod_of_a_deleted_job_that_nobody_deletes_is_killed(
    server: ApiServer, running: RunningStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The garbage collector does not run."""
    monkeypatch.setattr(job_feed, "_DELETION_DELAY_S", 0.3)
    monkeypatch.setattr(run_objects, "_LATE_S", -30)
    with server.changed:
        (pod,) = (item for (kind, _), item in server.objects.items() if kind == "pods")
        server.remove("jobs", JOB)
        server.put("pods", pod)
    eventually(lambda: ("pods", "one") not in server.objects)
    eventually(lambda: ("jobs", JOB) in server.objects)
    finish(server, running)
    assert running.error is None


def test_a_job_that_is_deleted_with_the_runs_owner_is_not_created_again(
    server: ApiServer, running: RunningStage
) -> None:
    server.remove("configmaps", RUN)  # as `cancel` and uninstalling the chart do
    running.thread.join(20)
    assert isinstance(running.error, PreemptedError)
    assert str(running.error) == f"its Job {JOB} was deleted"
    assert ("jobs", JOB) not in server.objects


def test_a_job_that_is_deleted_again_and_again_ends_the_stage(server: ApiServer, running: RunningStage) -> None:
    for _ in range(executor._MAX_REMADE_JOBS):
        delete_and_wait_for_next(server, delete_in_background)
    server.remove("jobs", JOB)
    running.thread.join(20)
    assert isinstance(running.error, PreemptedError)


def test_a_second_driver_does_not_touch_the_pods_of_the_first_ones_new_job(
    server: ApiServer, running: RunningStage, cluster: Cluster
) -> None:
    objects = run_objects.StageObjects(cluster, Settings(store="s3://models/llama", gpu_resource=None))
    objects._end_leftover_pods(running.task, JOB, lambda: False)
    assert ("pods", "one") in server.objects


def test_a_cancel_ends_the_wait_for_a_leftover_pod(server: ApiServer, running: RunningStage, cluster: Cluster) -> None:
    objects = run_objects.StageObjects(cluster, Settings(store="s3://models/llama", gpu_resource=None))
    with pytest.raises(PreemptedError, match="sft was cancelled"):
        objects._end_leftover_pods(running.task, JOB, lambda: True)


def test_a_stage_whose_pod_is_gone_and_not_replaced_fails_after_the_start_timeout(
    server: ApiServer, cluster: Cluster, recipe: Callable[..., Recipe]
) -> None:
    stage = RunningStage(cluster, recipe(), start_timeout_s=1)
    start_pod(server, stage)
    server.remove("pods", "one")
    stage.thread.join(20)
    assert str(stage.error) == "sft could not start within 1 s: its pod does not say why"


@pytest.mark.parametrize("delete", [delete_in_foreground, delete_unseen])
def test_following_a_run_ends_when_its_namespace_goes(
    server: ApiServer, cluster: Cluster, delete: Callable[[ApiServer], None]
) -> None:
    job = server.put("jobs", {"metadata": {"name": JOB}, "spec": {}})
    put_pod(server, "one", RUNNING)
    server.write_log("one", "prepare: runs")
    given = Settings(store="s3://models/llama", gpu_resource=None)
    reported: list[str] = []
    errors: list[LlamaRefineError] = []

    def follow() -> None:
        try:
            submission.follow(cluster, job, given, reported.append)
        except LlamaRefineError as error:
            errors.append(error)

    following = threading.Thread(target=follow, daemon=True)
    following.start()
    eventually(lambda: reported)
    delete(server)
    following.join(20)
    assert [str(error) for error in errors] == [f"the run was removed from the cluster: there is no Job {JOB}"]


def test_a_job_that_vanishes_before_its_first_list_is_over(server: ApiServer, cluster: Cluster) -> None:
    job = server.put("jobs", {"metadata": {"name": JOB}, "spec": {}})
    server.remove("jobs", JOB)
    server.put("jobs", {"metadata": {"name": JOB}, "spec": {}})  # a later Job of the same name
    with job_feed.JobFeed(cluster, job, "stage") as feed:
        eventually(lambda: list(feed.lines(0.1)) or feed.is_over)
        assert feed.is_removed


def test_a_bug_in_a_thread_of_the_feed_is_raised(
    server: ApiServer, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def watch(*arguments: object, **more: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Cluster, "watch", watch)
    job = server.put("jobs", {"metadata": {"name": JOB}, "spec": {}})
    with job_feed.JobFeed(cluster, job, "stage") as feed, pytest.raises(ZeroDivisionError):
        eventually(lambda: list(feed.lines(1)))


def test_the_rest_of_a_log_is_awaited_for_a_limited_time(
    running: RunningStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor, "_FINISH_S", 0.3)
    running.executor.finish(running.task, running.lines.append)
    assert running.thread.is_alive(), "neither Job nor pod has ended"


@pytest.mark.skipif(not all(map(control_plane.find, control_plane.PROGRAMS)), reason="kube-apiserver not found")
def test_a_real_api_server_shows_a_job_deleted_in_the_foreground(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test is the garbage collector: this API server has no controllers."""
    with control_plane.serve() as kubeconfig:
        use_kubeconfig(kubeconfig, monkeypatch)
        cluster = Cluster()
        pod: Object = {"restartPolicy": "Never", "containers": [{"name": "stage", "image": "none"}]}
        manifest: Object = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "one"}}
        job = cluster.create(manifest | {"spec": {"template": {"spec": pod}}})
        assert job
        owner = {"apiVersion": "batch/v1", "kind": "Job", "name": "one", "uid": job["metadata"]["uid"]}
        metadata = {"name": "one", "labels": {job_feed.JOB_NAME: "one"}, "ownerReferences": [owner]}
        cluster.create({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": pod})
        with job_feed.JobFeed(cluster, job, "stage") as feed:
            eventually(lambda: list(feed.lines(0.1)) or feed.pods)
            cluster._requests.send("DELETE", "Job", "one", {"propagationPolicy": "Foreground"})
            eventually(lambda: list(feed.lines(0.1)) or feed.is_removed)
            assert not feed.is_over
            cluster.delete("Pod", "one", grace_s=0)
            eventually(lambda: list(feed.lines(0.1)) or feed.is_over)
        assert cluster.get("Job", "one"), "the garbage collector would delete it now"
        cluster.delete("Job", "one")  # in the background, as before the stage is made again
        assert cluster.get("Job", "one") is None
