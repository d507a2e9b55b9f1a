"""Executor that runs a stage as a process on this machine.

The process has a session of its own, so Ctrl-C in the terminal reaches only the launcher, which then sends SIGTERM to
the stage. The stage's output goes to a file, which the launcher reads as it grows. So a stage whose launcher dies can
still write; it sees the end of its standard input, saves a checkpoint and stops.
"""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from llamarefine_jobs.contract.environment import GIVE_UP_VARIABLE, STOP_AT_EOF, TERMINATION_MESSAGE
from llamarefine_jobs.contract.errors import LlamaRefineError, PreemptedError, by_exit_code
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.retry import GIVE_UP_AFTER_S
from llamarefine_jobs.contract.stages import STAGES
from llamarefine_jobs.recipe_file import to_yaml
from llamarefine_jobs.store import Store
from llamarefine_k8s.runs.pipeline import Task
from llamarefine_k8s.runs.plan import plan
from llamarefine_k8s.runs.signing import SIGNING_KEY

GRACE_S = 120.0  # enough to save a checkpoint of a billion parameters to a slow disk
_POLL_S = 0.05
INSTALL = "pip install 'llamarefine[train]'"
NEEDED = ("torch", "transformers", "peft", "datasets")

Command = Callable[[str], Sequence[str]]


def stage_command(stage: str) -> Sequence[str]:
    """Return the command that runs a stage with this Python interpreter."""
    return (sys.executable, "-m", STAGES[stage].module)


class LocalExecutor:
    """Runs stages as processes, one at a time."""

    read_to: str | None = None  # unused: a stage's process ends with its driver, so no log is ever read on

    def __init__(
        self,
        grace_s: float = GRACE_S,
        command: Command = stage_command,
        give_up_after_s: float = GIVE_UP_AFTER_S,
    ) -> None:
        self._grace_s = grace_s
        self._give_up_after_s = give_up_after_s
        self._command = command
        self._running = False
        self._cancels = 0

    def execute(self, task: Task, on_line: Callable[[str], None]) -> None:
        """Run a stage; see `pipeline.Executor`."""
        self._running = True
        try:
            require_train_extra()
            with tempfile.TemporaryDirectory(prefix="llamarefine-launcher-") as folder:
                self._run(task, Path(folder), on_line)
        finally:
            self._running = False

    def finish(self, task: Task, on_line: Callable[[str], None]) -> None:
        """Do nothing: no output is ever left unread; see `pipeline.Executor`."""

    def cancel(self) -> bool:
        """Record that the stage must stop; see `pipeline.Executor`."""
        self._cancels += 1
        return self._running

    def _run(self, task: Task, folder: Path, on_line: Callable[[str], None]) -> None:
        recipe, output, message_file = folder / "recipe.yaml", folder / "output", folder / "message"
        recipe.write_text(to_yaml(task.recipe), encoding="utf-8")
        message_file.touch()
        arguments = [*self._command(task.stage), "--recipe", str(recipe), "--store", task.store_uri]
        with output.open("wb") as into:
            process = subprocess.Popen(
                arguments,
                stdin=subprocess.PIPE,
                stdout=into,
                stderr=subprocess.STDOUT,
                env=stage_environment(task.recipe)
                | {
                    STOP_AT_EOF: "1",
                    TERMINATION_MESSAGE: str(message_file),
                    GIVE_UP_VARIABLE: str(self._give_up_after_s),
                },
                start_new_session=True,
            )
        last_line = ""
        with process, output.open("rb") as lines, _kill_on_exit(process):
            for line in self._follow(process, lines.read, task.stage):
                last_line = line or last_line
                on_line(line)
        if process.returncode:
            raise self._error(task.stage, process.returncode, message_file, last_line)

    def _follow(self, process: subprocess.Popen[bytes], read: Callable[[], bytes], stage: str) -> Iterator[str]:
        """Yield the lines that the process writes until it ends; terminate or kill it after `cancel`."""
        pending = b""
        kill_at_s = float("inf")
        while True:
            ended = process.poll() is not None  # checked before reading, so that the last read gets all it wrote
            *lines, pending = (pending + read()).split(b"\n")
            yield from map(_text, lines)
            if ended:
                break
            if self._cancels and kill_at_s == float("inf"):
                kill_at_s = time.monotonic() + self._grace_s
                process.terminate()
                yield f"{stage}: {_stopping_text(stage)}; press Ctrl-C again to kill it"
            if self._cancels > 1 or time.monotonic() > kill_at_s:
                _kill(process)
            time.sleep(_POLL_S)
        if pending:
            yield _text(pending)

    def _error(self, stage: str, returncode: int, message_file: Path, last_line: str) -> LlamaRefineError:
        if returncode < 0:
            return _ended_by_signal(stage, -returncode, cancelled=self._cancels > 0)
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            return by_exit_code(returncode)(str(json.loads(message_file.read_bytes())["message"]))
        reason = last_line.removeprefix(f"{stage}: error: ") or "it printed nothing"
        return by_exit_code(returncode)(f"{stage} ended with exit code {returncode}: {reason}")


def infer(recipe: Recipe, store_uri: str, arguments: Sequence[str]) -> int:
    """Run the stage infer in a process that uses this terminal; return its exit code. It prints its own errors."""
    require_train_extra()
    with tempfile.TemporaryDirectory(prefix="llamarefine-launcher-") as folder:
        file = Path(folder, "recipe.yaml")
        file.write_text(to_yaml(recipe), encoding="utf-8")
        command = [*stage_command("infer"), "--recipe", str(file), "--store", store_uri, *arguments]
        return subprocess.run(command, env=stage_environment(recipe), check=False).returncode


def infer_arguments(
    questions: Sequence[str],
    overrides: Sequence[str],
    *,
    prompts: str | None = None,
    answers: str | None = None,
    model: str,
    max_new_tokens: int | None = None,
) -> list[str]:
    """Return the command-line arguments of the stage infer; a conversation if there is no question and no `prompts`."""
    arguments = ["--model", model]
    arguments += ["--prompts", prompts] if prompts else []
    arguments += ["--answers", answers] if answers else []
    arguments += ["--set", f"infer.max_new_tokens={max_new_tokens}"] if max_new_tokens else []
    arguments += [word for override in overrides for word in ("--set", override)]
    return [*arguments, "--", *questions] if questions or prompts else [*arguments, "--interactive"]


def require_libraries_for(recipe: Recipe, store: Store) -> None:
    """Raise LlamaRefineError if a stage of a pinned recipe is due and a library that it needs is not installed."""
    if missing_libraries() and any(stage.state != "there" for stage in plan(recipe, store)):
        require_train_extra()


def require_train_extra() -> None:
    """Raise LlamaRefineError if a library that stages need is not installed. Imports none of them."""
    missing = missing_libraries()
    if missing:
        raise LlamaRefineError(
            f"stages cannot run on this machine: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not "
            f"installed; {INSTALL}"
        )


def missing_libraries() -> list[str]:
    """Return the libraries that stages need and that are not installed here."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def stage_environment(recipe: Recipe) -> dict[str, str]:
    """Return the environment of a stage on this machine: a changed copy of this process's."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    # A stage imports thousands of modules: 5 s if they are compiled, 14 s if each process compiles them again.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment.pop(SIGNING_KEY, None)  # only the driver signs
    if recipe.cpu_threads:
        environment["OMP_NUM_THREADS"] = str(recipe.cpu_threads)
    return environment


def _ended_by_signal(stage: str, number: int, cancelled: bool) -> LlamaRefineError:
    if cancelled:
        return PreemptedError(f"{stage} was killed before it saved a checkpoint")
    if number == signal.SIGKILL:
        return LlamaRefineError(
            f"{stage} was killed by signal 9 (SIGKILL), often because memory ran out: set micro_batch_rows "
            "to fewer rows, or lower max_length_tokens, and rerun the same command; it resumes from the last checkpoint"
        )
    return LlamaRefineError(f"{stage} was killed by signal {number} ({signal.strsignal(number)}); see its log")


@contextlib.contextmanager
def _kill_on_exit(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Kill the process if it is still running at the end, because reading its output failed."""
    try:
        yield
    finally:
        if process.poll() is None:
            _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _stopping_text(stage: str) -> str:
    return "saving a checkpoint and stopping" if STAGES[stage].has_checkpoints else "stopping"


def _text(line: bytes) -> str:
    """Return a line as text; of a line redrawn with carriage returns, only the last version."""
    return line.decode(errors="replace").rstrip("\r").rpartition("\r")[2].rstrip()
