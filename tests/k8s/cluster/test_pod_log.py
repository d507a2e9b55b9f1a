"""A container's log over connections that break: no line is lost or repeated, and the order is kept."""

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamarefine_jobs.contract.retry import RetryPolicy
from llamarefine_k8s.cluster import pod_log
from llamarefine_k8s.cluster.api import Cluster
from llamarefine_k8s.cluster.pod_log import PodLog
from tests.k8s.api_server import ApiServer, Fault, served, use_kubeconfig

LOGS = "GET .*/log"


@pytest.fixture(scope="module")
def server() -> Iterator[ApiServer]:
    with served() as server:
        yield server


@pytest.fixture
def cluster(server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    server.objects.clear()
    server.logs.clear()
    server.ended.clear()
    server.faults = []
    use_kubeconfig(server.kubeconfig(tmp_path), monkeypatch)
    monkeypatch.setattr(pod_log, "_PAUSES_S", (0.0,))
    return Cluster(retry_policy=RetryPolicy(5))


def put(server: ApiServer, lines: list[bytes], *, ended: bool = True) -> None:
    """Put a pod whose log is `lines`."""
    server.logs["pod"] = lines
    if ended:
        end(server)
    else:
        server.put("pods", {"metadata": {"name": "pod"}, "status": {"containerStatuses": [{"state": {"running": {}}}]}})


def end(server: ApiServer) -> None:
    with server.changed:
        server.ended.add("pod")
        state = {"state": {"terminated": {"exitCode": 0}}}
        server.put("pods", {"metadata": {"name": "pod"}, "status": {"containerStatuses": [state]}})


def texts(lines: list[bytes]) -> list[str]:
    return [line.split(b" ", 1)[1].decode().rstrip("\n") for line in lines]


def random_lines(count: int, seed: int) -> list[bytes]:
    """Return lines with random timestamps: many within one second, some equal; some lines have the same text."""
    chance = random.Random(seed)
    instant, lines = 0, []
    for number in range(count):
        instant += chance.choice([0, 1, 100_000_000, 900_000_000])
        fraction = f".{instant % 10**9:09d}".rstrip("0").rstrip(".")
        lines.append(f"2026-11-24T00:00:{instant // 10**9:02d}{fraction}Z line {number // 2}\n".encode())
    return lines


@pytest.mark.parametrize("is_clean", [False, True], ids=["connection broken", "looks like the end"])
def test_a_cut_at_any_byte_loses_and_repeats_nothing(server: ApiServer, cluster: Cluster, is_clean: bool) -> None:
    lines = random_lines(9, seed=5)
    put(server, lines)
    for cut in range(len(b"".join(lines)) + 1):
        server.faults = [Fault(LOGS, cut_after=cut, is_clean=is_clean)]
        assert list(PodLog(cluster, "pod", "stage").lines()) == texts(lines), cut
        assert server.faults[0].applied or cut == len(b"".join(lines))


@pytest.mark.parametrize("seed", range(10))
def test_a_log_that_grows_is_read_once_through_cuts_refusals_and_restarts(
    server: ApiServer, cluster: Cluster, seed: int
) -> None:
    chance = random.Random(seed)
    put(server, [], ended=False)
    server.faults = [
        chance.choice(
            [
                Fault(LOGS, cut_after=chance.randrange(600), is_clean=chance.random() < 0.5),
                Fault(LOGS, status=500),
                Fault("GET .*/pods/pod$", status=503),
            ]
        )
        for _ in range(12)
    ]
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.extend(PodLog(cluster, "pod", "stage").lines()), daemon=True)
    reader.start()
    for number in range(60):
        server.write_log("pod", f"line {number // 2}")
        if number == 30 and seed % 2:
            server.stop()
            server.start()
        time.sleep(chance.choice([0, 0, 0.05]))
    end(server)
    reader.join(120)
    assert read == [f"line {number // 2}" for number in range(60)]
    assert sum(fault.applied for fault in server.faults) >= 4


def test_lines_of_two_streams_may_be_out_of_order_around_a_second(server: ApiServer, cluster: Cluster) -> None:
    lines = [
        b"2026-11-24T00:00:01.1Z out 1\n",
        b"2026-11-24T00:00:02.000001Z err 1\n",
        b"2026-11-24T00:00:01.999999Z out 2\n",
        b"2026-11-24T00:00:02.1Z out 3\n",
    ]
    put(server, lines)
    server.faults = [Fault(LOGS, cut_after=len(lines[0] + lines[1]))]
    assert list(PodLog(cluster, "pod", "stage").lines()) == texts(lines)
    assert server.faults[0].applied


def test_another_reader_continues_where_the_first_one_stopped(server: ApiServer, cluster: Cluster) -> None:
    put(server, [f"2026-11-24T00:00:0{number // 4}.{number % 4 + 1}Z line {number}\n".encode() for number in range(12)])
    first = PodLog(cluster, "pod", "stage")
    read = first.lines()
    first_lines = [next(read) for _ in range(6)]
    rest = list(PodLog(cluster, "pod", "stage", first.read_to).lines())
    assert first_lines + rest == [f"line {number}" for number in range(12)]


def test_a_last_line_without_a_newline_is_read(server: ApiServer, cluster: Cluster) -> None:
    put(server, [b"2026-11-24T00:00:00Z one\n", b"2026-11-24T00:00:00.5Z two"])
    assert list(PodLog(cluster, "pod", "stage").lines()) == ["one", "two"]
    put(server, [b"2026-11-24T00:00:00Z all there is"])
    assert list(PodLog(cluster, "pod", "stage").lines(follow=False)) == ["all there is"]


def test_only_the_last_state_of_a_redrawn_line_is_read(server: ApiServer, cluster: Cluster) -> None:
    put(server, [b"2026-11-24T00:00:00Z 10%\r50%\r100% \r\n", b"2026-11-24T00:00:00.5Z \xff bytes\n"])
    assert list(PodLog(cluster, "pod", "stage").lines()) == ["100%", "\ufffd bytes"]


def test_reading_without_following_ends_although_the_container_prints_on(server: ApiServer, cluster: Cluster) -> None:
    put(server, [b"2026-11-24T00:00:00Z one\n"], ended=False)
    read = []
    for number, line in enumerate(PodLog(cluster, "pod", "stage").lines(follow=False)):
        read.append(line)
        server.write_log("pod", f"line {number}")  # before the next read
    assert read[:2] == ["one", "line 0"]


def test_the_log_of_a_deleted_pod_ends(server: ApiServer, cluster: Cluster) -> None:
    put(server, [b"2026-11-24T00:00:00Z one\n"], ended=False)
    read = PodLog(cluster, "pod", "stage").lines()
    assert next(read) == "one"
    server.remove("pods", "pod")
    server.logs.clear()
    server.stop()
    server.start()
    assert list(read) == []


def test_a_log_that_cannot_be_read_ends_with_a_line_that_says_so(
    server: ApiServer, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pod_log, "_UNREADABLE_S", 0.2)
    put(server, [b"2026-11-24T00:00:00Z one\n"])
    server.faults = [Fault(LOGS, status=500, times=10_000)]
    (line,) = PodLog(cluster, "pod", "stage").lines()
    assert line.startswith("llamarefine: the rest of this log cannot be read: the API server answered 500")
