"""`k8s/kind-up`, with a shell script that plays docker, kind, helm and kubectl: what it says."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "k8s" / "kind-up"
PROGRAM = """\
#!/usr/bin/env bash
case "$(basename "$0") $*" in
  "kind get nodes "*) echo "$CLUSTER-control-plane" ;;
  "docker image inspect "*) echo sha256:5f ;;
  "docker exec "*" ctr "*) sleep "$SLOW_S"; cat >/dev/null ;;
  "docker save "*) echo archive; exit "${SAVE_FAILS:-0}" ;;
  "helm "*) sleep "$SLOW_S"; exit "${HELM_FAILS:-0}" ;;
  "docker exec "*" kubectl "*) cat >/dev/null ;;
esac
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    for name in ("docker", "kind", "helm", "kubectl", "build"):
        program = tmp_path / name
        program.write_text(PROGRAM)
        program.chmod(0o755)
    variables = {"ENGINE": "docker", "CLUSTER": "llamarefine", "NAMESPACE": "llamarefine", "REGISTRY": "localhost"}
    variables |= {"TAG": "1", "IMAGES": "launcher minio", "GPUS": "0", "IMAGE_LOADER": "kind", "RECIPE": "my.yaml"}
    return os.environ | variables | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLOW_S": "0", "TICK_S": "0.2"}


def run(environment: dict[str, str], **changes: str) -> tuple[int, list[str]]:
    done = subprocess.run(
        [SCRIPT],
        env=environment | changes,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout.splitlines()


def test_each_slow_step_is_named_and_says_that_it_goes_on(environment: dict[str, str]) -> None:
    code, lines = run(environment, SLOW_S="1")
    assert code == 0, lines
    for what in (
        "loading 2 images into llamarefine-control-plane",
        "installing the chart in the namespace llamarefine, and waiting until MinIO is ready",
    ):
        assert what in lines
        assert any(line.startswith("  still going on after ") and line.endswith(what) for line in lines)


@pytest.mark.parametrize("failure", [{"HELM_FAILS": "3"}, {"SAVE_FAILS": "3"}], ids=str)
def test_a_step_that_fails_ends_the_script(environment: dict[str, str], failure: dict[str, str]) -> None:
    code, lines = run(environment, **failure)
    assert code == 3
    assert not any(line.startswith("The cluster") for line in lines)


def test_the_suggested_commands_name_another_cluster_and_namespace(environment: dict[str, str]) -> None:
    assert [line.split("  ")[1] for line in run(environment)[1][-4:]] == [
        "make submit-pipeline",
        "make pull",
        "k8s/with-bucket llamarefine status",
        "make kind-down",
    ]
    assert [line.split("  ")[1] for line in run(environment, NAMESPACE="team", CLUSTER="mine")[1][-4:]] == [
        "make submit-pipeline NAMESPACE=team",
        "make pull NAMESPACE=team",
        "NAMESPACE=team k8s/with-bucket llamarefine status",
        "make kind-down CLUSTER=mine",
    ]
