"""`llamarefine` as a user runs it against a real cluster, with acting.py in place of every stage."""

import re
import subprocess
from pathlib import Path
from typing import Any

import yaml

from llamarefine_jobs.contract.stages import SEQUENCE
from tests.chart.kind_cluster import TAG, KindCluster
from tests.s3_server import KEY, SECRET

from .acting import patches

IMAGE = f"localhost/llamarefine-launcher:{TAG}"
SMALL = {"requests": {"cpu": "10m", "memory": "64Mi"}}


class OnCluster:
    """Runs `llamarefine` as a process, on a namespace whose Secret holds KEY and SECRET."""

    def __init__(self, kind_cluster: KindCluster, namespace: str, endpoint: str, folder: Path) -> None:
        self.kind_cluster, self.namespace, self.folder = kind_cluster, namespace, folder
        self.environment = kind_cluster.environment | {
            "AWS_ENDPOINT_URL_S3": endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "LLAMAREFINE_NAMESPACE": self.namespace,
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
        """Write settings in which stages do what `acting` says (see acting.py)."""
        self.write_settings(**{"patches": patches(IMAGE, acting)} | settings)

    def write_settings(self, **settings: Any) -> None:
        """Write settings in which stages really train."""
        (self.folder / "llamarefine.yaml").write_text(yaml.safe_dump(self.settings | settings))

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a command without waiting for it."""
        return subprocess.Popen(
            ["llamarefine", *arguments], cwd=self.folder, env=self.environment, stdout=subprocess.DEVNULL
        )

    def run(self, *arguments: str) -> tuple[int, str]:
        """Run a command to its end; return exit code and output."""
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
        """Submit a recipe without following its log; return the run's name."""
        code, output = self.run("submit", str(recipe), "--detach", *arguments)
        assert code == 0, output
        found = re.search(r"small-[0-9a-f]{8}", output)
        assert found, output
        return found[0]

    def runs(self) -> list[str]:
        """Return the names of this test's runs on the cluster."""
        maps = self.kind_cluster.objects(self.namespace, "configmaps", "llamarefine/run")
        ours = [each["metadata"]["name"] for each in maps if self.settings["store"] in each["data"]["llamarefine.yaml"]]
        return [name for name in ours if name.startswith("small-")]

    def pods(self, run: str, **labels: str) -> list[dict[str, Any]]:
        """Return a run's pods that have these llamarefine/ labels."""
        pairs = {"llamarefine/run": run} | {f"llamarefine/{name}": value for name, value in labels.items()}
        return self.kind_cluster.objects(
            self.namespace, "pods", ",".join(f"{name}={value}" for name, value in pairs.items())
        )

    def drivers(self, run: str, phase: str | None = None) -> list[str]:
        """Return the names of the driver's pods, or of those in one phase."""
        pods = [pod for pod in self.pods(run) if "llamarefine/stage" not in pod["metadata"]["labels"]]
        return [pod["metadata"]["name"] for pod in pods if phase in (None, pod["status"]["phase"])]
