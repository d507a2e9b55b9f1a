"""The demo on a kind cluster, with the images built here, the chart and MinIO; its model equals one machine's."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llamarefine_jobs.contract.stages import SEQUENCE, STAGES
from tests.chaos.on_kind import run_trials
from tests.chart.kind_cluster import KindCluster

from . import kind

pytestmark = pytest.mark.skipif(
    not os.environ.get("LLAMAREFINE_E2E"), reason="takes minutes and 30 GB of disk: `make e2e` runs it"
)
EVERY_KIND = ("configmaps", "jobs", "pods", "events", "services", "deployments", "serviceaccounts", "roles")
PRIVILEGED = """
{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "privileged"}, "spec": {"containers": [
    {"name": "one", "image": "any", "securityContext": {"privileged": true}}]}}
"""
# Prints every object of the bucket under 1 MB: manifests, run records, logs, reports.
BUCKET_TEXTS = """
import boto3, sys
client = boto3.client("s3")
for page in client.get_paginator("list_objects_v2").paginate(Bucket="llamarefine"):
    for item in page.get("Contents", []):
        if item["Size"] < 1_000_000:
            print(item["Key"])
            sys.stdout.buffer.write(client.get_object(Bucket="llamarefine", Key=item["Key"])["Body"].read())
"""


@pytest.fixture(scope="module")
def env(kind_cluster: KindCluster) -> dict[str, str]:
    return kind_cluster.environment


@pytest.fixture(scope="module")
def cluster(env: dict[str, str]) -> str:
    """Run `make kind-up` with every image; return its output."""
    return kind.make(env, "kind-up")


@pytest.fixture(scope="module")
def submitted(env: dict[str, str], cluster: str) -> str:
    """Run `make submit-pipeline` with the demo's recipe until the run has ended; return its output."""
    return kind.make(env, "submit-pipeline")


@pytest.fixture(scope="module")
def pods(env: dict[str, str], submitted: str) -> list[dict[str, Any]]:
    """Return every pod of the namespace after the run, finished ones included."""
    return kind.items(env, "pods")


def stage_of(pod: dict[str, Any]) -> str | None:
    stage: str | None = pod["metadata"]["labels"].get("llamarefine/stage")
    return stage


def sha256_of_files(folder: Path) -> dict[str, str]:
    """Return the sha256 of each file, without one line of the model card.

    The card lists the keys of the parent artifacts. Prepare's key contains how its docstrings were pinned: by the name
    of the image on the cluster, by the Python version elsewhere.
    """
    contents = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    contents["README.md"], lines = re.subn(rb"\| prepare \| `[0-9a-f]{64}` \|\n", b"", contents["README.md"])
    assert lines == 1
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def test_kind_up_prints_the_next_command(cluster: str) -> None:
    assert "make submit-pipeline" in cluster


def test_the_pulled_model_has_the_bytes_of_a_run_on_one_machine(
    env: dict[str, str], submitted: str, tmp_path: Path
) -> None:
    kind.make(env, "pull", MODEL=tmp_path / "pulled")
    machine = tmp_path / "machine"
    machine.mkdir(mode=0o777)
    machine.chmod(0o777)  # the user of the image must write to it
    image = next(pod["spec"]["containers"][0]["image"] for pod in kind.items(env, "pods") if stage_of(pod) == "prepare")
    command = (
        "llamarefine run jobs/recipes/demo.yaml --store /machine/store --into /machine && chmod -R a+rwX /machine/*"
    )
    subprocess.run(
        [str(kind.engine(env)), "run", "--rm", f"--volume={machine}:/machine", "--entrypoint=sh", image, "-c", command],
        env=env,
        check=True,
    )
    pulled = sha256_of_files(tmp_path / "pulled")
    assert any(name.endswith(".safetensors") for name in pulled)
    assert pulled == sha256_of_files(machine / "model")


def test_each_stage_has_one_pod_which_succeeded(pods: list[dict[str, Any]]) -> None:
    phases = [(stage_of(pod), pod["status"]["phase"]) for pod in pods if stage_of(pod)]
    assert sorted(phases) == sorted((stage, "Succeeded") for stage in SEQUENCE)


def test_every_pod_runs_as_a_user_id_with_a_read_only_root_and_no_privileges(pods: list[dict[str, Any]]) -> None:
    assert len(pods) >= len(SEQUENCE) + 2, "expected the stages, the driver and MinIO"
    for pod in pods:
        spec = pod["spec"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == 1000
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in [*spec["containers"], *spec.get("initContainers", [])]:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_no_stage_has_a_token_for_the_api_server(pods: list[dict[str, Any]]) -> None:
    stages = [pod["spec"] for pod in pods if stage_of(pod)]
    assert stages
    for spec in stages:
        assert spec["automountServiceAccountToken"] is False
        sources = [source for volume in spec["volumes"] for source in volume.get("projected", {}).get("sources", [])]
        assert not any("serviceAccountToken" in source for source in sources)


def test_only_stages_that_need_a_gpu_request_one(pods: list[dict[str, Any]]) -> None:
    limits = {
        stage_of(pod): pod["spec"]["containers"][0]["resources"].get("limits", {}).get("nvidia.com/gpu")
        for pod in pods
        if stage_of(pod)
    }
    assert limits == {stage: "1" if STAGES[stage].needs_gpu else None for stage in SEQUENCE}


def test_the_namespace_refuses_a_privileged_pod(env: dict[str, str], cluster: str) -> None:
    command = ["kubectl", "--context", f"kind-{kind.CLUSTER}", "--namespace", kind.NAMESPACE, "apply", "-f", "-"]
    refused = subprocess.run(command, env=env, input=PRIVILEGED, text=True, capture_output=True, check=False)
    assert refused.returncode != 0
    assert 'violates PodSecurity "restricted' in refused.stderr


def test_the_buckets_secret_key_is_in_no_object_no_log_and_not_in_the_bucket(
    env: dict[str, str], pods: list[dict[str, Any]], submitted: str
) -> None:
    encoded = kind.kubectl(
        env, "get", "secret", "llamarefine-bucket", "--output", "jsonpath={.data.AWS_SECRET_ACCESS_KEY}"
    )
    key = base64.b64decode(encoded).decode()
    assert len(key) >= 20
    texts = {"the output of submit": submitted, "objects": str(kind.items(env, *EVERY_KIND))}
    for pod in pods:
        name = pod["metadata"]["name"]
        texts[f"the log of {name}"] = kind.kubectl(env, "logs", name, "--all-containers")
    texts["the bucket"] = subprocess.run(
        [kind.ROOT / "k8s/with-bucket", sys.executable, "-c", BUCKET_TEXTS],
        cwd=kind.ROOT,
        env=env,
        capture_output=True,
        check=True,
    ).stdout.decode(errors="replace")
    assert "manifest.json" in texts["the bucket"], "nothing was read from the bucket"
    assert [place for place, text in texts.items() if key in text or encoded in text] == []


def test_submitting_again_runs_no_stage(env: dict[str, str], pods: list[dict[str, Any]]) -> None:
    """The second run has a driver of its own, which finds every artifact in the bucket."""
    assert "demo" in kind.make(env, "submit-pipeline")
    before = {pod["metadata"]["uid"] for pod in pods}
    made = [pod for pod in kind.items(env, "pods") if pod["metadata"]["uid"] not in before]
    assert made, "the second run created no driver"
    assert [stage_of(pod) for pod in made if stage_of(pod)] == []


def test_kind_up_again_keeps_minio(env: dict[str, str], pods: list[dict[str, Any]]) -> None:
    before = {pod["metadata"]["uid"] for pod in pods if "minio" in pod["metadata"]["name"]}
    assert before
    kind.make(env, "kind-up")
    assert before <= {pod["metadata"]["uid"] for pod in kind.items(env, "pods")}


# Prints the number of processes and the losses of the SFT under each prefix, and downloads its adapter.
TRAININGS = """
import boto3, json, sys
client = boto3.client("s3")
for prefix in sys.argv[2:]:
    found = client.list_objects_v2(Bucket="llamarefine", Prefix=prefix + "/artifacts/sft/")["Contents"]
    names = {item["Key"].rpartition("/")[2]: item["Key"] for item in found}
    metrics = json.loads(client.get_object(Bucket="llamarefine", Key=names["manifest.json"])["Body"].read())["metrics"]
    file = sys.argv[1] + "/" + prefix + ".safetensors"
    client.download_file("llamarefine", names["adapter_model.safetensors"], file)
    print(json.dumps({name: metrics[name] for name in ("processes", "validation_loss", "train_loss")}))
"""


def test_two_nodes_train_the_same_adapter_as_one(env: dict[str, str], submitted: str, tmp_path: Path) -> None:
    """The demo's SFT with the same batches on one node and on two: losses differ by < 1e-3, weights by < 2e-3."""
    from safetensors.numpy import load_file

    for nodes in (1, 2):
        settings = f"--store s3://llamarefine/nodes-{nodes} --set sft.micro_batch_rows=8 --set sft.nodes={nodes}"
        kind.make(env, "submit-pipeline", ARGS=settings)
    indexes = {
        pod["metadata"]["labels"].get("batch.kubernetes.io/job-completion-index")
        for pod in kind.items(env, "pods")
        if stage_of(pod) == "sft" and pod["status"]["phase"] == "Succeeded"
    }
    assert {"0", "1"} <= indexes
    command = [kind.ROOT / "k8s/with-bucket", sys.executable, "-c", TRAININGS, tmp_path, "nodes-1", "nodes-2"]
    output = subprocess.run(command, cwd=kind.ROOT, env=env, capture_output=True, check=True, text=True).stdout
    one, two = (json.loads(line) for line in output.splitlines())
    assert (one.pop("processes"), two.pop("processes")) == (1, 2)
    assert two == pytest.approx(one, abs=1e-3)
    expected, weights = (load_file(tmp_path / f"nodes-{nodes}.safetensors") for nodes in (1, 2))
    assert expected
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert abs(weights[name] - tensor).max() < 2e-3, name


def test_a_run_whose_training_pod_is_deleted_or_killed_ends_with_the_same_model(
    kind_cluster: KindCluster, cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A short form of `make chaos-kind ARGS=--train`, with the real trainers."""
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.setenv(name, "")  # so that the test's end restores what `run_trials` sets
    cases = [("nothing", "step"), ("delete stage", "step"), ("kill stage", "step")]
    report = run_trials(kind_cluster, tmp_path, 1, cases, parallel=3, trains=True)
    assert [trial for trial in report["trials"] if trial["finding"]] == []
    assert [trial["stage_pods"] for trial in report["trials"]] == [1, 2, 2]
    assert "merge/model/model.safetensors" in report["trials"][0]["content"]
