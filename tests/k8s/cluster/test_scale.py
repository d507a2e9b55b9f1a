"""Many runs: a command reads only what it shows, a driver needs little memory, and nothing polls the API server."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from llamarefine_jobs.contract.errors import RecipeError
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.stages import SEQUENCE
from llamarefine_jobs.recipe_file import to_yaml
from llamarefine_jobs.store import Store
from llamarefine_jobs.store.bucket import S3Objects
from llamarefine_k8s.cluster import submission
from llamarefine_k8s.cluster.manifests import RUN
from llamarefine_k8s.cluster.run_status import find_status
from llamarefine_k8s.runs.records import Driver, RunRecord, all_runs, find, newest_names
from llamarefine_k8s.settings import Settings
from tests.k8s.acting_node import FakeNode
from tests.k8s.api_server import ApiServer, served, use_kubeconfig

FINISHED = 1000
FULL_LISTING = 2  # requests: a run has two objects, and S3 lists a thousand keys at once
DRIVER = """
import sys
from llamarefine_k8s import cli
sys.argv[0] = "llamarefine"
try:
    cli.main()
finally:
    peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print("peak", int(peak.split()[1]) // 1024, "MiB")
"""


def put_record(store: Store, run: str, at: datetime) -> None:
    """Write the record and a log of a finished run."""
    driver = Driver(pid=1, host="elsewhere")
    record = RunRecord(run=run, state="done", created_at=at, updated_at=at, driver=driver, recipe={"name": "many"})
    store.write(f"runs/{run}/logs/sft.log", b"a line\n")
    store.write(f"runs/{run}/run.json", record.model_dump_json().encode())


@pytest.fixture
def full_store(s3_uri: str) -> Store:
    """A bucket with a thousand finished runs."""
    store = Store(s3_uri)
    store.manifest("sft", "0" * 64)  # creates the S3 client, before threads share it

    def put(number: int) -> None:
        put_record(store, f"many-{number:08x}", datetime.now(UTC) - timedelta(days=1))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, range(FINISHED - 1)))
    put(FINISHED)
    return store


class S3Calls:
    """Counts the requests of a store's S3 client and the keys that its listings return."""

    def __init__(self, store: Store) -> None:
        self.reads = self.listings = self.listed_keys = 0
        assert isinstance(store.objects, S3Objects)
        store.objects.client.meta.events.register("after-call.s3.GetObject", self._count_read)
        store.objects.client.meta.events.register("after-call.s3.ListObjectsV2", self._count_listing)

    def _count_read(self, **event: Any) -> None:
        self.reads += 1

    def _count_listing(self, parsed: dict[str, Any], **event: Any) -> None:
        self.listings += 1
        self.listed_keys += len(parsed.get("Contents", ()))


def test_only_the_shown_ones_of_a_thousand_finished_runs_are_read(full_store: Store) -> None:
    calls = S3Calls(full_store)
    assert find(full_store, None).run == f"many-{FINISHED:08x}"
    assert (calls.reads, calls.listings) == (1, FULL_LISTING)
    assert find(full_store, "many-00000007").run == "many-00000007"
    assert (calls.reads, calls.listings) == (2, FULL_LISTING)
    assert len(all_runs(full_store, limit=50)) == 50
    assert (calls.reads, calls.listings) == (52, 2 * FULL_LISTING)
    assert len(newest_names(full_store)) == FINISHED


def test_a_name_lists_only_the_runs_that_begin_with_it(full_store: Store) -> None:
    calls = S3Calls(full_store)
    assert find(full_store, "many-0000001f").run == "many-0000001f"
    assert calls.listings == 0, "a complete name is read at once"
    runs = all_runs(full_store, beginning="many-0000001")
    assert {run.run for run in runs} == {f"many-0000001{number:x}" for number in range(16)}
    assert calls.listed_keys == 2 * 16
    with pytest.raises(RecipeError, match="begins 16 runs"):
        find(full_store, "many-0000001")
    with pytest.raises(RecipeError, match="holds no run `other`; its newest are many-"):
        find(full_store, "other")
    with pytest.raises(RecipeError, match="holds no run"):
        find(full_store, "many-00000007/")


def test_status_of_a_named_run_lists_only_its_own_objects(
    api: ApiServer, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_kubeconfig(api.kubeconfig(tmp_path), monkeypatch)
    for run in ("one", "two"):
        put_record(store, f"{run}-00000000", datetime.now(UTC))
        api.put("jobs", {"metadata": {"name": f"{run}-00000000", "labels": {RUN: f"{run}-00000000"}}, "spec": {}})
    record, jobs, _ = find_status(store, "one", "fake", None)
    assert record
    assert record.run == "one-00000000"
    assert [job.name for job in jobs] == ["driver"]
    assert api.count("run%3D(none|one-00000000)$") == 3
    assert api.count("/events") == 1
    assert len(api.requests) == 4


@pytest.fixture
def api() -> Iterator[ApiServer]:
    with served() as server:
        yield server


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a process's peak memory from /proc")
def test_a_driver_stays_under_100_mib_and_sends_few_requests(
    api: ApiServer, recipe: Callable[..., Recipe], s3_uri: str, tmp_path: Path
) -> None:
    given = Settings(store=s3_uri, gpu_resource=None)
    pinned = submission.pin_for_cluster(
        recipe("prepare.questions.source=python-docstrings"), given, print, upload=False
    )
    (tmp_path / "pinned.yaml").write_text(to_yaml(pinned))
    (tmp_path / "llamarefine.yaml").write_text(yaml.safe_dump(given.model_dump(exclude_defaults=True)))
    node = FakeNode(api, pinned, Store(s3_uri), seed=3)
    environment = os.environ | {
        "KUBECONFIG": str(api.kubeconfig(tmp_path)),
        "LLAMAREFINE_DRIVER_JOB": "many",
        "LLAMAREFINE_DRIVER_UID": "1",
    }
    command = ["submit", "pinned.yaml", "--foreground", "--settings", "llamarefine.yaml"]
    environment.pop("KUBERNETES_SERVICE_HOST", None)
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, *command],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    node.close()
    assert node.started_stages == list(SEQUENCE), done.stderr
    peak = re.search(r"peak (\d+) MiB", done.stdout)
    assert peak, done.stdout + done.stderr
    assert int(peak[1]) < 100
    per_stage = len(api.requests) / len(SEQUENCE)
    print(f"peak {peak[1]} MiB, {per_stage:.1f} requests a stage")
    assert per_stage < 25
