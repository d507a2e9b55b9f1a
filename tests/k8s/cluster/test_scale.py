"""Many runs: what is shown of a thousand comes soon, a driver is small, and nobody polls the API server."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml

from llamarefine_jobs.contract.errors import RecipeError
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.stages import SEQUENCE
from llamarefine_jobs.recipe_file import to_yaml
from llamarefine_jobs.store import Store
from llamarefine_jobs.store.objects import Entry
from llamarefine_k8s.cluster import submission
from llamarefine_k8s.cluster.manifests import RUN
from llamarefine_k8s.cluster.run_status import find_status
from llamarefine_k8s.runs.records import Driver, RunRecord, all_runs, find, newest_names
from llamarefine_k8s.settings import Settings
from tests.k8s.acting_node import ActingNode
from tests.k8s.api_server import ApiServer, served, use

FINISHED = 1000
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
    """What a finished run leaves."""
    driver = Driver(pid=1, host="elsewhere")
    record = RunRecord(run=run, state="done", created_at=at, updated_at=at, driver=driver, recipe={"name": "many"})
    store.write(f"runs/{run}/logs/sft.log", b"a line\n")
    store.write(f"runs/{run}/run.json", record.model_dump_json().encode())


@pytest.fixture
def full(s3_uri: str) -> Store:
    """A bucket with a thousand finished runs."""
    store = Store(s3_uri)
    store.manifest("sft", "0" * 64)

    def put(number: int) -> None:
        put_record(store, f"many-{number:08x}", datetime.now(UTC) - timedelta(days=1))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, range(FINISHED - 1)))
    put(FINISHED)
    return store


def test_of_a_thousand_finished_runs_only_what_is_shown_is_read(full: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = full.objects.read
    monkeypatch.setattr(full.objects, "read", lambda path: (read.append(path), real(path))[1])
    began_s = time.monotonic()
    assert find(full, None).run == f"many-{FINISHED:08x}"
    assert len(read) == 1
    assert find(full, "many-00000007").run == "many-00000007"
    assert len(read) == 2
    assert len(all_runs(full, limit=50)) == 50
    assert len(read) == 52
    assert time.monotonic() - began_s < 20, "2 s on an idle machine"
    assert len(newest_names(full)) == FINISHED


def test_of_runs_that_are_named_only_those_are_listed(full: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[Entry] = []
    real = full.objects._listed  # type: ignore[union-attr]
    monkeypatch.setattr(full.objects, "_listed", lambda prefix: (listed.extend(found := real(prefix)), found)[1])
    assert find(full, "many-0000001f").run == "many-0000001f"
    assert len(listed) == 0, "the whole name is read at once"
    assert {run.run for run in all_runs(full, beginning="many-0000001")} == {f"many-0000001{n:x}" for n in range(16)}
    assert len(listed) == 2 * 16
    with pytest.raises(RecipeError, match="begins 16 runs"):
        find(full, "many-0000001")
    with pytest.raises(RecipeError, match="holds no run `other`; its newest are many-"):
        find(full, "other")
    with pytest.raises(RecipeError, match="holds no run"):
        find(full, "many-00000007/")


def test_status_of_a_run_by_name_asks_for_its_objects_alone(
    api: ApiServer, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(api.kubeconfig(tmp_path), monkeypatch)
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
    with served() as made:
        yield made


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a process's peak memory from /proc")
def test_a_driver_stays_under_100_mib_and_asks_little(
    api: ApiServer, recipe: Callable[..., Recipe], s3_uri: str, tmp_path: Path
) -> None:
    given = Settings(store=s3_uri, gpu_resource=None)
    pinned = submission.bring_sources(recipe("prepare.questions.source=python-docstrings"), given, print, upload=False)
    (tmp_path / "pinned.yaml").write_text(to_yaml(pinned))
    (tmp_path / "llamarefine.yaml").write_text(yaml.safe_dump(given.model_dump(exclude_defaults=True)))
    node = ActingNode(api, pinned, Store(s3_uri), seed=3)
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
    assert node.made == list(SEQUENCE), done.stderr
    peak = re.search(r"peak (\d+) MiB", done.stdout)
    assert peak, done.stdout + done.stderr
    assert int(peak[1]) < 100
    per_stage = len(api.requests) / len(SEQUENCE)
    print(f"peak {peak[1]} MiB, {per_stage:.1f} requests a stage")
    assert per_stage < 25
