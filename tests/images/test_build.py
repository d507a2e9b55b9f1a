"""Build the launcher's image and run it as a cluster does. `make e2e` also builds the stages' images."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llamarefine_jobs.contract.version import __version__

from ..e2e import kind

pytestmark = pytest.mark.skipif(
    not os.environ.get("LLAMAREFINE_E2E"), reason="builds images and takes minutes: `make e2e` runs it"
)
IMAGE = f"{kind.REGISTRY}/llamarefine-launcher:{kind.TAG}"
RESTRICTED = ("--read-only", "--cap-drop=ALL", "--security-opt=no-new-privileges")


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    env = kind.environment(tmp_path_factory.mktemp("engine"))
    if kind.engine(env) is None:
        pytest.skip("needs docker or podman, and none answers")
    kind.make(env, "image-launcher")
    return env


def run(env: dict[str, str], *arguments: str) -> str:
    command = [str(kind.engine(env)), "run", "--rm", *RESTRICTED, *arguments]
    return subprocess.run(command, env=env, text=True, capture_output=True, check=True).stdout


def test_the_command_runs_with_a_read_only_root_and_without_privileges(env: dict[str, str]) -> None:
    assert run(env, IMAGE, "--version").strip() == __version__
    assert run(env, "--entrypoint=id", IMAGE, "-u").strip() == "1000"


def test_the_image_contains_no_training_library(env: dict[str, str]) -> None:
    words = "stages cannot run here: torch, transformers, peft, datasets not installed"
    assert words in run(env, IMAGE, "version")


def test_the_image_contains_no_build_leftovers_but_compiled_bytecode(env: dict[str, str]) -> None:
    """The image has no package manager's cache, no uv and no certificate of the building machine. It has bytecode."""
    left = run(env, "--entrypoint=find", IMAGE, "/tmp", "/scratch", "/var/lib/apt/lists", "-type", "f")
    assert left == ""
    assert run(env, "--entrypoint=find", IMAGE, "/opt", "/usr", "-name", "uv", "-type", "f") == ""
    compiled = run(env, "--entrypoint=find", IMAGE, "/opt/llamarefine/.venv", "-name", "cli.*.pyc")
    assert "llamarefine_k8s/__pycache__/cli." in compiled
    private = "\n".join(path.read_text() for path in Path("/usr/local/share/ca-certificates").glob("*.crt"))
    if private:
        trusted = run(env, "--entrypoint=cat", IMAGE, "/etc/ssl/certs/ca-certificates.crt")
        assert private.split("\n")[1] not in trusted


def test_labels_and_environment_name_the_commit_it_was_built_from(env: dict[str, str]) -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=kind.ROOT, text=True, capture_output=True, check=True
    ).stdout
    command = [str(kind.engine(env)), "image", "inspect", IMAGE]
    (image,) = json.loads(subprocess.run(command, env=env, text=True, capture_output=True, check=True).stdout)
    config: dict[str, Any] = image["Config"]
    assert config["Labels"]["org.opencontainers.image.revision"] == commit.strip()
    assert config["Labels"]["org.opencontainers.image.version"] == __version__
    assert f"LLAMAREFINE_GIT_COMMIT={commit.strip()}" in config["Env"]
