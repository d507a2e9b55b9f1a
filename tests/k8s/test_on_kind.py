"""The launcher against a real cluster: stages that act, in pods, with their log, their end and their replacement."""

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from llamarefine_jobs.contract.stages import SEQUENCE
from tests.chart.kind_cluster import TAG, KindCluster, cluster, eventually
from tests.e2e import kind
from tests.s3_server import KEY, SECRET, find_minio

from .acting import STEPS

pytestmark = pytest.mark.skipif(
    not os.environ.get("LLAMAREFINE_E2E"), reason="builds images and takes minutes: `make e2e` runs it"
)
NAMESPACE = "launcher"
SECRET_OBJECT = f"""\
apiVersion: v1
kind: Secret
metadata: {{name: llamarefine-bucket, namespace: {NAMESPACE}}}
stringData: {{AWS_ACCESS_KEY_ID: {KEY}, AWS_SECRET_ACCESS_KEY: {SECRET}}}
"""
SMALL = {"requests": {"cpu": "10m", "memory": "64Mi"}}


@pytest.fixture(scope="module")
def the_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KindCluster]:
    folder = tmp_path_factory.mktemp("kind")
    missing = kind.missing(kind.environment(folder)) + ([] if find_minio() else ["minio"])
    if missing:
        pytest.skip(f"no cluster can be made here: {', '.join(missing)} not found")
    with cluster(folder) as made:
        acting = Path(__file__).parent / "acting.py"
        for stage in SEQUENCE:
            context = tmp_path_factory.mktemp("image")
            shutil.copy(acting, context)
            entry = f'ENTRYPOINT ["python", "/acting.py", "{stage}"]'
            (context / "Dockerfile").write_text(
                f"FROM localhost/llamarefine-launcher:{TAG}\nCOPY acting.py /\n{entry}\n"
            )
            made.environment["DOCKER_BUILDKIT"] = "0"
            made.run("docker", "build", "-t", f"localhost/llamarefine-{stage}:{TAG}", context)
        images = [f"localhost/llamarefine-{stage}:{TAG}" for stage in SEQUENCE]
        made.run("kind", "load", "docker-image", "--name", made.name, *images)
        made.make_namespace(NAMESPACE)
        made.kubectl("apply", "-f", "-", stdin=SECRET_OBJECT)
        # The chart brings account and permissions; its bucket is the one below.
        store = ["--set", "settings.store=s3://llamarefine/chart", "--set", "networkPolicy.enabled=false"]
        made.run("helm", "install", "llamarefine", "charts/llamarefine", "-n", NAMESPACE, *store)
        yield made


@pytest.fixture(scope="module")
def endpoint(the_cluster: KindCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A MinIO on this machine, at the address by which the nodes see it."""
    template = "{{range .IPAM.Config}}{{.Gateway}} {{end}}"
    gateway = re.search(r"\d+\.\d+\.\d+\.\d+", the_cluster.run("docker", "network", "inspect", "-f", template, "kind"))
    assert gateway
    with socket.socket() as probe:
        probe.bind((gateway[0], 0))
        port = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("minio")
    (folder / "llamarefine").mkdir()  # a bucket
    process = subprocess.Popen(
        [str(find_minio()), "server", "--quiet", "--address", f"{gateway[0]}:{port}", str(folder)],
        env={**os.environ, "MINIO_ROOT_USER": KEY, "MINIO_ROOT_PASSWORD": SECRET, "MINIO_BROWSER": "off"},
    )
    yield f"http://{gateway[0]}:{port}"
    process.terminate()
    process.wait(30)


class OnCluster:
    """`llamarefine` as a person's process, on the cluster's namespace."""

    def __init__(self, made: KindCluster, endpoint: str, folder: Path) -> None:
        self.made, self.folder = made, folder
        self.environment = made.environment | {
            "AWS_ENDPOINT_URL_S3": endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "LLAMAREFINE_NAMESPACE": NAMESPACE,
        }
        self.settings: dict[str, Any] = {
            "store": f"s3://llamarefine/{folder.name}",
            "s3_endpoint": endpoint,
            "image_registry": "localhost",
            "image_tag": TAG,
            "gpu_resource": None,
            "resources": dict.fromkeys(SEQUENCE, SMALL),
        }

    def act(self, acting: str, **settings: Any) -> None:
        """Tell the stages what to do; write the settings."""
        container = {"name": "stage", "env": [{"name": "ACTING", "value": acting}]}
        patch = {"spec": {"template": {"spec": {"containers": [container]}}}}
        text = yaml.safe_dump(self.settings | {"patches": {"all": patch}} | settings)
        (self.folder / "llamarefine.yaml").write_text(text)

    def run(self, *arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            ["llamarefine", *arguments],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
            check=False,
        )
        return done.returncode, done.stdout

    def submit(self, recipe: Path, *arguments: str) -> str:
        """Submit and leave; the run's name."""
        code, said = self.run("submit", str(recipe), "--detach", *arguments)
        assert code == 0, said
        found = re.search(r"small-[0-9a-f]{8}", said)
        assert found, said
        return found[0]

    def pods(self, run: str, **labels: str) -> list[dict[str, Any]]:
        pairs = {"llamarefine/run": run} | {f"llamarefine/{name}": value for name, value in labels.items()}
        return self.made.objects(NAMESPACE, "pods", ",".join(f"{name}={value}" for name, value in pairs.items()))

    def drivers(self, run: str, phase: str | None = None) -> list[str]:
        """The names of the driver's pods, or of those in one phase."""
        pods = [pod for pod in self.pods(run) if "llamarefine/stage" not in pod["metadata"]["labels"]]
        return [pod["metadata"]["name"] for pod in pods if phase in (None, pod["status"]["phase"])]


@pytest.fixture
def on(the_cluster: KindCluster, endpoint: str, tmp_path: Path) -> OnCluster:
    made = OnCluster(the_cluster, endpoint, tmp_path)
    made.act("{}")
    return made


def has_step(on: OnCluster, run: str, step: int) -> Callable[[], bool]:
    return lambda: f"step={step} " in on.run("logs", run, "sft")[1]


def test_a_run_is_submitted_once_and_leaves_its_story(on: OnCluster, recipe_file: Path) -> None:
    run = on.submit(recipe_file)
    code, said = on.run("submit", str(recipe_file))
    assert code == 0, said
    assert "runs already; this attaches to it" in said
    assert "evaluate: done" in said
    assert "done" in on.run("status", run)[1]
    assert "sft: published" in on.run("logs", run, "sft")[1]
    jobs = on.made.objects(NAMESPACE, "jobs", f"llamarefine/run={run}")
    assert {job["metadata"]["name"] for job in jobs} == {run, *(f"{run}-{stage}" for stage in SEQUENCE)}


def test_what_a_dry_run_prints_is_what_is_made(on: OnCluster, recipe_file: Path) -> None:
    shown = list(yaml.safe_load_all(on.run("submit", str(recipe_file), "--dry-run")[1]))
    run = on.submit(recipe_file)
    eventually(lambda: len(on.pods(run)) > len(SEQUENCE), 120)
    made = {each["metadata"]["name"]: each for each in on.made.objects(NAMESPACE, "jobs", f"llamarefine/run={run}")}
    jobs = [each for each in shown if each["kind"] == "Job"]
    assert len(jobs) == len(SEQUENCE) + 1
    for job in jobs:
        there = made[job["metadata"]["name"]]
        if "llamarefine/key" in there["metadata"]["labels"]:  # known only once the stage's parents are made
            for labels in (job["metadata"]["labels"], job["spec"]["template"]["metadata"]["labels"]):
                labels["llamarefine/key"] = there["metadata"]["labels"]["llamarefine/key"]
        assert job["metadata"]["labels"] == there["metadata"]["labels"]
        assert _within(job["spec"], there["spec"]), job["metadata"]["name"]


def test_neither_a_killed_driver_nor_a_killed_stage_loses_or_repeats_anything(on: OnCluster, recipe_file: Path) -> None:
    on.act('{"sft": "train"}')
    run = on.submit(recipe_file)
    eventually(has_step(on, run, 20), 90)
    first = on.drivers(run)
    on.made.kubectl("-n", NAMESPACE, "delete", "pod", *first)
    eventually(lambda: on.drivers(run, "Running") not in ([], first))
    for each in on.pods(run, stage="sft"):
        on.made.kubectl("-n", NAMESPACE, "delete", "pod", each["metadata"]["name"])
    code, said = on.run("submit", str(recipe_file))
    assert code == 0, said
    log = on.run("logs", run, "sft")[1]
    on.made.kubectl("-n", NAMESPACE, "delete", "jobs", "-l", f"llamarefine/run={run}")
    kept = on.run("logs", run, "sft")[1]
    assert [int(step) for step in re.findall(r"progress stage=sft step=(\d+)", kept)] == list(range(1, STEPS + 1))
    assert "goes on from the checkpoint" in log


def test_a_stages_failure_comes_back_with_its_words_and_its_code(on: OnCluster, recipe_file: Path) -> None:
    on.act('{"sft": "diverge"}')
    code, said = on.run("submit", str(recipe_file))
    assert code == 15
    assert said.splitlines()[-1] == "error: sft: the loss became NaN at step 3; lower sft.learning_rate"
    run = re.search(r"small-[0-9a-f]{8}", said)
    assert run
    assert len(on.pods(run[0], stage="sft")) == 1


def test_cancel_leaves_nothing_behind_within_15_s(on: OnCluster, recipe_file: Path) -> None:
    on.act('{"sft": "train"}')
    run = on.submit(recipe_file)
    eventually(has_step(on, run, 5), 90)
    began_s = time.monotonic()
    code, said = on.run("cancel", run)
    assert code == 0, said
    assert time.monotonic() - began_s < 17  # 15 and the start of two processes
    assert on.made.objects(NAMESPACE, "jobs,pods,configmaps", f"llamarefine/run={run}") == []
    assert "interrupted" in on.run("status", run)[1]


@pytest.mark.parametrize(
    ("settings", "word", "to_do"),
    [
        ({"image_tag": "absent"}, "ErrImage|ImagePullBackOff|ErrImageNeverPull", "image_tag"),
        ({"gpu_resource": "nvidia.com/gpu"}, "Unschedulable: .*Insufficient nvidia.com/gpu", "resources.sft.gpus"),
        ({"secret_name": "absent"}, 'secret "absent" not found', "kubectl create secret generic absent"),
    ],
)
def test_status_names_the_reason_within_30_s(
    on: OnCluster, recipe_file: Path, settings: dict[str, Any], word: str, to_do: str
) -> None:
    on.act("{}", **settings)
    run = on.submit(recipe_file)

    def said() -> str | None:
        text = on.run("status", run)[1]
        return text if re.search(word, text) else None

    assert to_do in eventually(said, 40 if "gpu_resource" in settings else 30)  # a GPU is asked for by the second stage
    assert on.run("cancel", run)[0] == 0


def _within(part: Any, whole: Any) -> bool:
    """Whether all of `part` stands in `whole`, to which the server added its defaults."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(_within(value, whole.get(name)) for name, value in part.items())
    if isinstance(part, list):
        return isinstance(whole, list) and len(part) == len(whole) and all(map(_within, part, whole))
    return bool(part == whole or (not part and not whole))
