"""A kind cluster with the launcher's and MinIO's images in it, for the tests that need a real API server."""

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
    """One cluster, under a kubeconfig of its own. `said` is what `make kind-up` said."""

    def __init__(self, environment: dict[str, str], said: str = "") -> None:
        self.environment = environment
        self.said = said

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

    def apply(self, manifest: Object) -> None:
        self.kubectl("apply", "-f", "-", stdin=json.dumps(manifest))

    def make_namespace(self, name: str) -> None:
        """A namespace that takes restricted pods only."""
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        self.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})


@contextmanager
def cluster(folder: Path, config: Path | None = None) -> Iterator[KindCluster]:
    """A cluster with MinIO and the chart, and of the images only those that the chart itself runs; gone afterwards.

    Skips where none can be made. `make kind-up` in its environment brings the stages' images, too. Its nodes are those
    of `config`, kind's own file; one without.
    """
    environment = kind.environment(folder)
    if lacking := kind.missing(environment):
        pytest.skip(f"no cluster can be made here: {', '.join(lacking)} not found")
    if config:
        environment["KIND_CONFIG"] = str(config)
    kind.make(environment, "kind-down")
    try:
        yield KindCluster(environment, kind.make(environment, "kind-up", IMAGES="launcher minio"))
    finally:
        kind.make(environment, "kind-down")


def eventually(true: Callable[[], Any], within_s: float = 180) -> Any:
    """What `true` gives as soon as it is anything; fails when that takes too long."""
    until_s = time.monotonic() + within_s
    while not (found := true()):
        assert time.monotonic() < until_s, f"not within {within_s:g} s"
        time.sleep(0.5)
    return found
