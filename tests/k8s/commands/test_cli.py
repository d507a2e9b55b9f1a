"""The command line, as people and scripts meet it."""

import json
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from llamarefine_jobs.contract.stages import SEQUENCE
from llamarefine_jobs.recipe_file import load_recipe
from llamarefine_jobs.store import Store
from llamarefine_k8s.cli import cli
from tests.k8s.conftest import Launcher

COMMANDS = {
    "init",
    "plan",
    "preflight",
    "run",
    "submit",
    "status",
    "logs",
    "cancel",
    "runs",
    "pull",
    "report",
    "infer",
    "verify",
    "gc",
    "version",
}
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")

OPTIONS = [
    (name, parameter)
    for name, command in cli.commands.items()
    for parameter in command.params
    if isinstance(parameter, click.Option)
]


def test_the_commands_are_these() -> None:
    assert set(cli.commands) == COMMANDS


@pytest.mark.parametrize(("command", "option"), OPTIONS, ids=lambda value: getattr(value, "name", value))
def test_every_flag_has_an_environment_variable_and_a_help_text(command: str, option: click.Option) -> None:
    flag = next(name for name in option.opts if name.startswith("--"))
    assert option.envvar == "LLAMAREFINE_" + flag.removeprefix("--").replace("-", "_").upper()
    assert option.show_envvar
    assert option.help
    assert option.help.endswith((".", "]"))


def test_options_were_found() -> None:
    assert len(OPTIONS) > 20


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_helps(command: str) -> None:
    result = CliRunner().invoke(cli, [command, "--help"])
    assert result.exit_code == 0
    assert result.output.startswith(f"Usage: cli {command}")


def test_help_takes_less_than_half_a_second_of_a_core() -> None:
    """In seconds of the processor, not of the clock: other work on the machine must not fail it."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-c", "from llamarefine_k8s.cli import main; main()", "--help"],
            check=True,
            capture_output=True,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.5


HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "unsloth")


def test_the_launcher_imports_nothing_that_trains(launcher: Launcher, recipe_file: Path, store: Store) -> None:
    """Over a whole run: the launcher drives the stages, and none of their libraries comes into its process."""
    script = (
        "import sys, runpy\n"
        "try:\n    runpy.run_path(sys.argv.pop(1), run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        f"print('IMPORTED', [name for name in {HEAVY} if name in sys.modules])\n"
    )
    process = subprocess.run(
        [sys.executable, "-c", script, _acting_launcher(), "run", str(recipe_file), "--store", store.uri],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.stdout.splitlines()[-1] == "IMPORTED []", process.stderr


@pytest.mark.parametrize("module", ["pydantic", "rich", "boto3", "yaml", "kubernetes"])
def test_help_imports_only_click(module: str) -> None:
    script = f"import sys, llamarefine_k8s.cli; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_run_that_is_piped_is_plain_lines(launcher: Launcher, recipe_file: Path, store: Store) -> None:
    code, out, err = launcher.run("run", str(recipe_file), "--store", store.uri)
    assert code == 0
    assert not CONTROL.search(out), "even the control characters of a model's answer are gone"
    assert not CONTROL.search(err)
    lines = err.splitlines()
    assert re.fullmatch(r"small-[0-9a-f]{8}  in .*store", lines[0])
    for stage in SEQUENCE:
        assert f"{stage}: starts" in lines
        assert any(re.fullmatch(rf"{stage}: done in \d+ s, [0-9a-f]{{12}}", line) for line in lines)
    for shown in (
        "Held-out loss",
        "base + SFT",
        "better",
        "What is kind?",
        "nine rows are few",
        "infer small-",
    ):
        assert shown in out


def test_what_to_type_next_begins_as_its_wrapper_says(launcher: Launcher, recipe_file: Path, store: Store) -> None:
    wrapper = "k8s/with-bucket llamarefine"
    code, out, _ = launcher.run("run", str(recipe_file), "--store", store.uri, LLAMAREFINE_COMMAND=wrapper)
    assert code == 0
    assert re.search(r"^  k8s/with-bucket llamarefine pull small-\w+ --into ./model --store file:", out, re.MULTILINE)


def test_progress_in_a_pipe_is_a_line_now_and_then(launcher: Launcher, recipe_file: Path, store: Store) -> None:
    code, _, err = launcher.run("run", str(recipe_file), "--store", store.uri, ACTING='{"sft": "many steps"}')
    assert code == 0
    lines = [line for line in err.splitlines() if line.startswith("sft: step")]
    assert lines == ["sft: step 1/500, loss 3, 5,120 tokens/s, 1 min 05 s left"]


def test_the_second_run_runs_nothing_and_is_quick(launcher: Launcher, recipe_file: Path, store: Store) -> None:
    launcher.run("run", str(recipe_file), "--store", store.uri)
    began_s = time.perf_counter()
    code, out, err = launcher.run("run", str(recipe_file), "--store", store.uri)
    assert time.perf_counter() - began_s < 5
    assert code == 0
    assert "starts" not in err
    assert "Held-out loss" in out


def test_json_is_all_that_is_on_standard_output(launcher: Launcher, recipe_file: Path, store: Store) -> None:
    flags = ("--store", store.uri, "--json")
    planned = json.loads(launcher.run("plan", str(recipe_file), *flags)[1])
    assert set(planned) == {"run", "store", "stages"}
    assert [stage["stage"] for stage in planned["stages"]] == list(SEQUENCE)
    assert set(planned["stages"][0]) == {
        "stage",
        "state",
        "key",
        "reasons",
        "took_s",
        "estimated_gpu_memory_bytes",
    }
    ended = json.loads(launcher.run("run", str(recipe_file), *flags)[1])
    assert ended["run"] == planned["run"]
    assert json.loads(launcher.run("status", *flags)[1]) == ended
    assert json.loads(launcher.run("status", planned["run"][:8], *flags)[1]) == ended
    assert json.loads(launcher.run("runs", *flags)[1]) == [ended]
    assert ended["state"] == "done"
    assert set(ended["stages"]) == set(SEQUENCE)
    assert set(ended["stages"]["sft"]) == {
        *("state", "key", "attempts", "started_at", "finished_at", "progress", "error", "log", "log_sha256")
    }


def test_an_option_is_over_the_environment_and_that_over_the_file(
    launcher: Launcher, recipe_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "llamarefine.yaml").write_text("store: ./from-file\n")

    def store(*flags: str, **environment: str) -> str:
        return str(json.loads(launcher.run("plan", str(recipe_file), "--json", *flags, **environment)[1])["store"])

    assert store().endswith("/from-file")
    assert store(LLAMAREFINE_STORE="from-environment").endswith("/from-environment")
    assert store("--store", "from-flag", LLAMAREFINE_STORE="from-environment").endswith("/from-flag")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("run", "none.yaml"), 10, "error: none.yaml: no such recipe; `llamarefine init` writes one to start from"),
        (("run", "recipe.yaml", "--set", "dpo.bata=1"), 10, "did you mean `dpo.beta`?"),
        (("run", "recipe.yaml", "--set", "prepare.questions.source=gone.csv"), 11, "there is no "),
        (("plan", "recipe.yaml", "--store", "ftp://x"), 10, "expected file:// or s3://, found ftp://"),
        (("status",), 10, "holds no runs yet"),
        (("pull", "--into", "model"), 10, "holds no runs yet"),
        (("report", "none"), 10, "holds no runs yet"),
        (("infer", "Why?"), 10, "holds no runs yet"),
        (("init", "recipe.yaml"), 11, "error: recipe.yaml: is there already"),
        (("init", "other.yaml", "--name", "Not A Name"), 10, "`name`"),
        (("run",), 2, "Missing argument 'RECIPE'"),
        (("rnu",), 2, "No such command 'rnu'"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(
    launcher: Launcher, recipe_file: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    found, out, err = launcher.run(*arguments)
    assert (found, out) == (code, "")
    assert message in err
    if code != 2:
        assert len(err.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"recipe.yaml", "questions.csv"}, "nothing is left behind"


def test_a_failed_stage_says_why_where_its_log_is_and_ends_with_its_code(
    launcher: Launcher, recipe_file: Path, store: Store
) -> None:
    code, out, err = launcher.run("run", str(recipe_file), "--store", store.uri, ACTING='{"sft": "diverge"}')
    assert (code, out) == (15, "")
    *_, log_line, last = err.splitlines()
    assert last == "error: sft: the loss became NaN at step 3; lower sft.learning_rate"
    log = Path(log_line.removeprefix("sft: log: "))
    assert "sft: error: sft: the loss became NaN" in log.read_text()
    code, out, _ = launcher.run("status", "--store", store.uri)
    assert code == 0
    assert "the loss became NaN at step 3" in out


def test_without_the_train_extra_nothing_is_started_or_written(
    recipe_file: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamarefine_k8s.runs.local_executor.NEEDED", ("torch", "no_such_library"))
    result = CliRunner().invoke(cli, ["run", str(recipe_file), "--store", store.uri])
    assert "no_such_library is not installed; pip install 'llamarefine[train]'" in str(result.exception)
    assert result.output == ""
    assert not Path(store.objects.root).exists()


def test_a_failed_gate_keeps_and_shows_everything(
    launcher: Launcher, recipe_file: Path, store: Store, tmp_path: Path
) -> None:
    gate = "evaluate.gates=[{metric: loss, at_most: 1.0}]"
    code, out, err = launcher.run("run", str(recipe_file), "--store", store.uri, "--set", gate, "--into", "out")
    assert code == 18
    assert (
        err.splitlines()[-1] == "error: quality gate: loss of merged is 2, not at most 1.0; model and report are kept"
    )
    assert "✗ gate: loss of merged at most 1.0, measured 2" in out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "model",
        "model.intoto.jsonl",
        "report.html",
        "report.md",
        "report.json",
    }
    assert "quality gates failed" in launcher.run("status", "--store", store.uri)[1]


def test_a_folder_in_the_way_is_found_before_anything_runs(
    launcher: Launcher, recipe_file: Path, store: Store, tmp_path: Path
) -> None:
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "model" / "thesis.txt").write_text("mine")
    code, _, err = launcher.run("run", str(recipe_file), "--store", store.uri, "--into", "out")
    assert code == 11
    assert "holds files that are not from this store" in err
    assert "starts" not in err


def test_pull_and_report_bring_what_the_run_made(
    launcher: Launcher, recipe_file: Path, store: Store, tmp_path: Path
) -> None:
    launcher.run("run", str(recipe_file), "--store", store.uri)
    code, out, _ = launcher.run("pull", "--store", store.uri, "--into", "model")
    assert code == 0
    assert 'from_pretrained("model")' in out
    assert (tmp_path / "model" / "content.txt").exists()
    code, out, _ = launcher.run("report", "--store", store.uri)
    assert code == 0
    assert "report.md" in out


@pytest.mark.parametrize("flags", [(), ("--demo",)])
def test_init_writes_a_recipe_that_loads_with_its_comments(
    launcher: Launcher, tmp_path: Path, flags: tuple[str]
) -> None:
    sources = ("--questions", "my rows.csv", "--preferences", "pairs.jsonl", "--base", "./model", "--name", "mine")
    code, out, _ = launcher.run("init", "new.yaml", *flags, *sources)
    assert code == 0
    assert "llamarefine plan new.yaml" in out
    recipe = load_recipe(tmp_path / "new.yaml")
    assert recipe.name == "mine"
    assert {name: source.source for name, source in recipe.sources().items()} == {
        "base": "./model",
        "questions": "my rows.csv",
        "preferences": "pairs.jsonl",
    }
    assert recipe.prepare.preferences.format == "auto"
    text = (tmp_path / "new.yaml").read_text()
    assert text.count("#") > 5
    assert "NVIDIA" not in text, "comments that speak of other data"


def test_init_names_the_recipe_after_its_file(launcher: Launcher, tmp_path: Path) -> None:
    assert launcher.run("init", "My Support_Bot.yaml", "--questions", "faq.csv", "--preferences", "p.jsonl")[0] == 0
    assert load_recipe(tmp_path / "My Support_Bot.yaml").name == "my-support-bot"


def test_a_closed_pipe_is_no_error(launcher: Launcher, recipe_file: Path, store: Store) -> None:
    launcher.run("run", str(recipe_file), "--store", store.uri)
    command = f"{sys.executable} {_acting_launcher()} report --store {store.uri} | true"
    process = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False, env=os.environ)
    assert process.stderr == ""


def _acting_launcher() -> str:
    return str(Path(__file__).parents[1] / "acting_launcher.py")
