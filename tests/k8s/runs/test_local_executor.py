"""The local executor, with real processes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from llamarefine_jobs.contract.errors import (
    DataError,
    DivergedError,
    LlamaRefineError,
    PreemptedError,
)
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.store import Store
from llamarefine_k8s.runs import local_executor
from llamarefine_k8s.runs.local_executor import LocalExecutor, infer_arguments, stage_environment
from llamarefine_k8s.runs.pipeline import Task
from llamarefine_k8s.runs.plan import newest_checkpoint
from tests.k8s import acting
from tests.k8s.acting import HANG_S

ACTING = str(Path(acting.__file__))


@pytest.fixture
def task(recipe: Callable[..., Recipe], store: Store) -> Task:
    """The stage sft, with its parent published."""
    acting.publish("prepare", recipe(), store)
    return Task("small-12345678", "sft", "5f" * 32, recipe(), store.uri)


def execute(task: Task, act: str | None = None, executor: LocalExecutor | None = None) -> list[str]:
    """Run the stage's process; return its lines."""
    lines: list[str] = []
    os.environ["ACTING"] = f'{{"{task.stage}": "{act}"}}'
    try:
        (executor or acting_executor()).execute(task, lines.append)
    finally:
        del os.environ["ACTING"]
    return lines


def acting_executor(grace_s: float = 30) -> LocalExecutor:
    return LocalExecutor(grace_s, command=lambda stage: (sys.executable, ACTING, stage))


def cancel_at_first_progress(executor: LocalExecutor, times: int = 1) -> Callable[[str], None]:
    """Return a callback for lines that calls `cancel`, as a signal handler would, at the first line of progress."""

    def on_line(line: str) -> None:
        if line.startswith("progress") and not executor._cancels:
            for _ in range(times):
                assert executor.cancel()

    return on_line


def processes(task: Task) -> list[int]:
    """Return the ids of the processes that work on the task's store."""
    listing = subprocess.check_output(["ps", "-ww", "-eo", "pid=,args="], text=True).splitlines()
    return [int(line.split()[0]) for line in listing if f"--store {task.store_uri}" in line]


def test_a_stages_lines_are_passed_on_one_by_one(task: Task) -> None:
    lines = execute(task, "say much")
    assert lines[0].startswith("sft: makes ")
    assert lines[1] == "redrawn noise", "text that was overwritten on its line is left out"
    assert lines[2].startswith("no newline at the endsft: published ")


def test_a_real_stage_without_its_parent_names_the_stage_to_run_first(
    recipe: Callable[..., Recipe], store: Store
) -> None:
    task = Task("small-12345678", "sft", "5f" * 32, recipe(), store.uri)
    with pytest.raises(DataError, match="sft needs the artifact of prepare"):
        LocalExecutor().execute(task, lambda line: None)


def test_a_stages_error_keeps_its_kind_and_message(task: Task) -> None:
    with pytest.raises(DivergedError) as caught:
        execute(task, "diverge")
    assert str(caught.value) == "sft: the loss became NaN at step 3; lower sft.learning_rate"


def test_an_unexpected_exception_has_a_traceback_in_the_log_and_a_one_line_error(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setenv("ACTING", '{"sft": "bug"}')
    with pytest.raises(LlamaRefineError, match=r"^sft failed unexpectedly: ZeroDivisionError: a bug$"):
        acting_executor().execute(task, lines.append)
    assert "Traceback (most recent call last):" in lines


def test_the_error_of_a_stage_that_cannot_start_is_its_last_line(task: Task) -> None:
    executor = LocalExecutor(command=lambda stage: (sys.executable, "-c", "raise SystemExit('no such thing')"))
    with pytest.raises(LlamaRefineError, match=r"^sft ended with exit code 1: no such thing$"):
        execute(task, executor=executor)


def test_the_error_of_a_killed_stage_names_a_likely_reason(task: Task) -> None:
    with pytest.raises(LlamaRefineError, match=r"sft was killed by signal 9 \(SIGKILL\), often because memory ran out"):
        execute(task, "kill itself")


def test_a_cancelled_stage_saves_a_checkpoint_and_resumes_from_it(
    task: Task, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACTING", '{"sft": "train"}')
    executor = acting_executor()
    with pytest.raises(PreemptedError):
        executor.execute(task, cancel_at_first_progress(executor))
    assert not list(store.entries("artifacts/sft/"))
    keys = {entry.path.split("/")[2] for entry in store.entries("checkpoints/sft/")}
    assert len(keys) == 1
    step = newest_checkpoint(store, "sft", keys.pop())
    assert step is not None
    assert f"sft: resumes from the checkpoint at step {step}" in execute(task, "train")


def test_a_second_cancel_kills_the_stage(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """The grace period is longer than the stage hangs, so only the second cancel can kill the stage."""
    monkeypatch.setenv("ACTING", '{"sft": "hang"}')
    executor = acting_executor(grace_s=10 * HANG_S)
    with pytest.raises(PreemptedError, match="killed before it saved a checkpoint"):
        executor.execute(task, cancel_at_first_progress(executor, times=2))


def test_a_stage_that_does_not_stop_is_killed_after_the_grace_period(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACTING", '{"sft": "hang"}')
    executor = acting_executor(grace_s=0.5)
    with pytest.raises(PreemptedError, match="killed before it saved a checkpoint"):
        executor.execute(task, cancel_at_first_progress(executor))


def test_cancel_returns_false_if_no_stage_is_running() -> None:
    assert LocalExecutor().cancel() is False


def test_a_stage_has_its_own_session_so_ctrl_c_does_not_reach_it(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTING", '{"sft": "hang"}')
    executor = acting_executor()
    sessions: list[int] = []

    def on_line(line: str) -> None:
        if line.startswith("progress"):
            sessions.extend(os.getsid(pid) for pid in processes(task))
            executor.cancel()
            executor.cancel()

    with pytest.raises(PreemptedError):
        executor.execute(task, on_line)
    assert len(sessions) == 1
    assert sessions[0] != os.getsid(0)


def test_an_error_in_the_launcher_kills_the_stage(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACTING", '{"sft": "hang"}')

    def on_line(line: str) -> None:
        if line.startswith("progress"):
            assert processes(task)
            raise OSError("no space left for the log")

    with pytest.raises(OSError, match="no space left"):
        acting_executor().execute(task, on_line)
    assert not processes(task)


def test_missing_libraries_are_an_error_before_anything_starts(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_executor, "NEEDED", ("torch", "no_such_library"))
    with pytest.raises(LlamaRefineError, match=r"no_such_library is not installed; pip install 'llamarefine\[train\]'"):
        execute(task)


def test_cpu_threads_of_the_recipe_sets_omp_num_threads(recipe: Callable[..., Recipe]) -> None:
    assert stage_environment(recipe("cpu_threads=3"))["OMP_NUM_THREADS"] == "3"


def test_infer_gets_the_questions_and_options_of_the_command() -> None:
    arguments = infer_arguments(["-what?", "why?"], ["infer.top_p=0.5"], model="sft", max_new_tokens=7)
    assert arguments == [
        *("--model", "sft", "--set", "infer.max_new_tokens=7", "--set", "infer.top_p=0.5"),
        *("--", "-what?", "why?"),
    ]
    assert infer_arguments([], [], model="merged") == ["--model", "merged", "--interactive"]
