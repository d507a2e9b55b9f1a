"""Create a kind cluster for the tests with the Makefile's targets, and read its objects."""

import json
import os
import shutil
import subprocess
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Builds a container engine, a node image and a base image where no registry can be reached; see its README.
SUBSTITUTE = ROOT.parent / "shared" / "kind"
# One name for each checkout, so that a run removes the cluster that a killed run of the same checkout left.
CLUSTER = TAG = f"llamarefine-e2e-{zlib.crc32(str(ROOT).encode()):08x}"
REGISTRY, NAMESPACE = "localhost", "llamarefine"


def environment(folder: Path) -> dict[str, str]:
    """Return the environment for all commands: a kubeconfig in `folder`, and the substitutes where there are any."""
    outer = ("ARGS", "IMAGES", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "MAKELEVEL")  # set by a surrounding `make e2e`
    inherited = {name: value for name, value in os.environ.items() if name not in outer}
    env = inherited | {"CLUSTER": CLUSTER, "NAMESPACE": NAMESPACE, "REGISTRY": REGISTRY, "TAG": TAG}
    env |= {"GPUS": "2", "KUBECONFIG": str(folder / "config")}
    home = Path(os.environ.get("CLUSTER_HOME", Path.home() / ".cache/llamarefine-cluster"))
    if SUBSTITUTE.exists() and (home / "bin/kind").exists():
        subprocess.run([SUBSTITUTE / "up-engine"], check=True)
        env["PATH"] = f"{env['PATH']}:{home / 'bin'}:{folder}"
        # node-tools runs the program by whose name it is called.
        (folder / "kubectl").symlink_to(home / "bin/node-tools")
        env.setdefault("KIND_NODE_IMAGE", "localhost/kind-node:dev")
        env.setdefault("BASE", "localhost/kind-base:dev")
        env.setdefault("MINIO_BINARY", str(home / "bin/minio"))
    return env


def missing(env: Mapping[str, str]) -> list[str]:
    """Return the names of the programs that `make kind-up` needs and that are not installed."""
    programs = [name for name in ("kind", "helm", "kubectl") if not shutil.which(name, path=env["PATH"])]
    return programs if engine(env) else ["docker or podman", *programs]


def engine(env: Mapping[str, str]) -> str | None:
    """Return the container engine whose daemon answers; docker is preferred to podman."""
    for name in ("docker", "podman"):
        found = shutil.which(name, path=env["PATH"])
        if found and subprocess.run([found, "info"], capture_output=True, check=False, env=env).returncode == 0:
            return name
    return None


def make(env: Mapping[str, str], target: str, **variables: object) -> str:
    """Run `make target` and return its output; if it fails, the assertion shows the end of the output."""
    command = ["make", target, *(f"{name}={value}" for name, value in variables.items())]
    ended = subprocess.run(
        command, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    assert ended.returncode == 0, f"{' '.join(command)}\n{ended.stdout[-6000:]}"
    return ended.stdout


def kubectl(env: Mapping[str, str], *arguments: str) -> str:
    command = ["kubectl", "--context", f"kind-{CLUSTER}", "--namespace", NAMESPACE, *arguments]
    return subprocess.run(command, env=env, text=True, capture_output=True, check=True).stdout


def items(env: Mapping[str, str], *kinds: str) -> list[dict[str, Any]]:
    """Return every object of `kinds` in the namespace."""
    found: list[dict[str, Any]] = json.loads(kubectl(env, "get", ",".join(kinds), "--output", "json"))["items"]
    return found
