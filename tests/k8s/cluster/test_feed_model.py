"""A feed through random histories of a Job and its pods: in the end it shows what a fresh list shows."""

from collections.abc import Callable, Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llamarefine_jobs.contract.retry import RetryPolicy
from llamarefine_k8s.cluster import api_watch, job_feed
from llamarefine_k8s.cluster.api import Cluster
from llamarefine_k8s.cluster.job_feed import JobFeed
from tests.k8s.api_server import ApiServer, Fault, eventually, served, use_kubeconfig
from tests.k8s.running_stage import DELETED, JOB, RUNNING, SUCCEEDED, put_pod

WATCHES = r"GET .*watch=true"
PODS = ("one", "two", "three")
PENDING = {"phase": "Pending"}
FAILED = {"phase": "Failed", "containerStatuses": [{"state": {"terminated": {"exitCode": 30}}}]}


@pytest.fixture(scope="module")
def fast_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ApiServer, Cluster]]:
    """An API server whose watches end, and are replaced if they are silent, after fractions of a second."""
    with served() as server, pytest.MonkeyPatch.context() as monkeypatch:
        use_kubeconfig(server.kubeconfig(tmp_path_factory.mktemp("feed")), monkeypatch)
        monkeypatch.setattr(api_watch, "WATCH_S", 0.2)
        monkeypatch.setattr(api_watch, "SILENCE_S", 0.2)
        monkeypatch.setattr(api_watch, "_PAUSES_S", (0.02, 0.05))
        monkeypatch.setattr(job_feed, "_POD_END_DELAY_S", 0.3)
        monkeypatch.setattr(job_feed, "_DELETION_DELAY_S", 0.3)
        monkeypatch.setattr(job_feed, "_LOST_S", 0.3)
        monkeypatch.setattr(job_feed, "_LOG_END_DELAY_S", 0.3)
        yield server, Cluster(retry_policy=RetryPolicy(20))


def change_job(server: ApiServer) -> None:
    server.change("jobs", JOB, {"status": {"active": 1}})


def begin_to_delete_job(server: ApiServer) -> None:
    server.change("jobs", JOB, {"metadata": DELETED})


def delete_job(server: ApiServer) -> None:
    server.remove("jobs", JOB)


def orphan(server: ApiServer) -> None:
    """Delete the Job and let its pods run on."""
    for pod in PODS:
        server.change("pods", pod, {"metadata": {"ownerReferences": []}})
    server.remove("jobs", JOB)


def expire(server: ApiServer) -> None:
    """Answer 410 to the next watch of each kind and forget what it would have shown."""
    server.history.clear()
    server.expired = server.version


def unseen(change: Callable[[ApiServer], None]) -> Callable[[ApiServer], None]:
    """Return a change that no watch reports."""

    def apply(server: ApiServer) -> None:
        reported = len(server.history)
        change(server)
        del server.history[reported:]

    apply.__name__ = f"unseen {change.__name__}"
    return apply


def fall_silent(server: ApiServer) -> None:
    server.faults.append(Fault(WATCHES, hangs=True))


def break_off(server: ApiServer) -> None:
    server.faults.append(Fault(WATCHES, cut_after=50))


def refuse(server: ApiServer) -> None:
    server.faults.append(Fault(WATCHES, status=503))


def on_pod(pod: str, change: str) -> Callable[[ApiServer], None]:
    """Return a change of a pod: its name, or a status that it gets; the Job's controller creates a missing pod."""

    def apply(server: ApiServer) -> None:
        if ("pods", pod) not in server.objects:
            if ("jobs", JOB) in server.objects:
                put_pod(server, pod, PENDING)
        elif change == "delete":
            server.remove("pods", pod)
        elif change == "begin to delete":
            server.change("pods", pod, {"metadata": DELETED})
        else:
            server.change("pods", pod, {"status": {"run": RUNNING, "succeed": SUCCEEDED, "fail": FAILED}[change]})

    apply.__name__ = f"{change} {pod}"
    return apply


POD_CHANGES = [
    on_pod(pod, change) for pod in PODS for change in ("run", "succeed", "fail", "begin to delete", "delete")
]
JOB_CHANGES = [change_job, begin_to_delete_job, delete_job, orphan]
FAULTS = [expire, fall_silent, break_off, refuse]
CHANGES = st.one_of(st.sampled_from(POD_CHANGES), st.sampled_from(POD_CHANGES), st.sampled_from(JOB_CHANGES))
STEPS = st.one_of(CHANGES, CHANGES.map(unseen), st.sampled_from(FAULTS))


@given(st.lists(STEPS, max_size=12), st.integers(0, 3), st.booleans())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_feed_ends_with_the_picture_of_a_fresh_list(
    fast_server: tuple[ApiServer, Cluster],
    steps: list[Callable[[ApiServer], None]],
    read_every: int,
    is_instant: bool,
) -> None:
    """With `is_instant`, the watches see the steps only once all are done, so that some states are never shown."""
    server, cluster = fast_server
    with server.changed:
        server.objects.clear()
        server.faults.clear()
        server.expired = 0
        job = server.put("jobs", {"metadata": {"name": JOB}, "spec": {}})

    def listed_pods() -> dict[str, str]:
        owned = (item for (kind, _), item in server.objects.items() if kind == "pods")
        return {
            pod["metadata"]["uid"]: pod["status"]["phase"] for pod in owned if pod["metadata"].get("ownerReferences")
        }

    def shows_the_list() -> bool:
        list(feed.lines(0.01))
        listed_job = server.objects.get(("jobs", JOB))
        is_removed = listed_job is None or "deletionTimestamp" in listed_job["metadata"]
        shown = {pod["metadata"]["uid"]: pod["status"]["phase"] for pod in feed.existing_pods}
        return (shown, feed.is_removed) == (listed_pods(), is_removed)

    with JobFeed(cluster, job, "stage") as feed:
        if is_instant:
            with server.changed:
                for step in steps:
                    step(server)
        else:
            for number, step in enumerate(steps):
                with server.changed:
                    step(server)
                if read_every and number % read_every == 0:
                    list(feed.lines(0.02))
        eventually(shows_the_list)
        for pod in PODS:
            server.ended.add(pod)
        if feed.is_removed:
            eventually(lambda: list(feed.lines(0.01)) or feed.is_over)
