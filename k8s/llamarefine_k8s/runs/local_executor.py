"""Executor: a stage as a process on this machine.

A stage gets a session of its own, so the terminal's Ctrl-C reaches only the launcher, which asks the stage
to stop. Its output goes to a file that is followed here: should the launcher die, the stage still has where
to write, sees its standard input end, saves a checkpoint and stops.
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

from llamarefine_jobs.contract.errors import LlamaRefineError, PreemptedError, by_exit_code
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.retry import GIVE_UP_AFTER_S, GIVE_UP_VARIABLE
from llamarefine_jobs.contract.stages import STAGES
from llamarefine_jobs.recipe_file import to_yaml
from llamarefine_k8s.runs.pipeline import Task
from llamarefine_k8s.runs.signing import SIGNING_KEY

GRACE_S = 120.0  # a checkpoint of a billion parameters goes to a slow disk in less
_POLL_S = 0.05
INSTALL = "pip install 'llamarefine[train]'"
NEEDED = ("torch", "transformers", "trl", "peft", "datasets")

Command = Callable[[str], Sequence[str]]


def stage_command(stage: str) -> Sequence[str]:
    """How a stage is started with this very Python."""
    return (sys.executable, "-m", STAGES[stage].module)


class LocalExecutor:
    """Runs stages as processes, one at a time."""

    read_to: str | None = None  # its lines have no times: a stage's process does not outlive what drives it

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
        """Nothing is left to read; see `pipeline.Executor`."""

    def cancel(self) -> bool:
        """Take note that the stage shall stop; see `pipeline.Executor`."""
        self._cancels += 1
        return self._running

    def _run(self, task: Task, folder: Path, on_line: Callable[[str], None]) -> None:
        recipe, output, last_words = folder / "recipe.yaml", folder / "output", folder / "last-words"
        recipe.write_text(to_yaml(task.recipe), encoding="utf-8")
        last_words.touch()
        arguments = [*self._command(task.stage), "--recipe", str(recipe), "--store", task.store_uri]
        with output.open("wb") as into:
            process = subprocess.Popen(
                arguments,
                stdin=subprocess.PIPE,
                stdout=into,
                stderr=subprocess.STDOUT,
                env=stage_environment(
                    task.recipe,
                    LLAMAREFINE_STOP_AT_EOF="1",
                    LLAMAREFINE_TERMINATION_MESSAGE=str(last_words),
                    **{GIVE_UP_VARIABLE: str(self._give_up_after_s)},
                ),
                start_new_session=True,
            )
        last_line = ""
        with process, output.open("rb") as lines, _killed_at_the_end(process):
            for line in self._follow(process, lines.read, task.stage):
                last_line = line or last_line
                on_line(line)
        if process.returncode:
            raise self._error(task.stage, process.returncode, last_words, last_line)

    def _follow(self, process: subprocess.Popen[bytes], read: Callable[[], bytes], stage: str) -> Iterator[str]:
        """The lines that the process writes, until it ends; meanwhile it is stopped when asked."""
        pending = b""
        kill_at_s = float("inf")
        while True:
            ended = process.poll() is not None  # asked first: all it wrote is then there to read
            *lines, pending = (pending + read()).split(b"\n")
            yield from map(_text, lines)
            if ended:
                break
            if self._cancels and kill_at_s == float("inf"):
                kill_at_s = time.monotonic() + self._grace_s
                process.terminate()
                yield f"{stage}: {_stopping(stage)}; Ctrl-C again ends it at once"
            if self._cancels > 1 or time.monotonic() > kill_at_s:
                _kill(process)
            time.sleep(_POLL_S)
        if pending:
            yield _text(pending)

    def _error(self, stage: str, returncode: int, last_words: Path, last_line: str) -> LlamaRefineError:
        if returncode < 0:
            return _ended_by_signal(stage, -returncode, asked=self._cancels > 0)
        with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
            return by_exit_code(returncode)(str(json.loads(last_words.read_bytes())["message"]))
        said = last_line.removeprefix(f"{stage}: error: ") or "it said nothing"
        return by_exit_code(returncode)(f"{stage} ended with exit code {returncode}: {said}")


def infer(recipe: Recipe, store_uri: str, arguments: Sequence[str]) -> int:
    """Answer prompts in a process that has this terminal; its exit code, its own words stand there already."""
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
    """What the stage infer is told on its command line; a conversation where nothing is asked."""
    arguments = ["--model", model]
    arguments += ["--prompts", prompts] if prompts else []
    arguments += ["--answers", answers] if answers else []
    arguments += ["--set", f"infer.max_new_tokens={max_new_tokens}"] if max_new_tokens else []
    arguments += [word for override in overrides for word in ("--set", override)]
    return [*arguments, "--", *questions] if questions or prompts else [*arguments, "--interactive"]


def require_train_extra() -> None:
    """Raise in one line where what stages stand on is not installed. Imports none of it."""
    missing = missing_libraries()
    if missing:
        raise LlamaRefineError(
            f"stages cannot run on this machine: {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not "
            f"installed; {INSTALL}"
        )


def missing_libraries() -> list[str]:
    """What stages stand on and this Python lacks."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def stage_environment(recipe: Recipe, **more: str) -> dict[str, str]:
    """This process's environment, and what a stage on this machine is told on top."""
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | more
    # A stage imports thousands of modules: 5 s when they are compiled, 14 s when each process compiles them anew.
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment.pop(SIGNING_KEY, None)  # it is the driver's alone
    if recipe.cpu_threads:
        environment["OMP_NUM_THREADS"] = str(recipe.cpu_threads)
    return environment


def _ended_by_signal(stage: str, number: int, asked: bool) -> LlamaRefineError:
    if asked:
        return PreemptedError(f"{stage} was ended before it had saved")
    if number == signal.SIGKILL:
        return LlamaRefineError(
            f"{stage} was killed by signal 9 (SIGKILL), often for lack of memory: a smaller micro_batch_rows or "
            "max_length_tokens needs less, and the same command goes on from the last checkpoint"
        )
    return LlamaRefineError(f"{stage} was ended by signal {number} ({signal.strsignal(number)}); its log may say more")


@contextlib.contextmanager
def _killed_at_the_end(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Leave no stage behind when following it fails here."""
    try:
        yield
    finally:
        if process.poll() is None:
            _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _stopping(stage: str) -> str:
    return "stopping, a checkpoint is saved first" if STAGES[stage].has_checkpoints else "stopping"


def _text(line: bytes) -> str:
    """A line as text, of a redrawn one what stood there last."""
    return line.decode(errors="replace").rstrip("\r").rpartition("\r")[2].rstrip()
