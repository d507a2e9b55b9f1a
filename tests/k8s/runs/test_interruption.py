"""`llamarefine run` interrupted by signals or killed: artifacts and checkpoints stay, and the same command resumes."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from llamarefine_jobs.store import Store
from llamarefine_k8s.runs.records import all_runs
from tests.k8s.conftest import Launcher, wait_until

TRAIN = '{"sft": "train"}'


@pytest.fixture
def training(launcher: Launcher, recipe_file: Path, store: Store) -> subprocess.Popen[str]:
    """A launcher whose stage sft has reached step 3."""
    process = launcher.start("run", str(recipe_file), "--store", store.uri, ACTING=TRAIN)
    log = Path(store.objects.root, "runs")
    wait_until(lambda: any("step=3 " in path.read_text() for path in log.glob("*/logs/sft.log")))
    return process


def stage_processes(store: Store) -> str:
    """Return the command lines of the stages' processes that work on the store."""
    listing = subprocess.check_output(["ps", "-ww", "-eo", "args="], text=True).splitlines()
    return "\n".join(line for line in listing if "acting.py" in line and store.uri in line)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_a_checkpoint_and_the_same_command_resumes_from_it(
    launcher: Launcher,
    training: subprocess.Popen[str],
    recipe_file: Path,
    store: Store,
    number: signal.Signals,
) -> None:
    os.killpg(training.pid, number)  # a terminal signals every process of the foreground group
    _, err = training.communicate(timeout=30)
    assert training.returncode == 130
    last = err.splitlines()[-1]
    found = re.fullmatch(
        r"interrupted in sft; kept: prepare, sft's checkpoint at step (\d+); rerun the same command to resume", last
    )
    assert found, last
    assert not stage_processes(store)
    assert launcher.run("status", "--store", store.uri)[1].startswith("small-")
    code, _, err = launcher.run("run", str(recipe_file), "--store", store.uri, ACTING=TRAIN)
    assert code == 0
    assert f"sft: resumes from the checkpoint at step {found[1]}" in err.splitlines()
    assert "prepare: already in the store" in err


def test_a_second_signal_kills_a_stage_that_hangs(launcher: Launcher, recipe_file: Path, store: Store) -> None:
    process = launcher.start("run", str(recipe_file), "--store", store.uri, ACTING='{"sft": "hang"}')
    runs = Path(store.objects.root, "runs")
    wait_until(lambda: any("progress" in path.read_text() for path in runs.glob("*/logs/sft.log")))
    process.send_signal(signal.SIGINT)
    wait_until(lambda: any("and stopping" in path.read_text() for path in runs.glob("*/logs/sft.log")))
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "interrupted in sft; kept: prepare; rerun the same command to resume"
    assert not stage_processes(store)


def test_after_the_launcher_is_killed_the_stage_stops_and_the_run_counts_as_interrupted(
    launcher: Launcher, training: subprocess.Popen[str], recipe_file: Path, store: Store
) -> None:
    assert all_runs(store)[0].state == "running"
    training.kill()
    training.wait()
    record = all_runs(store)[0]
    assert record.state == record.stages["sft"].state == "interrupted"
    wait_until(lambda: not stage_processes(store))
    assert list(store.entries("checkpoints/sft/")), "the stage saved a checkpoint when its launcher died"
    code, _, err = launcher.run("run", str(recipe_file), "--store", store.uri, ACTING=TRAIN)
    assert code == 0
    assert "sft: resumes from the checkpoint at step" in err


def test_a_killed_stage_fails_the_run_and_the_same_command_resumes(
    launcher: Launcher, recipe_file: Path, store: Store
) -> None:
    code, _, err = launcher.run("run", str(recipe_file), "--store", store.uri, ACTING='{"dpo": "kill itself"}')
    assert code == 1
    assert err.splitlines()[-1].startswith("error: dpo was killed by signal 9 (SIGKILL), often because memory ran out")
    code, out, err = launcher.run("run", str(recipe_file), "--store", store.uri)
    assert code == 0
    assert "sft: already in the store" in err
    assert "by both" in out
