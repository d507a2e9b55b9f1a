"""A kind cluster with the launcher's and MinIO's images in it, for the tests that install the chart for real."""

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.e2e import kind

from .rendering import ROOT, Object

TAG = "chart-test"


class KindCluster:
    """One cluster of its own, under a kubeconfig of its own."""

    def __init__(self, name: str, environment: dict[str, str]) -> None:
        self.name = name
        self.environment = environment

    def run(self, *command: str | Path, check: bool = True, stdin: str | None = None) -> str:
        """Run a program with this cluster's kubeconfig; what it said, both streams."""
        done = subprocess.run(
            [*map(str, command)],
            input=stdin,
            env=self.environment,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
            check=False,
        )
        assert not check or done.returncode == 0, f"{command}:\n{done.stdout}"
        return done.stdout

    def kubectl(self, *arguments: str, check: bool = True, stdin: str | None = None) -> str:
        return self.run("kubectl", *arguments, check=check, stdin=stdin)

    def objects(self, namespace: str, kinds: str, labels: str = "") -> list[Object]:
        """The objects of some kinds in a namespace."""
        selector = ["--selector", labels] if labels else []
        found: list[Object] = json.loads(self.kubectl("-n", namespace, "get", kinds, "-o", "json", *selector))["items"]
        return found

    def make_namespace(self, name: str) -> None:
        """A namespace that takes restricted pods only."""
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        manifest: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "Namespace",
            "metadata": {"name": name, "labels": labels},
        }
        self.kubectl("apply", "-f", "-", stdin=json.dumps(manifest))


@contextmanager
def cluster(folder: Path) -> Iterator[KindCluster]:
    """A cluster that has the images, gone afterwards."""
    name = f"llamarefine-chart-{os.getpid()}"
    made = KindCluster(name, kind.environment(folder))
    node = made.environment.get("KIND_NODE_IMAGE")
    made.run("make", "image-launcher", "image-minio", "ENGINE=docker", "REGISTRY=localhost", f"TAG={TAG}")
    try:
        made.run("kind", "create", "cluster", "--name", name, "--wait", "180s", *(["--image", node] if node else []))
        images = [f"localhost/llamarefine-{each}:{TAG}" for each in ("launcher", "minio")]
        made.run("kind", "load", "docker-image", "--name", name, *images)
        yield made
    finally:
        made.run("kind", "delete", "cluster", "--name", name, check=False)


def eventually(true: Callable[[], Any], within_s: float = 60) -> Any:
    """What `true` gives as soon as it is anything; fails when that takes too long."""
    until_s = time.monotonic() + within_s
    while not (found := true()):
        assert time.monotonic() < until_s, f"not within {within_s:g} s"
        time.sleep(0.5)
    return found
