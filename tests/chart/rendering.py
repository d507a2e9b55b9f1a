"""Render the chart with the real helm and read the result as Kubernetes objects."""

import json
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts/llamarefine"
DEMO = ROOT / "jobs/recipes/demo.yaml"

BUCKET = {"settings": {"store": "s3://bucket/prefix"}}
MINIO = {"minio": {"enabled": True}, "secret": {"accessKeyId": "key", "secretAccessKey": "secret-key"}}

Object = dict[str, Any]
Values = dict[str, Any]


def program(name: str) -> str | None:
    """Return the path of `name`, found on the PATH or in the folder of the locally built cluster tools."""
    built = Path(os.environ.get("CLUSTER_HOME", Path.home() / ".cache/llamarefine-cluster"), "bin")
    return shutil.which(name) or shutil.which(name, path=str(built))


needs_helm = pytest.mark.skipif(program("helm") is None, reason="helm is not installed")


def helm(*arguments: str | Path, values: Values | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run helm with `values` as its values file on standard input."""
    command = [str(program("helm")), *map(str, arguments), *(["--values", "-"] if values is not None else [])]
    values_file = None if values is None else yaml.safe_dump(values)
    done = subprocess.run(command, input=values_file, capture_output=True, text=True, timeout=300, check=False)
    assert not check or done.returncode == 0, done.stderr
    return done


def render(values: Values, *options: str) -> list[Object]:
    """Return every object of a release, hooks such as the Helm test included."""
    return [found for found in yaml.safe_load_all(_rendered_text(json.dumps(values), *options)) if found]


@cache
def _rendered_text(values: str, *options: str) -> str:
    arguments = ("template", "llamarefine", CHART, "--namespace", "team", "--kube-version", "1.34")
    return helm(*arguments, *options, values=json.loads(values)).stdout


def refusal(values: Values) -> str:
    """Return the error that helm prints for invalid values."""
    done = helm("template", "x", CHART, "--kube-version", "1.34", values=values, check=False)
    assert done.returncode != 0, done.stdout
    return done.stderr


def one(objects: list[Object], kind: str, name: str = "") -> Object:
    """Return the only object of a kind whose name begins with `name`; hooks do not count."""
    found = [each for each in objects if each["kind"] == kind and each["metadata"]["name"].startswith(name)]
    found = [each for each in found if not is_hook(each)]
    assert len(found) == 1, [each["metadata"]["name"] for each in found]
    return found[0]


def is_hook(each: Object) -> bool:
    """Whether helm creates this object only for a hook, such as `helm test`."""
    return "helm.sh/hook" in each["metadata"].get("annotations", {})


def settings_text(objects: list[Object]) -> str:
    """Return the text of llamarefine.yaml, which the launcher reads."""
    text: str = one(objects, "ConfigMap", "llamarefine-settings")["data"]["llamarefine.yaml"]
    return text


def pods(objects: list[Object]) -> dict[str, Object]:
    """Return the pod template of each object that has one, by the object's name."""
    templates = ((each["metadata"]["name"], each.get("spec", {}).get("template")) for each in objects)
    return {name: template for name, template in templates if template}
