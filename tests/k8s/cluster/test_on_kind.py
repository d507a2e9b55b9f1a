"""The launcher on a real cluster, with acting stages: their pods, logs, failures and replacements."""

import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from llamarefine_jobs.contract.environment import EXPECTED_KEY
from llamarefine_jobs.contract.stages import SEQUENCE
from tests.chart.kind_cluster import KindCluster, eventually
from tests.e2e import kind
from tests.k8s.acting import STEPS, program_map
from tests.k8s.on_cluster import SMALL, OnCluster
from tests.s3_server import KEY, SECRET, find_minio

pytestmark = pytest.mark.skipif(
    not os.environ.get("LLAMAREFINE_E2E"), reason="builds images and takes minutes: `make e2e` runs it"
)
NAMESPACE = "launcher"


def secret(name: str, key: str) -> dict[str, Any]:
    data = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": key}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": data}


@pytest.fixture(scope="module")
def the_cluster(kind_cluster: KindCluster) -> KindCluster:
    """A namespace with the chart's permissions and the program of the acting stages."""
    if not find_minio():
        pytest.skip("minio not found")
    kind_cluster.make_namespace(NAMESPACE)
    for each in (secret("llamarefine-bucket", SECRET), secret("wrong", "wrong-secret"), program_map()):
        each["metadata"]["namespace"] = NAMESPACE
        kind_cluster.apply(each)
    # The chart creates service account and permissions; the tests set their own bucket.
    store = ["--set", "settings.store=s3://llamarefine/chart", "--set", "networkPolicy.enabled=false"]
    kind_cluster.run("helm", "install", "llamarefine", "charts/llamarefine", "-n", NAMESPACE, *store)
    return kind_cluster


@pytest.fixture(scope="module")
def endpoint(the_cluster: KindCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a MinIO on this machine, as the nodes reach it."""
    engine = kind.engine(the_cluster.environment)
    network = the_cluster.run(str(engine), "network", "inspect", "kind")
    gateway = re.search(r'"[Gg]ateway": "(\d+\.\d+\.\d+\.\d+)"', network)
    assert gateway, network
    with socket.socket() as probe:
        probe.bind((gateway[1], 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("minio")
    (folder / "llamarefine").mkdir()  # a bucket
    process = subprocess.Popen(
        [str(find_minio()), "server", "--quiet", "--address", f"{gateway[1]}:{port}", str(folder)],
        env={**os.environ, "MINIO_ROOT_USER": KEY, "MINIO_ROOT_PASSWORD": SECRET, "MINIO_BROWSER": "off"},
    )
    yield f"http://{gateway[1]}:{port}"
    process.terminate()
    process.wait(30)


@pytest.fixture
def on(the_cluster: KindCluster, endpoint: str, tmp_path: Path) -> OnCluster:
    made = OnCluster(the_cluster, NAMESPACE, endpoint, tmp_path)
    made.act("{}")
    return made


def has_step(on: OnCluster, run: str, step: int) -> Callable[[], bool]:
    return lambda: f"step={step} " in on.run("logs", run, "sft")[1]


def test_a_second_submit_attaches_and_status_and_logs_show_the_finished_run(on: OnCluster, recipe_file: Path) -> None:
    run = on.submit(recipe_file)
    code, output = on.run("submit", str(recipe_file))
    assert code == 0, output
    assert "runs already; this attaches to it" in output
    assert "evaluate: done" in output
    assert "done" in on.run("status", run)[1]
    assert "sft: published" in on.run("logs", run, "sft")[1]
    jobs = on.kind_cluster.objects(NAMESPACE, "jobs", f"llamarefine/run={run}")
    assert {job["metadata"]["name"] for job in jobs} == {run, *(f"{run}-{stage}" for stage in SEQUENCE)}


def test_a_dry_run_prints_the_objects_that_submit_creates(on: OnCluster, recipe_file: Path) -> None:
    shown = list(yaml.safe_load_all(on.run("submit", str(recipe_file), "--dry-run")[1]))
    run = on.submit(recipe_file)
    eventually(lambda: len(on.pods(run)) > len(SEQUENCE), 120)
    created = {
        each["metadata"]["name"]: each for each in on.kind_cluster.objects(NAMESPACE, "jobs", f"llamarefine/run={run}")
    }
    jobs = [each for each in shown if each["kind"] == "Job"]
    assert len(jobs) == len(SEQUENCE) + 1
    for job in jobs:
        existing = created[job["metadata"]["name"]]
        if "llamarefine/key" in existing["metadata"]["labels"]:  # known only once the stage's parents are made
            for labels in (job["metadata"]["labels"], job["spec"]["template"]["metadata"]["labels"]):
                labels["llamarefine/key"] = existing["metadata"]["labels"]["llamarefine/key"]
            for each in (job, existing):
                stage = each["spec"]["template"]["spec"]["containers"][0]
                stage["env"] = [variable for variable in stage["env"] if variable["name"] != EXPECTED_KEY]
        assert job["metadata"]["labels"] == existing["metadata"]["labels"]
        assert _is_part_of(job["spec"], existing["spec"]), job["metadata"]["name"]


def test_a_deleted_driver_pod_and_a_deleted_stage_pod_lose_and_repeat_no_step(on: OnCluster, recipe_file: Path) -> None:
    on.act('{"sft": "train"}')
    run = on.submit(recipe_file)
    eventually(has_step(on, run, 20), 90)
    first = on.drivers(run)
    on.kind_cluster.kubectl("-n", NAMESPACE, "delete", "pod", *first)
    eventually(lambda: on.drivers(run, "Running") not in ([], first))
    for each in on.pods(run, stage="sft"):
        on.kind_cluster.kubectl("-n", NAMESPACE, "delete", "pod", each["metadata"]["name"])
    code, output = on.run("submit", str(recipe_file))
    assert code == 0, output
    log = on.run("logs", run, "sft")[1]
    on.kind_cluster.kubectl("-n", NAMESPACE, "delete", "jobs", "-l", f"llamarefine/run={run}")
    kept = on.run("logs", run, "sft")[1]
    assert [int(step) for step in re.findall(r"progress stage=sft step=(\d+)", kept)] == list(range(1, STEPS + 1))
    assert "resumes from the checkpoint" in log


def test_submit_ends_with_the_message_and_exit_code_of_a_failed_stage(on: OnCluster, recipe_file: Path) -> None:
    on.act('{"sft": "diverge"}')
    code, output = on.run("submit", str(recipe_file))
    assert code == 15
    assert output.splitlines()[-1] == "error: sft: the loss became NaN at step 3; lower sft.learning_rate"
    run = re.search(r"small-[0-9a-f]{8}", output)
    assert run
    assert len(on.pods(run[0], stage="sft")) == 1


def test_a_stage_over_its_memory_limit_is_not_retried_and_the_error_names_the_limit(
    on: OnCluster, recipe_file: Path
) -> None:
    small = {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": "300Mi"}}
    on.act('{"sft": "hoard memory"}', resources=dict.fromkeys(SEQUENCE, small))
    code, output = on.run("submit", str(recipe_file))
    assert code == 14
    assert output.splitlines()[-1] == (
        "error: sft was killed because it ran out of memory: its limit is 300Mi; raise resources.sft.limits.memory"
    )
    assert "another pod continues" not in output


def test_a_stage_over_its_memory_limit_continues_with_half_the_micro_batch_if_the_recipe_allows_it(
    on: OnCluster, recipe_file: Path
) -> None:
    """A row takes 64 MiB, so 8 and 4 rows exceed the limit of 300 MiB."""
    small = {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": "300Mi"}}
    on.act('{"sft": "hoard memory for each row"}', resources=dict.fromkeys(SEQUENCE, small))
    leave = ("--set", "sft.on_out_of_memory=halve_micro_batch", "--set", "sft.micro_batch_rows=8")
    code, output = on.run("submit", str(recipe_file), *leave)
    assert code == 0, output
    assert re.findall(r"restarts with micro-batches of (\d) rows instead of up to (\d)", output) == [
        ("4", "8"),
        ("2", "4"),
    ]
    run = re.search(r"small-[0-9a-f]{8}", output)
    assert run
    assert "hoards for 2 rows" in on.run("logs", run[0], "sft")[1]


def test_a_killed_stage_is_retried(on: OnCluster, recipe_file: Path) -> None:
    on.act('{"sft": "train"}')
    run = on.submit(recipe_file)
    eventually(has_step(on, run, 5), 90)
    (pod,) = on.pods(run, stage="sft")
    on.kind_cluster.kubectl("-n", NAMESPACE, "delete", "pod", pod["metadata"]["name"], "--force", "--grace-period=0")
    code, output = on.run("submit", str(recipe_file))
    assert code == 0, output


@pytest.mark.parametrize("cascade", ["foreground", "orphan", "background"])
def test_a_stage_whose_job_is_deleted_is_made_again_from_its_checkpoint(
    on: OnCluster, recipe_file: Path, cascade: str
) -> None:
    on.act('{"sft": "train"}')
    run = on.submit(recipe_file)
    eventually(has_step(on, run, 5), 90)
    job, driver = f"{run}-sft", on.drivers(run)
    on.kind_cluster.kubectl("-n", NAMESPACE, "delete", "job", job, f"--cascade={cascade}", "--wait=false")
    code, output = on.run("submit", str(recipe_file))
    assert code == 0, output
    assert f"sft: its Job {job} was deleted; it is created again" in on.run("logs", run, "driver")[1]
    assert "resumes from the checkpoint" in on.run("logs", run, "sft")[1]
    assert on.drivers(run) == driver, "the driver goes on"


def test_submit_ends_when_its_run_is_deleted_in_the_foreground(on: OnCluster, recipe_file: Path) -> None:
    on.act('{"sft": "train"}')
    laptop = on.start("submit", str(recipe_file))
    run = eventually(lambda: next(iter(on.runs()), None), 60)
    eventually(has_step(on, run, 5), 90)
    on.kind_cluster.kubectl("-n", NAMESPACE, "delete", "job", run, "--cascade=foreground", "--wait=false")
    assert laptop.wait(180) != 0
    eventually(lambda: on.kind_cluster.objects(NAMESPACE, "jobs,pods", f"llamarefine/run={run}") == [], 180)


def test_cancel_removes_every_object_within_15_s(on: OnCluster, recipe_file: Path) -> None:
    on.act('{"sft": "train"}')
    run = on.submit(recipe_file)
    eventually(has_step(on, run, 5), 90)
    code, output = on.run("cancel", run)
    assert code == 0, output  # it fails when something is left after 15 s
    assert on.kind_cluster.objects(NAMESPACE, "jobs,pods,configmaps", f"llamarefine/run={run}") == []
    assert "interrupted" in on.run("status", run)[1]


def test_a_run_and_its_log_continue_after_submit_is_killed(on: OnCluster, recipe_file: Path) -> None:
    on.act('{"sft": "train"}')
    laptop = on.start("submit", str(recipe_file))
    run = eventually(lambda: next(iter(on.runs()), None), 60)
    eventually(has_step(on, run, 5), 90)
    laptop.kill()
    laptop.wait()
    code, output = on.run("logs", "-f", run, "driver")
    assert code == 0, output
    assert "evaluate: done" in output
    assert on.kind_cluster.objects(NAMESPACE, "jobs", f"llamarefine/run={run},llamarefine/stage=evaluate")


def test_a_run_driven_from_this_machine_is_owned_by_the_release(on: OnCluster, recipe_file: Path) -> None:
    on.act('{"sft": "train"}')
    laptop = on.start("submit", str(recipe_file), "--foreground")
    run = eventually(lambda: next(iter(on.runs()), None), 60)
    eventually(lambda: on.pods(run, stage="sft"), 90)
    (kept,) = on.kind_cluster.objects(NAMESPACE, "configmaps", f"llamarefine/run={run}")
    assert [owner["name"] for owner in kept["metadata"]["ownerReferences"]] == ["llamarefine-settings"]
    laptop.send_signal(signal.SIGINT)
    assert laptop.wait(60) == 130
    eventually(lambda: on.kind_cluster.objects(NAMESPACE, "jobs,pods,configmaps", f"llamarefine/run={run}") == [])


def test_after_correcting_the_settings_only_the_failed_stage_runs_again(on: OnCluster, recipe_file: Path) -> None:
    huge = {"requests": {"cpu": "1000"}}
    on.act("{}", resources=dict.fromkeys(SEQUENCE, SMALL) | {"sft": huge}, start_timeout_s=30)
    code, output = on.run("submit", str(recipe_file), "--detach")
    assert code == 0, output
    on.act("{}")
    code, output = on.run("submit", str(recipe_file))
    assert "it keeps the settings it was submitted with; to change them, `llamarefine cancel small-" in output
    assert code != 0
    assert "error: sft could not start within 30 s: Unschedulable: 0/1 nodes are available" in output
    code, output = on.run("submit", str(recipe_file))
    assert code == 0, output
    assert "prepare: already in the store" in output
    assert "sft: done" in output


@pytest.fixture
def quota(the_cluster: KindCluster) -> Iterator[None]:
    """A quota of one CPU for the namespace."""
    metadata = {"name": "small", "namespace": NAMESPACE}
    the_cluster.apply(
        {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": metadata, "spec": {"hard": {"requests.cpu": "1"}}}
    )
    yield
    the_cluster.kubectl("-n", NAMESPACE, "delete", "resourcequota", "small")


def assert_status_shows(on: OnCluster, recipe_file: Path, stage: str, reason: str, to_do: str) -> None:
    """Submit, and require that `status` shows `reason` and `to_do` within 30 s after the Job of `stage` exists."""
    run = on.submit(recipe_file, "--set", "prepare.questions.source=python-docstrings")  # no file to upload
    job = run if stage == "driver" else f"{run}-{stage}"
    eventually(lambda: on.kind_cluster.kubectl("-n", NAMESPACE, "get", "job", job, "--ignore-not-found"), 90)

    def shown_reason() -> str | None:
        text = on.run("status", run)[1]
        return text if re.search(reason, text) else None

    assert to_do in eventually(shown_reason, 30)
    assert on.run("cancel", run)[0] == 0


@pytest.mark.parametrize(
    ("settings", "stage", "reason", "to_do"),
    [
        ({"image_tag": "absent"}, "driver", "ErrImage|ImagePullBackOff|ErrImageNeverPull", "check image_registry"),
        ({"secret_name": "absent"}, "driver", 'secret "absent" not found', "kubectl create secret generic absent"),
        ({"secret_name": "wrong"}, "driver", "refuses these credentials .SignatureDoesNotMatch", "check key, secret"),
        ({"store": "s3://absent/x"}, "driver", "there is no bucket `absent`", "create it or correct the store's URI"),
        ({"gpu_resource": "amd.com/gpu"}, "sft", "Unschedulable: .*Insufficient amd.com/gpu", "resources.sft.gpus"),
    ],
)
def test_status_shows_the_reason_within_30_s(
    on: OnCluster, recipe_file: Path, settings: dict[str, Any], stage: str, reason: str, to_do: str
) -> None:
    on.act("{}", **settings)
    assert_status_shows(on, recipe_file, stage, reason, to_do)


def test_status_shows_an_exceeded_quota(on: OnCluster, recipe_file: Path, quota: None) -> None:
    on.act("{}", resources=dict.fromkeys(SEQUENCE, SMALL) | {"sft": {"requests": {"cpu": "2"}}})
    assert_status_shows(on, recipe_file, "sft", "QuotaExceeded: exceeded quota: small", "ask for less (resources.sft)")


def _is_part_of(part: Any, whole: Any) -> bool:
    """Whether `whole` contains all of `part`; the server adds defaults."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(_is_part_of(value, whole.get(name)) for name, value in part.items())
    if isinstance(part, list):
        return isinstance(whole, list) and len(part) == len(whole) and all(map(_is_part_of, part, whole))
    return bool(part == whole or (not part and not whole))
