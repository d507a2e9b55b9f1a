"""`preflight` and `submit` on a real cluster: permissions, chart, Secrets, admission, quota, nodes, GPU memory."""

import base64
import json
import os
import secrets
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.kind_cluster import KindCluster
from tests.contract.test_memory import TINYLLAMA
from tests.e2e import kind
from tests.s3_server import KEY, SECRET, S3Server

pytestmark = pytest.mark.skipif(not os.environ.get("LLAMAREFINE_E2E"), reason="makes a cluster: `make e2e` runs it")

STAGES = ("driver", "prepare", "sft", "dpo", "merge", "evaluate")
SMALL = {"requests": {"cpu": "10m", "memory": "64Mi"}}


class Namespace:
    """A namespace with the chart installed, and `llamarefine` run on it from a folder of its own."""

    def __init__(self, made: KindCluster, store: str, server: S3Server, folder: Path) -> None:
        self.made, self.store, self.folder = made, store, folder
        self.name = f"team-{secrets.token_hex(3)}"
        self.environment = made.environment | server.environment | {"LLAMAREFINE_NAMESPACE": self.name}
        made.make_namespace(self.name)
        self.kubectl(
            "create", "secret", "generic", "llamarefine-bucket",
            f"--from-literal=AWS_ACCESS_KEY_ID={KEY}", f"--from-literal=AWS_SECRET_ACCESS_KEY={SECRET}",
        )  # fmt: skip
        made.run(
            "helm", "install", "llamarefine", "charts/llamarefine", "-n", self.name, f"--set=settings.store={store}"
        )
        self.write_settings()

    def kubectl(self, *arguments: str) -> str:
        return self.made.kubectl("-n", self.name, *arguments)

    def write_settings(self, **settings: Any) -> None:
        """Write llamarefine.yaml, whose settings override the chart's."""
        text = yaml.safe_dump({"resources": dict.fromkeys(STAGES, SMALL)} | settings)
        (self.folder / "llamarefine.yaml").write_text(text)

    def run(self, *arguments: str) -> tuple[int, str]:
        done = subprocess.run(
            ["llamarefine", *arguments],
            cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=120, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout

    def preflight(self, *arguments: str) -> dict[str, str]:
        """Return state and text of each check, by name."""
        _, out = self.run("preflight", *arguments, "--json")
        checks = json.loads(out.rpartition("]")[0] + "]")
        return {check["name"]: f"{check['state']} {check['text']}; {check['to_do']}" for check in checks}

    def become(self, user: str) -> None:
        """Create a service account without permissions and use it from now on."""
        self.kubectl("create", "serviceaccount", user)
        config = yaml.safe_load(Path(self.environment["KUBECONFIG"]).read_text())
        config["users"][0]["user"] = {"token": self.kubectl("create", "token", user).strip()}
        (self.folder / "kubeconfig").write_text(yaml.safe_dump(config))
        self.environment["KUBECONFIG"] = str(self.folder / "kubeconfig")

    def grant(self, user: str) -> None:
        self.kubectl("create", "rolebinding", user, "--role=llamarefine-driver", f"--serviceaccount={self.name}:{user}")


@pytest.fixture
def team(kind_cluster: KindCluster, s3_uri: str, s3: S3Server, tmp_path: Path) -> Iterator[Namespace]:
    made = Namespace(kind_cluster, s3_uri, s3, tmp_path)
    yield made
    kind_cluster.kubectl("delete", "namespace", made.name, "--wait=false")


@pytest.fixture
def problems(team: Namespace, recipe_file: Path) -> Callable[..., dict[str, str]]:
    """Returns the preflight checks of the recipe that are not ok."""
    return lambda *arguments: {
        name: text for name, text in team.preflight(str(recipe_file), *arguments).items() if not text.startswith("ok")
    }


def test_a_complete_setup_passes_and_nothing_is_created(
    team: Namespace, problems: Callable[..., dict[str, str]], recipe_file: Path
) -> None:
    before = team.kubectl("get", "jobs,configmaps,pods,events", "-o", "name")
    assert problems() == {}
    assert team.run("preflight", str(recipe_file))[0] == 0
    assert team.kubectl("get", "jobs,configmaps,pods,events", "-o", "name") == before
    assert team.run("submit", str(recipe_file), "--detach")[0] == 0
    assert "FAIL" not in "".join(problems().values()), "the run's own objects exist now"


def test_missing_permissions_are_named_with_the_command_that_grants_them(team: Namespace, recipe_file: Path) -> None:
    team.become("alice")
    checks = team.preflight(str(recipe_file))
    account = f"system:serviceaccount:{team.name}:alice"
    assert checks["permissions"].startswith(f"FAIL {account} may not create, get, list, watch, delete jobs.batch;")
    assert f"--role=llamarefine-driver --serviceaccount={team.name}:alice" in checks["permissions"]
    assert checks["questions"].startswith("ok"), "the other checks are made"
    team.grant("alice")
    code, out = team.run("preflight", str(recipe_file))
    assert code == 0, out
    assert "you may not list nodes" in out
    assert "you may not read it" in out


def test_missing_permissions_of_the_driver_are_reported(
    team: Namespace, problems: Callable[..., dict[str, str]]
) -> None:
    team.kubectl("delete", "rolebinding", "llamarefine-driver")
    assert set(problems()) == {"driver's permissions"}
    assert f"--serviceaccount={team.name}:llamarefine-driver" in problems()["driver's permissions"]


def test_an_invalid_token_is_reported(team: Namespace, recipe_file: Path) -> None:
    team.become("alice")
    path = team.folder / "kubeconfig"
    config = yaml.safe_load(path.read_text())
    header, payload, _ = config["users"][0]["user"]["token"].split(".")
    signature = base64.urlsafe_b64encode(secrets.token_bytes(256)).decode().rstrip("=")
    config["users"][0]["user"] = {"token": f"{header}.{payload}.{signature}"}
    path.write_text(yaml.safe_dump(config))
    assert "does not accept these credentials (401)" in team.preflight(str(recipe_file))["cluster"]


def test_a_missing_chart_and_a_missing_namespace_are_reported(team: Namespace, recipe_file: Path) -> None:
    team.environment["LLAMAREFINE_NAMESPACE"] = "default"
    checks = team.preflight(str(recipe_file), "--store", team.store)
    assert "has no ConfigMap llamarefine-settings; install the chart" in checks["chart"]
    assert checks["service accounts"].startswith("FAIL namespace default has no service account llamarefine-driver")
    team.environment["LLAMAREFINE_NAMESPACE"] = "nowhere"
    checks = team.preflight(str(recipe_file))
    assert checks["namespace"].startswith("FAIL there is no namespace nowhere")
    assert set(checks) == {"cluster", "permissions", "namespace", "questions", "preferences", "base"}


def test_a_missing_secret_or_key_is_named_and_no_value_is_printed(team: Namespace, recipe_file: Path) -> None:
    team.kubectl("create", "secret", "generic", "half", "--from-literal=AWS_ACCESS_KEY_ID=AKIAHALF")
    team.write_settings(secret_name="half", image_pull_secrets=["registry"])
    code, out = team.run("preflight", str(recipe_file))
    assert code == 1
    assert "Secret half: has no AWS_SECRET_ACCESS_KEY" in out
    assert f"Secret registry: is not in namespace {team.name}; kubectl -n {team.name} create secret" in out
    assert "AKIAHALF" not in out
    assert SECRET not in out


@pytest.mark.parametrize("may_make_pods", [True, False])
def test_pods_that_admission_refuses_are_named_with_its_message(
    team: Namespace, problems: Callable[..., dict[str, str]], may_make_pods: bool
) -> None:
    if not may_make_pods:
        team.grant("alice")
        team.become("alice")
    team.write_settings(patches={"sft": {"spec": {"template": {"spec": {"hostNetwork": True}}}}})
    failures = {name: text for name, text in problems().items() if text.startswith("FAIL")}
    assert set(failures) == {"admission: sft"}
    assert 'violate PodSecurity "restricted' in failures["admission: sft"].replace("violates", "violate")


@pytest.mark.parametrize("may_make_pods", [True, False])
def test_an_exceeded_quota_is_reported(
    team: Namespace, problems: Callable[..., dict[str, str]], may_make_pods: bool
) -> None:
    team.kubectl("create", "quota", "small", "--hard=requests.memory=100Mi")
    if not may_make_pods:
        team.grant("alice")
        team.kubectl("create", "rolebinding", "looks", "--clusterrole=view", f"--serviceaccount={team.name}:alice")
        team.become("alice")
    team.write_settings(
        resources={**dict.fromkeys(STAGES, SMALL), "merge": {"requests": {"cpu": "10m", "memory": "1Gi"}}}
    )
    failures = [text for text in problems().values() if text.startswith("FAIL")]
    assert len(failures) == 1
    assert "requests.memory" in failures[0]
    assert "ask for less" in failures[0]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"node_selector": {"disk": "fast"}}, "does not have the label disk=fast"),
        ({"resources": {**dict.fromkeys(STAGES, SMALL), "sft": {**SMALL, "gpus": 8}}}, "has 2 nvidia.com/gpu, not 8"),
        ({"gpu_resource": "amd.com/gpu"}, "has 0 amd.com/gpu, not 1"),
    ],
)
def test_a_stage_that_fits_on_no_node_is_named(
    team: Namespace, problems: Callable[..., dict[str, str]], settings: dict[str, Any], reason: str
) -> None:
    team.write_settings(**settings)
    assert reason in problems()["node for sft"]
    assert problems()["node for sft"].startswith("FAIL it fits on none of 1")
    team.write_settings(**settings, queue="gpus")
    assert problems()["node for sft"].startswith("warning")


def test_a_training_that_needs_far_more_than_the_gpu_has_is_not_submitted(
    team: Namespace, recipe_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/config.json").write_text(json.dumps({"model_type": "llama", **TINYLLAMA}))
    recipe_file.write_text(recipe_file.read_text().replace("tiny-llama", str(tmp_path / "base")))
    team.made.kubectl("label", "node", f"{kind.CLUSTER}-control-plane", "nvidia.com/gpu.memory=3072", "--overwrite")
    assert team.preflight(str(recipe_file))["GPU memory for sft"].startswith("FAIL at least 5.2 GiB of the 3.0 GiB")
    code, out = team.run("submit", str(recipe_file), "--detach")
    assert code == 14
    assert out.startswith("error: GPU memory for sft: at least 5.2 GiB of the 3.0 GiB")
    assert team.kubectl("get", "jobs,pods", "-o", "name") == ""
    assert team.run("submit", str(recipe_file), "--detach", "--no-memory-check")[0] == 0
    team.run("cancel", "small")
    team.made.kubectl("label", "node", f"{kind.CLUSTER}-control-plane", "nvidia.com/gpu.memory-")
