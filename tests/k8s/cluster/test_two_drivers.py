"""Drivers killed at any moment, and several drivers of one run: one Job per stage, each log line once."""

import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llamarefine_jobs.contract.errors import LlamaRefineError, StoreError
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.stages import SEQUENCE
from llamarefine_jobs.store import Store
from llamarefine_k8s.cluster import submission
from llamarefine_k8s.cluster.api import Cluster
from llamarefine_k8s.runs import pipeline, records
from llamarefine_k8s.runs.pipeline import StageLog
from llamarefine_k8s.runs.records import RecordWriter, RunRecord
from llamarefine_k8s.settings import Settings
from tests.k8s.acting_node import FakeNode
from tests.k8s.api_server import ApiServer, eventually, served

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["boto3", "kubernetes", "llamarefine_jobs.store.bucket", "llamarefine_k8s.cluster.submission", __name__]
)


class NoDisplay:
    """A run observer that shows nothing."""

    def show(self, record: RunRecord) -> None: ...

    def note(self, stage: str, text: str) -> None: ...


def drive(environment: dict[str, str], recipe: Recipe, store: str) -> None:
    """Run one driver; the target of a process."""
    from kubernetes.config import kube_config

    os.environ.update(environment)
    pipeline._UPLOAD_EVERY_S = 0.1  # so that the log is uploaded during a stage, too
    kube_config.KUBE_CONFIG_DEFAULT_LOCATION = environment["KUBECONFIG"]
    given = Settings(store=store, gpu_resource=None)
    try:
        submission.drive(Cluster(retry_policy=given.retry_policy(lambda text: None)), recipe, given, NoDisplay())
    except LlamaRefineError as error:
        sys.exit(error.exit_code)


@pytest.fixture
def api() -> Iterator[ApiServer]:
    with served() as server:
        yield server


@pytest.fixture
def start(
    api: ApiServer, recipe: Callable[..., Recipe], s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    """Starts a driver; with `in_cluster`, as in a pod of the run's driver Job."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    kubeconfig = str(api.kubeconfig(tmp_path))
    started = []

    def start_one(*, in_cluster: bool = True) -> Any:
        run = records.run_id(recipe())
        job = {"LLAMAREFINE_DRIVER_JOB": run, "LLAMAREFINE_DRIVER_UID": "the-driver"} if in_cluster else {}
        s3 = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        process = PROCESSES.Process(target=drive, args=({"KUBECONFIG": kubeconfig} | s3 | job, recipe(), s3_uri))
        process.start()
        started.append(process)
        return process

    yield start_one
    for process in started:
        process.kill()
        process.join()


def stored_lines(store: Store, run: str, stage: str) -> list[str]:
    with StageLog(store, run, stage) as log:
        return log.file.read_text().splitlines()


@pytest.mark.parametrize("seed", range(4))
def test_a_driver_killed_at_any_moment_creates_no_second_job_and_loses_no_line(
    api: ApiServer, recipe: Callable[..., Recipe], s3_uri: str, start: Callable[..., Any], seed: int
) -> None:
    chance, store, run = random.Random(seed), Store(s3_uri), records.run_id(recipe())
    node = FakeNode(api, recipe(), store, seed)
    kills = 0
    while True:
        driver = start()
        if kills < 10:
            driver.join(chance.uniform(0.05, 2.5))
        else:
            driver.join(120)
        if driver.exitcode == 0:
            break
        assert driver.exitcode in (None, 30, 130), driver.exitcode
        assert kills < 10, "the last driver did not end"
        kills += 1
        os.kill(driver.pid, chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]))
        driver.join(30)
        if chance.random() < 0.2:
            api.stop()
            api.start()
    node.close()
    assert kills
    assert node.started_stages == list(SEQUENCE)
    for stage in SEQUENCE:
        assert stored_lines(store, run, stage) == FakeNode.lines_of(stage)
    record = records.load(store, run)
    assert record
    assert record.state == "done"


def test_lines_that_a_driver_read_are_stored_although_driver_and_pod_vanish_together(
    s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "_UPLOAD_EVERY_S", 0.0)
    store = Store(s3_uri)
    log = StageLog(store, "run", "sft").__enter__()  # never closed, as after a SIGKILL
    for second in (1, 2):
        log.write(f"line {second}", f"2026-11-26T00:00:0{second}Z")
    with StageLog(store, "run", "sft") as successor:
        assert successor.file.read_text() == "line 1\nline 2\n"
        assert successor.read_to == "2026-11-26T00:00:02Z"
        monkeypatch.setattr(store.objects, "write", Raises(StoreError("the bucket does not answer")))
        successor.write("line 3", "2026-11-26T00:00:03Z")
    assert stored_lines(store, "run", "sft") == ["line 1", "line 2", "line 3"]


class Raises:
    """A function that raises `error`."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self, *arguments: Any, **more: Any) -> None:
        raise self.error


def test_of_drivers_that_start_together_one_drives_and_the_others_fail(
    api: ApiServer, recipe: Callable[..., Recipe], s3_uri: str, start: Callable[..., Any]
) -> None:
    node = FakeNode(api, recipe(), Store(s3_uri), seed=1)
    drivers = [start(in_cluster=False) for _ in range(4)]
    for driver in drivers:
        driver.join(120)
    node.close()
    assert sorted(driver.exitcode for driver in drivers) == [0, 1, 1, 1]
    assert node.started_stages == list(SEQUENCE)


def test_two_pods_of_one_driver_both_succeed(
    api: ApiServer, recipe: Callable[..., Recipe], s3_uri: str, start: Callable[..., Any]
) -> None:
    """The driver's node was marked as lost but works: the driver's pod runs beside its replacement."""
    node = FakeNode(api, recipe(), Store(s3_uri), seed=2)
    first = start()
    eventually(lambda: node.started_stages, 60)
    second = start()
    for driver in (first, second):
        driver.join(120)
        assert driver.exitcode == 0
    node.close()
    assert node.started_stages == list(SEQUENCE)


def test_the_error_of_a_second_driver_names_the_first_one(
    recipe: Callable[..., Recipe], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (RecordWriter(store, recipe(), lambda record: None) for _ in range(2))
    monkeypatch.setenv(records.DRIVER_JOB, "another")
    second.record = second.record.model_copy(update={"driver": records.Driver.this_process()})
    monkeypatch.delenv(records.DRIVER_JOB)
    with second, pytest.raises(LlamaRefineError, match="is already being driven by process 1 on another"):
        first.__enter__()
