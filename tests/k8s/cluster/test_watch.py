"""A watch, and every other request, through failures of the API server: no change is lost, requests stay few."""

import copy
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llamarefine_jobs.contract.errors import AccessError, StoreError
from llamarefine_jobs.contract.retry import RetryPolicy
from llamarefine_k8s.cluster import api_requests, api_watch
from llamarefine_k8s.cluster.api import Cluster
from tests.k8s.api_server import ApiServer, Fault, eventually, use_kubeconfig

WATCHES = r"GET .*watch=true"


@pytest.fixture
def cluster(server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    use_kubeconfig(server.kubeconfig(tmp_path), monkeypatch)
    monkeypatch.setattr(api_watch, "_PAUSES_S", (0.02, 0.05, 0.1))
    monkeypatch.setattr(api_requests, "_STARTING_PAUSE_S", 0.1)
    return Cluster(retry_policy=RetryPolicy(20))


class Watcher:
    """Watches Jobs in a background thread and keeps the state that their changes add up to."""

    def __init__(self, cluster: Cluster) -> None:
        self.state: dict[str, str] = {}
        self.changes = 0
        self.error: Exception | None = None
        self.closed = threading.Event()
        threading.Thread(target=self._watch, args=(cluster,), daemon=True).start()

    def _watch(self, cluster: Cluster) -> None:
        try:
            for change, item in cluster.watch("Job", stopped=self.closed.is_set):
                self.changes += 1
                name = item["metadata"]["name"]
                if change == "DELETED":
                    self.state.pop(name, None)
                else:
                    self.state[name] = item["status"].get("note", "")
        except Exception as error:
            self.error = error


@pytest.fixture
def watcher(cluster: Cluster) -> Iterator[Watcher]:
    watcher = Watcher(cluster)
    yield watcher
    watcher.closed.set()


def job(name: str, note: str = "") -> dict[str, Any]:
    return {"metadata": {"name": name}, "status": {"note": note}}


def change_everything(server: ApiServer, rounds: int = 12) -> None:
    """Create, change and remove Jobs, over a fraction of a second."""
    for number in range(rounds):
        server.put("jobs", job(f"job-{number}"))
        server.put("jobs", job(f"job-{number % 3}", f"changed {number}"))
        if number > 5:
            server.remove("jobs", f"job-{number - 1}")
        time.sleep(0.02)


def jobs_of(server: ApiServer) -> dict[str, str]:
    return {name: item["status"]["note"] for (kind, name), item in server.objects.items() if kind == "jobs"}


FAULTS: dict[str, list[Fault]] = {
    "ends": [Fault(WATCHES, cut_after=2000, is_clean=True, times=5)],
    "ends before its first line": [Fault(WATCHES, cut_after=0, is_clean=True, times=5)],
    "closes in the middle of a line": [Fault(WATCHES, cut_after=cut, times=1) for cut in (1, 77, 333, 1000, 1001)],
    "ends cleanly in the middle of a line": [Fault(WATCHES, cut_after=333, is_clean=True, times=5)],
    "410 as a status": [Fault(WATCHES, status=410, times=4)],
    "429 with Retry-After": [Fault("GET", status=429, headers={"Retry-After": "1"}, times=2)],
    "500 for a while": [Fault("GET", status=500, times=4)],
    "503 for a while": [Fault("GET", status=503, times=4)],
    "401 once": [Fault("GET", status=401, times=1)],
    "401 while the server starts": [Fault("GET", status=401, times=5)],
    "a list that breaks off": [Fault(WATCHES, status=410), Fault(r"jobs\?*$", cut_after=40, times=3)],
    "a list that is not JSON": [Fault(WATCHES, status=410), Fault(r"jobs\?*$", cut_after=40, is_clean=True, times=3)],
}


@pytest.mark.parametrize("name", FAULTS)
def test_the_last_state_is_seen_after_every_kind_of_fault(server: ApiServer, watcher: Watcher, name: str) -> None:
    server.put("jobs", job("first", "there"))
    eventually(lambda: "first" in watcher.state)
    server.faults = copy.deepcopy(FAULTS[name])
    _break_the_watch(server)
    for _ in range(10):  # until every fault has failed or cut a response
        change_everything(server)
        eventually(lambda: watcher.state == jobs_of(server))
        if all(fault.applied for fault in server.faults):
            break
    assert [fault for fault in server.faults if not fault.applied] == []
    assert watcher.error is None
    assert len(server.requests) < 80, "pauses between the attempts"


def _break_the_watch(server: ApiServer) -> None:
    server.stop()
    server.start()


def test_an_error_inside_the_watch_leads_to_a_new_list(
    server: ApiServer, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = iter([b'{"type": "ERROR", "object": {"code": 410, "reason": "Expired"}}\n'])
    real = api_watch.response_lines
    monkeypatch.setattr(api_watch, "response_lines", lambda response: itertools.chain(first, real(response)))
    server.put("jobs", job("first", "there"))
    watcher = Watcher(cluster)
    eventually(lambda: server.count(r"jobs\?*$") >= 2)
    change_everything(server)
    eventually(lambda: watcher.state == jobs_of(server))
    watcher.closed.set()


def test_a_silent_connection_is_replaced(server: ApiServer, watcher: Watcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_watch, "WATCH_S", 1)
    monkeypatch.setattr(api_watch, "SILENCE_S", 0.5)
    server.put("jobs", job("first", "there"))
    eventually(lambda: "first" in watcher.state)
    server.faults = [Fault(WATCHES, hangs=True, times=2)]
    _break_the_watch(server)
    change_everything(server)
    eventually(lambda: watcher.state == jobs_of(server))
    eventually(lambda: server.faults[0].times <= 0)


@pytest.mark.parametrize("fault", [Fault(WATCHES, hangs=True, times=10_000), Fault(WATCHES, status=503, times=10_000)])
def test_changes_are_seen_although_no_watch_can_be_opened(
    server: ApiServer, watcher: Watcher, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    """A proxy may let lists through and hold back watches."""
    monkeypatch.setattr(api_watch, "WATCH_S", 0.3)
    monkeypatch.setattr(api_watch, "SILENCE_S", 0.2)
    server.faults = [copy.copy(fault)]
    _break_the_watch(server)
    change_everything(server, 3)
    eventually(lambda: watcher.state == jobs_of(server))
    assert watcher.error is None


def test_a_change_that_no_watch_shows_is_seen_in_the_next_list(
    server: ApiServer, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api_watch, "WATCH_S", 1)
    server.put("jobs", job("first", "there"))
    eventually(lambda: "first" in watcher.state)
    _break_the_watch(server)  # the next one uses the new WATCH_S
    with server.changed:
        server.remove("jobs", "first")
        server.put("jobs", job("second", "unseen"))
        server.history.clear()
    eventually(lambda: watcher.state == {"second": "unseen"})


def test_an_object_deleted_during_an_outage_is_reported_as_deleted(server: ApiServer, watcher: Watcher) -> None:
    server.put("jobs", job("first", "there"))
    server.put("jobs", job("second", "there"))
    eventually(lambda: len(watcher.state) == 2)
    server.stop()
    server.remove("jobs", "first")
    server.history.clear()
    server.expired = server.version
    server.start()
    eventually(lambda: watcher.state == {"second": "there"})


def test_an_outage_of_seconds_is_retried_and_reported_once(
    server: ApiServer, cluster: Cluster, watcher: Watcher
) -> None:
    reported: list[str] = []

    def report(text: str) -> None:
        reported.append(text)
        if len(reported) == 1:
            server.start()

    cluster.retry_policy.report = report
    server.put("jobs", job("first", "there"))
    eventually(lambda: "first" in watcher.state)
    server.stop()
    assert cluster.get("Job", "first") is not None
    change_everything(server)
    eventually(lambda: watcher.state == jobs_of(server))
    assert len(reported) == 2
    assert "cannot be reached" in reported[0]
    assert "retrying for up to 20 s" in reported[0]
    assert "continues after an outage of" in reported[1]


@pytest.mark.parametrize("outage", ["unreachable", "503"])
def test_an_outage_that_outlasts_the_retry_policy_raises_one_line(
    server: ApiServer, cluster: Cluster, outage: str
) -> None:
    server.put("jobs", job("first", "there"))
    cluster.retry_policy = RetryPolicy(1.5)
    watcher = Watcher(cluster)
    eventually(lambda: "first" in watcher.state)
    before = len(server.requests)
    if outage == "unreachable":
        server.stop()
    else:
        server.faults = [Fault(".", status=503, times=10_000)]
        _break_the_watch(server)
    eventually(lambda: watcher.error is not None)
    assert isinstance(watcher.error, StoreError)
    assert "gave up after" in str(watcher.error)
    assert "\n" not in str(watcher.error)
    assert len(server.requests) - before < 20, "pauses grow"


def test_a_401_for_credentials_that_never_worked_is_not_retried(server: ApiServer, cluster: Cluster) -> None:
    server.token = "another"
    with pytest.raises(AccessError, match="the token may have expired"):
        cluster.get("Job", "first")
    assert len(server.requests) == 2, "once more, with credentials read again"


def test_a_rotated_token_file_is_read_again(server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = tmp_path / "token"
    tokens.write_text("first")
    server.token = "first"
    use_kubeconfig(server.kubeconfig(tmp_path, tokenFile=str(tokens)), monkeypatch)
    cluster = Cluster(retry_policy=RetryPolicy(5))
    watcher = Watcher(cluster)
    server.put("jobs", job("one"))
    eventually(lambda: "one" in watcher.state)
    server.token = "second"
    tokens.write_text("second")
    _break_the_watch(server)
    change_everything(server, 3)
    eventually(lambda: watcher.state == jobs_of(server))
    assert watcher.error is None


def test_a_pods_rotated_token_is_read_again(server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kubernetes.config import incluster_config

    tokens, authority = tmp_path / "token", tmp_path / "ca.crt"
    tokens.write_text("first")
    authority.write_text("unused without TLS")
    server.token = "first"
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tokens))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(authority))
    set_config = incluster_config.InClusterConfigLoader._set_config

    def set_config_for_http(loader: Any, settings: Any) -> None:  # in a pod it is always https
        set_config(loader, settings)
        settings.host, settings.ssl_ca_cert = server.url, None

    monkeypatch.setattr(incluster_config.InClusterConfigLoader, "_set_config", set_config_for_http)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
    cluster = Cluster(retry_policy=RetryPolicy(5))
    assert cluster.objects("Job") == []
    server.token = "second"
    tokens.write_text("second")
    assert cluster.objects("Job") == []


def test_a_login_program_runs_again_after_its_token_expired(
    server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = tmp_path / "token"
    tokens.write_text("first")
    server.token = "first"
    program = tmp_path / "login"
    program.write_text(
        '#!/bin/sh\nprintf \'{"apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", '
        f'"status": {{"token": "%s"}}}}\' "$(cat {tokens})"\n'
    )
    program.chmod(0o755)
    login = {"apiVersion": "client.authentication.k8s.io/v1", "command": str(program), "interactiveMode": "Never"}
    use_kubeconfig(server.kubeconfig(tmp_path, exec=login), monkeypatch)
    cluster = Cluster(retry_policy=RetryPolicy(5))
    assert cluster.objects("Job") == []
    server.token = "second"
    tokens.write_text("second")
    assert cluster.objects("Job") == []


def test_a_create_whose_response_was_lost_creates_one_object(server: ApiServer, cluster: Cluster) -> None:
    server.faults = [Fault("POST", drops_response=True)]
    cluster.create({"kind": "Job", "metadata": {"name": "one"}})
    assert server.count("POST") == 2
    assert [name for _, name in server.objects] == ["one"]
