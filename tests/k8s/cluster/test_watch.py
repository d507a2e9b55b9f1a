"""A watch, and every other request, through what an API server does: no change lost, no storm, one clear end."""

import copy
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
from tests.k8s.api_server import ApiServer, Fault, eventually, use

WATCHES = r"GET .*watch=true"


@pytest.fixture
def cluster(server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    use(server.kubeconfig(tmp_path), monkeypatch)
    monkeypatch.setattr(api_watch, "_PAUSES_S", (0.02, 0.05, 0.1))
    monkeypatch.setattr(api_requests, "_STARTING_PAUSE_S", 0.1)
    return Cluster(retry_policy=RetryPolicy(20))


class Seen:
    """A watch in a thread of its own, and the state that its changes add up to."""

    def __init__(self, cluster: Cluster) -> None:
        self.state: dict[str, str] = {}
        self.changes = 0
        self.error: Exception | None = None
        self.closed = threading.Event()
        threading.Thread(target=self._follow, args=(cluster,), daemon=True).start()

    def _follow(self, cluster: Cluster) -> None:
        try:
            for change, item in cluster.watch("Job", stopped=self.closed.is_set):
                self.changes += 1
                name = item["metadata"]["name"]
                if change == "DELETED":
                    self.state.pop(name, None)
                else:
                    self.state[name] = item["status"].get("word", "")
        except Exception as error:
            self.error = error


@pytest.fixture
def seen(cluster: Cluster) -> Iterator[Seen]:
    made = Seen(cluster)
    yield made
    made.closed.set()


def job(name: str, word: str = "") -> dict[str, Any]:
    return {"metadata": {"name": name}, "status": {"word": word}}


def change_everything(server: ApiServer, rounds: int = 12) -> None:
    """Objects come, change and go, a little apart."""
    for number in range(rounds):
        server.put("jobs", job(f"job-{number}"))
        server.put("jobs", job(f"job-{number % 3}", f"changed {number}"))
        if number > 5:
            server.remove("jobs", f"job-{number - 1}")
        time.sleep(0.02)


def truth(server: ApiServer) -> dict[str, str]:
    return {name: item["status"]["word"] for (kind, name), item in server.objects.items() if kind == "jobs"}


TROUBLES: dict[str, list[Fault]] = {
    "ends": [Fault(WATCHES, cut_after=2000, is_clean=True, times=5)],
    "ends before it began": [Fault(WATCHES, cut_after=0, is_clean=True, times=5)],
    "closes in the middle of a line": [Fault(WATCHES, cut_after=cut, times=1) for cut in (1, 77, 333, 1000, 1001)],
    "ends cleanly in the middle of a line": [Fault(WATCHES, cut_after=333, is_clean=True, times=5)],
    "410 as a status": [Fault(WATCHES, status=410, times=4)],
    "429 with Retry-After": [Fault("GET", status=429, headers={"Retry-After": "1"}, times=2)],
    "500 for a while": [Fault("GET", status=500, times=4)],
    "503 for a while": [Fault("GET", status=503, times=4)],
    "401 once": [Fault("GET", status=401, times=1)],
    "401 while it starts": [Fault("GET", status=401, times=5)],
    "a list that breaks off": [Fault(WATCHES, status=410), Fault(r"jobs\?*$", cut_after=40, times=3)],
    "a list that is no JSON": [Fault(WATCHES, status=410), Fault(r"jobs\?*$", cut_after=40, is_clean=True, times=3)],
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_the_last_state_is_seen_whatever_a_watch_meets(server: ApiServer, seen: Seen, trouble: str) -> None:
    server.put("jobs", job("first", "there"))
    eventually(lambda: "first" in seen.state)
    server.faults = copy.deepcopy(TROUBLES[trouble])
    _break_the_watch(server)
    change_everything(server)
    eventually(lambda: seen.state == truth(server))
    eventually(lambda: all(each.times <= 0 for each in server.faults if each.status))  # each was met
    eventually(lambda: seen.state == truth(server))
    assert seen.error is None
    assert len(server.requests) < 80, "no storm of requests"


def _break_the_watch(server: ApiServer) -> None:
    server.stop()
    server.start()


def test_an_error_inside_the_watch_leads_to_a_new_list(
    server: ApiServer, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = iter([b'{"type": "ERROR", "object": {"code": 410, "reason": "Expired"}}\n'])
    real = api_watch.response_lines
    monkeypatch.setattr(api_watch, "response_lines", lambda response: _before(first, real(response)))
    server.put("jobs", job("first", "there"))
    seen = Seen(cluster)
    eventually(lambda: server.count(r"jobs\?*$") >= 2)
    change_everything(server)
    eventually(lambda: seen.state == truth(server))
    seen.closed.set()


def _before(first: Iterator[bytes], rest: Iterator[bytes]) -> Iterator[bytes]:
    yield from first
    yield from rest


def test_silence_is_a_broken_line(server: ApiServer, seen: Seen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_watch, "WATCH_S", 1)
    monkeypatch.setattr(api_watch, "SILENCE_S", 0.5)
    server.put("jobs", job("first", "there"))
    eventually(lambda: "first" in seen.state)
    server.faults = [Fault(WATCHES, silent=True, times=2)]
    _break_the_watch(server)
    change_everything(server)
    eventually(lambda: seen.state == truth(server))
    eventually(lambda: server.faults[0].times <= 0)


def test_what_vanished_while_nobody_watched_is_told(server: ApiServer, seen: Seen) -> None:
    server.put("jobs", job("first", "there"))
    server.put("jobs", job("second", "there"))
    eventually(lambda: len(seen.state) == 2)
    server.stop()
    server.remove("jobs", "first")
    server.history.clear()
    server.forgotten = server.version
    server.start()
    eventually(lambda: seen.state == {"second": "there"})


def test_an_outage_of_seconds_is_waited_out_and_said_once(server: ApiServer, cluster: Cluster, seen: Seen) -> None:
    said: list[str] = []
    cluster.retry_policy.say = said.append
    server.put("jobs", job("first", "there"))
    eventually(lambda: "first" in seen.state)
    server.stop()
    threading.Timer(4, server.start).start()
    assert cluster.get("Job", "first") is not None
    change_everything(server)
    eventually(lambda: seen.state == truth(server))
    assert len(said) == 2
    assert "cannot be reached" in said[0]
    assert "tries again for 20 s" in said[0]
    assert "goes on after an outage of" in said[1]


@pytest.mark.parametrize("trouble", ["away", "503"])
def test_an_outage_that_lasts_ends_with_one_clear_error(server: ApiServer, cluster: Cluster, trouble: str) -> None:
    server.put("jobs", job("first", "there"))
    cluster.retry_policy = RetryPolicy(1.5)
    seen = Seen(cluster)
    eventually(lambda: "first" in seen.state)
    before = len(server.requests)
    if trouble == "away":
        server.stop()
    else:
        server.faults = [Fault(".", status=503, times=10_000)]
        _break_the_watch(server)
    eventually(lambda: seen.error is not None)
    assert isinstance(seen.error, StoreError)
    assert "gave up after" in str(seen.error)
    assert "\n" not in str(seen.error)
    assert len(server.requests) - before < 20, "pauses grow"


def test_a_refusal_is_raised_at_once_to_whom_the_server_does_not_know(server: ApiServer, cluster: Cluster) -> None:
    server.token = "another"
    began_s = time.monotonic()
    with pytest.raises(AccessError, match="the token may have expired"):
        cluster.get("Job", "first")
    assert time.monotonic() - began_s < 2


def test_a_rotated_token_file_is_read_again(server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = tmp_path / "token"
    tokens.write_text("first")
    server.token = "first"
    use(server.kubeconfig(tmp_path, tokenFile=str(tokens)), monkeypatch)
    cluster = Cluster(retry_policy=RetryPolicy(5))
    seen = Seen(cluster)
    server.put("jobs", job("one"))
    eventually(lambda: "one" in seen.state)
    server.token = "second"
    tokens.write_text("second")
    _break_the_watch(server)
    change_everything(server, 3)
    eventually(lambda: seen.state == truth(server))
    assert seen.error is None


def test_a_pods_rotated_token_is_read_again(server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kubernetes.config import incluster_config

    tokens, authority = tmp_path / "token", tmp_path / "ca.crt"
    tokens.write_text("first")
    authority.write_text("unused without TLS")
    server.token = "first"
    monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(tokens))
    monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(authority))
    settle = incluster_config.InClusterConfigLoader._set_config

    def over_http(loader: Any, settings: Any) -> None:  # in a pod it is always https
        settle(loader, settings)
        settings.host, settings.ssl_ca_cert = server.url, None

    monkeypatch.setattr(incluster_config.InClusterConfigLoader, "_set_config", over_http)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(server.port))
    cluster = Cluster(retry_policy=RetryPolicy(5))
    assert cluster.objects("Job") == []
    server.token = "second"
    tokens.write_text("second")
    assert cluster.objects("Job") == []


def test_a_login_program_is_asked_again(server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    use(server.kubeconfig(tmp_path, exec=login), monkeypatch)
    cluster = Cluster(retry_policy=RetryPolicy(5))
    assert cluster.objects("Job") == []
    server.token = "second"
    tokens.write_text("second")
    assert cluster.objects("Job") == []


def test_a_create_whose_answer_was_lost_is_not_made_twice(server: ApiServer, cluster: Cluster) -> None:
    server.faults = [Fault("POST", deaf=True)]
    cluster.create({"kind": "Job", "metadata": {"name": "one"}})
    assert server.count("POST") == 2
    assert [name for _, name in server.objects] == ["one"]
