"""A container's log through connections that break: no line lost, none twice, the order kept."""

import random
from collections.abc import Iterator
from typing import Any

import pytest

from llamarefine_jobs.contract.errors import StoreError
from llamarefine_k8s.podlog import PodLog


class Server:
    """A log as the API server gives it: from a second on, as much as is written, until the line breaks.

    `at_once` lines are written in each request before the connection breaks; the container ends with the last one.
    """

    def __init__(self, lines: list[bytes], at_once: int) -> None:
        self.lines = lines
        self.at_once = at_once
        self.written = 0
        self.requests = 0

    def get(self, kind: str, name: str) -> dict[str, Any]:
        if self.requests % 3 == 2:
            self.requests += 1
            raise StoreError("the API server answered 503")
        over = self.written >= len(self.lines)
        state = {"terminated": {"exitCode": 0}} if over else {"running": {}}
        return {"status": {"containerStatuses": [{"state": state}]}}

    def log(self, pod: str, container: str, *, since: str | None, follow: bool) -> Iterator[bytes]:
        self.requests += 1
        if follow:
            self.written = min(len(self.lines), self.written + self.at_once)
        for line in self.lines[: self.written]:
            if since is None or line[:19] >= since[:19].encode():
                yield line


def written(count: int, seed: int) -> list[bytes]:
    """Lines at random times, many in one second, some in one instant, some of the same words."""
    chance = random.Random(seed)
    instant, lines = 0, []
    for number in range(count):
        instant += chance.choice([0, 1, 100_000_000, 900_000_000])
        fraction = f".{instant % 10**9:09d}".rstrip("0").rstrip(".")
        lines.append(f"2026-11-24T00:00:{instant // 10**9:02d}{fraction}Z line {number // 2}".encode())
    return lines


@pytest.fixture(autouse=True)
def _without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llamarefine_k8s.podlog._PAUSE_S", 0)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("at_once", [1, 3, 50])
def test_every_line_comes_once_and_in_order(seed: int, at_once: int) -> None:
    lines = written(50, seed)
    read = list(PodLog(Server(lines, at_once), "pod", "stage").lines())  # type: ignore[arg-type]
    assert read == [line.split(b" ", 1)[1].decode() for line in lines]


def test_another_reader_goes_on_where_the_first_one_stopped() -> None:
    lines = [f"2026-11-24T00:00:0{number // 4}.{number % 4 + 1}Z line {number}".encode() for number in range(12)]
    first = PodLog(Server(lines, 12), "pod", "stage")  # type: ignore[arg-type]
    read = first.lines()
    begun = [next(read) for _ in range(6)]
    rest = list(PodLog(Server(lines, 12), "pod", "stage", first.read_to).lines())  # type: ignore[arg-type]
    assert begun + rest == [f"line {number}" for number in range(12)]


def test_a_redrawn_line_is_what_stood_there_last() -> None:
    lines = [b"2026-11-24T00:00:00Z 10%\r50%\r100% \r", b"2026-11-24T00:00:00.5Z \xff bytes"]
    assert list(PodLog(Server(lines, 9), "pod", "stage").lines()) == ["100%", "� bytes"]  # type: ignore[arg-type]
