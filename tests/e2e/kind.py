"""A kind cluster for the tests, made by the Makefile's own targets, with what this machine must bring to them."""

import json
import os
import shutil
import subprocess
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Where no registry can be reached, this makes an engine, a node image and a base: its README says how.
SUBSTITUTE = ROOT.parent / "shared" / "kind"
# The same name at every run of a checkout, so that one run removes what a killed one left; another for each checkout.
CLUSTER = TAG = f"llamarefine-e2e-{zlib.crc32(str(ROOT).encode()):08x}"
REGISTRY, NAMESPACE = "localhost", "llamarefine"


def environment(folder: Path) -> dict[str, str]:
    """The environment of every command below: a kubeconfig of our own, and this machine's substitutes."""
    outer = ("ARGS", "IMAGES", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "MAKELEVEL")  # of the `make e2e` around us
    inherited = {name: value for name, value in os.environ.items() if name not in outer}
    ours = inherited | {"CLUSTER": CLUSTER, "NAMESPACE": NAMESPACE, "REGISTRY": REGISTRY, "TAG": TAG}
    ours |= {"GPUS": "2", "KUBECONFIG": str(folder / "config")}
    home = Path(os.environ.get("CLUSTER_HOME", Path.home() / ".cache/llamarefine-cluster"))
    if SUBSTITUTE.exists() and (home / "bin/kind").exists():
        subprocess.run([SUBSTITUTE / "up-engine"], check=True)
        ours["PATH"] = f"{ours['PATH']}:{home / 'bin'}:{folder}"
        (folder / "kubectl").symlink_to(home / "bin/node-tools")  # one program that goes by the name it is called by
        ours.setdefault("KIND_NODE_IMAGE", "localhost/kind-node:dev")
        ours.setdefault("BASE", "localhost/kind-base:dev")
        ours.setdefault("MINIO_BINARY", str(home / "bin/minio"))
    return ours


def missing(env: Mapping[str, str]) -> list[str]:
    """What `make kind-up` needs and this machine lacks."""
    programs = [name for name in ("kind", "helm", "kubectl") if not shutil.which(name, path=env["PATH"])]
    return programs if engine(env) else ["docker or podman", *programs]


def engine(env: Mapping[str, str]) -> str | None:
    """The engine that answers, docker before podman."""
    for name in ("docker", "podman"):
        found = shutil.which(name, path=env["PATH"])
        if found and subprocess.run([found, "info"], capture_output=True, check=False, env=env).returncode == 0:
            return name
    return None


def make(env: Mapping[str, str], target: str, **variables: object) -> str:
    """`make target`, its output; its end is shown where it fails."""
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
    """Every object of `kinds` in the namespace."""
    found: list[dict[str, Any]] = json.loads(kubectl(env, "get", ",".join(kinds), "--output", "json"))["items"]
    return found
