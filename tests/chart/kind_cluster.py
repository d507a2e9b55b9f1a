"""A kind cluster that holds the images of the launcher and of MinIO, for the tests that need a real API server."""

import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import kind

from .rendering import ROOT, Object

TAG = kind.TAG


class KindCluster:
    """One cluster and the environment that points at it; `output` is what `make kind-up` printed."""

    def __init__(self, environment: dict[str, str], output: str = "") -> None:
        self.environment = environment
        self.output = output

    def run(self, *command: str | Path, check: bool = True, stdin: str | None = None) -> str:
        """Run a program with this cluster's kubeconfig; return its standard output and standard error as one text."""
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
        """Return the objects of these kinds (separated by commas) that have these labels."""
        selector = ["--selector", labels] if labels else []
        found: list[Object] = json.loads(self.kubectl("-n", namespace, "get", kinds, "-o", "json", *selector))["items"]
        return found

    def apply(self, manifest: Object) -> None:
        self.kubectl("apply", "-f", "-", stdin=json.dumps(manifest))

    def make_namespace(self, name: str) -> None:
        """Create a namespace that admits only pods of the restricted standard."""
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})


@contextmanager
def cluster(folder: Path, config: Path | None = None) -> Iterator[KindCluster]:
    """Create a cluster with the chart and MinIO installed, yield it, and delete it.

    It holds only the images that the chart itself runs; a test that needs the stages' images runs `make kind-up` in
    the cluster's environment. `config` is a kind configuration file with the nodes; without it there is one node.
    Skips the test where no cluster can be created.
    """
    environment = kind.environment(folder)
    if lacking := kind.missing(environment):
        pytest.skip(f"a kind cluster cannot be created: {', '.join(lacking)} not found")
    if config:
        environment["KIND_CONFIG"] = str(config)
    kind.make(environment, "kind-down")
    try:
        yield KindCluster(environment, kind.make(environment, "kind-up", IMAGES="launcher minio"))
    finally:
        kind.make(environment, "kind-down")


def eventually(condition: Callable[[], Any], within_s: float = 180) -> Any:
    """Call `condition` until it returns a true value, and return that; fail when `within_s` have passed."""
    until_s = time.monotonic() + within_s
    while not (found := condition()):
        assert time.monotonic() < until_s, f"the condition did not become true within {within_s:g} s"
        time.sleep(0.5)
    return found
