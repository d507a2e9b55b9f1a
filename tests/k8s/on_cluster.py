"""`llamarefine` as a person runs it beside a real cluster, its stages played by acting.py."""

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
    """`llamarefine` as a person's process, on a namespace whose Secret holds KEY and SECRET."""

    def __init__(self, made: KindCluster, namespace: str, endpoint: str, folder: Path) -> None:
        self.made, self.namespace, self.folder = made, namespace, folder
        self.environment = made.environment | {
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
        """Tell the stages what to do; write the settings."""
        self.settle(**{"patches": patches(IMAGE, acting)} | settings)

    def settle(self, **settings: Any) -> None:
        """Write the settings; stages train unless they are told to act."""
        (self.folder / "llamarefine.yaml").write_text(yaml.safe_dump(self.settings | settings))

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """A command that goes on by itself."""
        return subprocess.Popen(
            ["llamarefine", *arguments], cwd=self.folder, env=self.environment, stdout=subprocess.DEVNULL
        )

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

    def runs(self) -> list[str]:
        """The runs of this test's recipe that the cluster has."""
        maps = self.made.objects(self.namespace, "configmaps", "llamarefine/run")
        ours = [each["metadata"]["name"] for each in maps if self.settings["store"] in each["data"]["llamarefine.yaml"]]
        return [name for name in ours if name.startswith("small-")]

    def pods(self, run: str, **labels: str) -> list[dict[str, Any]]:
        pairs = {"llamarefine/run": run} | {f"llamarefine/{name}": value for name, value in labels.items()}
        return self.made.objects(self.namespace, "pods", ",".join(f"{name}={value}" for name, value in pairs.items()))

    def drivers(self, run: str, phase: str | None = None) -> list[str]:
        """The names of the driver's pods, or of those in one phase."""
        pods = [pod for pod in self.pods(run) if "llamarefine/stage" not in pod["metadata"]["labels"]]
        return [pod["metadata"]["name"] for pod in pods if phase in (None, pod["status"]["phase"])]
