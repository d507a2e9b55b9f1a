"""`k8s/with-bucket`: the release's settings and keys, and a forwarded port that is forwarded again when it breaks.

A shell script plays kubectl: `port-forward` says its port a moment after it starts, as the real one does.
"""

import base64
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "k8s" / "with-bucket"
KUBECTL = """\
#!/usr/bin/env bash
echo "$*" >>"$CALLS"
case "$*" in
  *" get configmap "*) echo 'secret_name: keys' ;;
  *" get service "*) ;;
  *" get secret "*) [ -z "${NO_SECRET:-}" ] || { echo 'secrets "keys" is forbidden' >&2; exit 1; }; printf %s "$KEY" ;;
  *" port-forward "*)
    [ -z "${NO_FORWARD:-}" ] || { echo 'error: no pod is running' >&2; exit 1; }
    [ -z "${SLOW_S:-}" ] || sleep "$SLOW_S"
    port=${*: -1}; port=${port%:9000}
    echo "Forwarding from 127.0.0.1:${port:-41234} -> 9000"
    echo $$ >>"$FORWARDS"
    exec sleep 600 ;;
esac
"""
WAIT_FOR_TWO = """\
import os, signal, time
read = lambda: open(os.environ["FORWARDS"]).read().split()
os.kill(int(read()[0]), signal.SIGKILL)
until_s = time.monotonic() + 20
while len(read()) < 2:
    assert time.monotonic() < until_s, "not forwarded again"
    time.sleep(0.05)
print(os.environ["AWS_ENDPOINT_URL_S3"])
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    kubectl = tmp_path / "bin" / "kubectl"
    kubectl.parent.mkdir()
    kubectl.write_text(KUBECTL)
    kubectl.chmod(0o755)
    return os.environ | {
        "PATH": f"{kubectl.parent}:{os.environ['PATH']}",
        "KEY": base64.b64encode(b"very secret").decode(),
        "CALLS": str(tmp_path / "calls"),
        "FORWARDS": str(tmp_path / "forwards"),
    }


def run(environment: dict[str, str], *command: str, **changes: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, *command], env=environment | changes, capture_output=True, text=True, timeout=60, check=False
    )


def printed(*names: str) -> tuple[str, ...]:
    return (sys.executable, "-c", f"import os; print(*(os.environ[name] for name in {names}))")


def is_alive(pid: str) -> bool:
    stat = Path("/proc", pid, "stat")
    return stat.exists() and stat.read_text().rpartition(") ")[2][0] != "Z"


def test_the_command_gets_the_forwarded_port_and_the_keys_each_time(environment: dict[str, str]) -> None:
    """Twenty at once: on a busy machine the background process starts late."""
    command = printed("AWS_ENDPOINT_URL_S3", "AWS_SECRET_ACCESS_KEY")
    with ThreadPoolExecutor(20) as pool:
        for done in pool.map(lambda _: run(environment, *command), range(20)):
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout == "http://127.0.0.1:41234 very secret\n"


def test_a_port_that_is_forwarded_late_is_waited_for(environment: dict[str, str]) -> None:
    assert run(environment, *printed("AWS_ENDPOINT_URL_S3"), SLOW_S="1").returncode == 0


def test_a_port_forward_that_dies_is_made_again_on_the_same_port(environment: dict[str, str], tmp_path: Path) -> None:
    done = run(environment, sys.executable, "-c", WAIT_FOR_TWO)
    assert (done.returncode, done.stdout) == (0, "http://127.0.0.1:41234\n"), done.stderr
    forwards = [line.split()[-1] for line in (tmp_path / "calls").read_text().splitlines() if "port-forward" in line]
    assert forwards == [":9000", "41234:9000"]


def test_the_port_forward_ends_with_the_command_whose_exit_code_is_kept(
    environment: dict[str, str], tmp_path: Path
) -> None:
    assert run(environment, "bash", "-c", "exit 7").returncode == 7
    assert not any(is_alive(pid) for pid in (tmp_path / "forwards").read_text().split())


@pytest.mark.parametrize(
    ("variable", "complaint"),
    [
        ("NO_FORWARD", "with-bucket: MinIO in llamarefine cannot be reached: error: no pod is running\n"),
        (
            "NO_SECRET",
            "with-bucket: the key AWS_ACCESS_KEY_ID of MinIO in llamarefine cannot be read: "
            'secrets "keys" is forbidden\n',
        ),
    ],
)
def test_what_cannot_be_read_or_reached_is_named(environment: dict[str, str], variable: str, complaint: str) -> None:
    done = run(environment, "true", **{variable: "1"})
    assert (done.returncode, done.stderr) == (1, complaint)


def test_suggested_commands_name_another_namespace(environment: dict[str, str]) -> None:
    shown = printed("LLAMAREFINE_COMMAND")
    assert run(environment, *shown).stdout == f"{SCRIPT} llamarefine\n"
    assert run(environment, *shown, NAMESPACE="team").stdout == f"NAMESPACE=team {SCRIPT} llamarefine\n"
