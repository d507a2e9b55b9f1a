"""The command line: help, options, output, errors and exit codes."""

import json
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from llamarefine_jobs.contract.artifact import artifact_key
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.stages import SEQUENCE
from llamarefine_jobs.recipe_file import load_recipe, to_yaml
from llamarefine_jobs.store import Store
from llamarefine_k8s.cli import cli
from llamarefine_k8s.runs import records
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


def test_the_commands() -> None:
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
def test_every_command_has_a_help_text(command: str) -> None:
    result = CliRunner().invoke(cli, [command, "--help"])
    assert result.exit_code == 0
    assert result.output.startswith(f"Usage: cli {command}")


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_short_help_fits_its_line_in_80_columns(command: str) -> None:
    result = CliRunner().invoke(cli, ["--help"], terminal_width=80)
    short_help = cli.commands[command].get_short_help_str(limit=200)
    assert f"  {command:<{max(map(len, COMMANDS))}}  {short_help}" in result.output.splitlines()
    assert not short_help.endswith("...")


def test_help_imports_no_third_party_package_but_click() -> None:
    """So `llamarefine --help` is fast; tests/bench/launcher.py measures how fast."""

    def imported(program: str) -> set[str]:
        script = f"import sys\ntry:\n    {program}\nexcept SystemExit:\n    pass\nprint('IMPORTED', *sys.modules)"
        done = subprocess.run([sys.executable, "-c", script, "--help"], check=True, capture_output=True, text=True)
        modules = done.stdout.splitlines()[-1].split()[1:]
        return {name.partition(".")[0] for name in modules} - sys.stdlib_module_names

    by_help = imported("from llamarefine_k8s.cli import main; main()") - imported("pass")
    assert by_help == {"click", "llamarefine_jobs", "llamarefine_k8s"}


HEAVY = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "unsloth")


def test_a_whole_run_imports_no_training_library_into_the_launcher(
    launcher: Launcher, recipe_file: Path, store: Store
) -> None:
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


def test_run_prints_plain_lines_into_a_pipe(launcher: Launcher, recipe_file: Path, store: Store) -> None:
    code, out, err = launcher.run("run", str(recipe_file), "--store", store.uri)
    assert code == 0
    assert not CONTROL.search(out), "control characters are removed, even those of a model's answer"
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


def test_suggested_commands_begin_with_the_wrapper(launcher: Launcher, recipe_file: Path, store: Store) -> None:
    wrapper = "k8s/with-bucket llamarefine"
    code, out, _ = launcher.run("run", str(recipe_file), "--store", store.uri, LLAMAREFINE_COMMAND=wrapper)
    assert code == 0
    assert re.search(r"^  k8s/with-bucket llamarefine pull small-\w+ --into ./model --store file:", out, re.MULTILINE)


def test_progress_in_a_pipe_is_printed_at_intervals(launcher: Launcher, recipe_file: Path, store: Store) -> None:
    code, _, err = launcher.run("run", str(recipe_file), "--store", store.uri, ACTING='{"sft": "many steps"}')
    assert code == 0
    lines = [line for line in err.splitlines() if line.startswith("sft: step")]
    assert lines == ["sft: step 1/500, loss 3, 5,120 tokens/s, 1 min 05 s left"]


def test_a_second_run_starts_no_stage(launcher: Launcher, recipe_file: Path, store: Store) -> None:
    """Any stage that it started would fail."""
    launcher.run("run", str(recipe_file), "--store", store.uri)
    fail_if_started = json.dumps(dict.fromkeys(SEQUENCE, "diverge"))
    code, out, err = launcher.run("run", str(recipe_file), "--store", store.uri, ACTING=fail_if_started)
    assert code == 0
    assert "starts" not in err
    assert "Held-out loss" in out


def test_with_json_standard_output_is_only_json(launcher: Launcher, recipe_file: Path, store: Store) -> None:
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
    record = json.loads(launcher.run("run", str(recipe_file), *flags)[1])
    assert record["run"] == planned["run"]
    assert json.loads(launcher.run("status", *flags)[1]) == record
    assert json.loads(launcher.run("status", planned["run"][:8], *flags)[1]) == record
    assert json.loads(launcher.run("runs", *flags)[1]) == [record]
    assert record["state"] == "done"
    assert set(record["stages"]) == set(SEQUENCE)
    assert set(record["stages"]["sft"]) == {
        *("state", "key", "attempts", "started_at", "finished_at", "progress", "error", "log", "log_sha256")
    }


def test_an_option_overrides_the_environment_which_overrides_the_file(
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
        (("init", "recipe.yaml"), 11, "error: recipe.yaml: exists already"),
        (("init", "other.yaml", "--name", "Not A Name"), 10, "`name`"),
        (("run",), 2, "Missing argument 'RECIPE'"),
        (("rnu",), 2, "No such command 'rnu'"),
    ],
)
def test_a_mistake_prints_one_line_and_sets_the_exit_code(
    launcher: Launcher, recipe_file: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    found, out, err = launcher.run(*arguments)
    assert (found, out) == (code, "")
    assert message in err
    if code != 2:
        assert len(err.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"recipe.yaml", "questions.csv"}, "no file is left behind"


def test_a_failed_stage_prints_its_error_and_its_log_and_sets_the_exit_code(
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


def test_run_without_the_training_libraries_starts_and_writes_nothing(
    recipe_file: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamarefine_k8s.runs.local_executor.NEEDED", ("torch", "no_such_library"))
    result = CliRunner().invoke(cli, ["run", str(recipe_file), "--store", store.uri])
    assert "no_such_library is not installed; pip install 'llamarefine[train]'" in str(result.exception)
    assert result.output == ""
    assert not Path(store.objects.root).exists()


def test_a_failed_gate_still_writes_and_shows_all_results(
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


def test_a_folder_that_must_not_be_replaced_is_reported_before_anything_runs(
    launcher: Launcher, recipe_file: Path, store: Store, tmp_path: Path
) -> None:
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "model" / "thesis.txt").write_text("mine")
    code, _, err = launcher.run("run", str(recipe_file), "--store", store.uri, "--into", "out")
    assert code == 11
    assert "holds files that are not from this store" in err
    assert "starts" not in err


def test_pull_and_report_give_the_results_of_a_run(
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
def test_init_writes_a_valid_recipe_with_comments(launcher: Launcher, tmp_path: Path, flags: tuple[str]) -> None:
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
    assert "NVIDIA" not in text, "comments that describe other data"


def test_init_names_the_recipe_after_its_file(launcher: Launcher, tmp_path: Path) -> None:
    assert launcher.run("init", "My Support_Bot.yaml", "--questions", "faq.csv", "--preferences", "p.jsonl")[0] == 0
    assert load_recipe(tmp_path / "My Support_Bot.yaml").name == "my-support-bot"


@pytest.fixture(params=[os.pipe, pty.openpty], ids=["pipe", "terminal"])
def run_unread(request: pytest.FixtureRequest) -> Callable[..., int]:
    """Run the launcher, close the pipe or terminal that it writes to after one byte, and return its exit code."""

    def run(*arguments: str, **environment: str) -> int:
        reading, writing = request.param()
        command = [sys.executable, _acting_launcher(), *arguments]
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=writing, stderr=writing, env=os.environ | environment
        )
        os.close(writing)
        assert os.read(reading, 1)
        os.close(reading)
        return process.wait(120)

    return run


@pytest.mark.parametrize("buffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_a_run_goes_on_when_nobody_reads_its_output(
    launcher: Launcher, recipe_file: Path, store: Store, run_unread: Callable[..., int], buffered: str
) -> None:
    """`llamarefine run recipe.yaml | head`, or a terminal that was closed."""
    flags = (str(recipe_file), "--store", store.uri)
    act = '{"sft": "many steps", "dpo": "say much"}'
    assert run_unread("run", *flags, ACTING=act, PYTHONUNBUFFERED=buffered) == 0
    record = records.find(store, None)
    assert (record.state, record.error) == ("done", None)


def test_what_nobody_reads_does_not_change_the_exit_code(
    launcher: Launcher, recipe_file: Path, store: Store, run_unread: Callable[..., int]
) -> None:
    flags = ("--store", store.uri)
    assert run_unread("run", str(recipe_file), *flags, ACTING='{"sft": "diverge"}') == 15
    gate = "evaluate.gates=[{metric: loss, at_most: 1.0}]"
    assert run_unread("run", str(recipe_file), *flags, "--set", gate) == 18
    assert run_unread("run", str(recipe_file), *flags, "--set", "seed=7", "--json") == 0
    assert run_unread("status", "none", *flags) == 10
    for command in ("report", "logs", "status", "runs", "verify", "version"):
        assert run_unread(command, *(() if command == "version" else flags)) == 0, command


def test_a_command_that_only_prints_ends_when_nobody_reads_it(
    launcher: Launcher, recipe_file: Path, store: Store
) -> None:
    launcher.run("run", str(recipe_file), "--store", store.uri)
    script = (
        "import os, sys; from llamarefine_k8s.cluster import run_status; from llamarefine_k8s.cli import main;"
        "run_status.all_lines = lambda *_, **__: iter(lambda: 'a line', None); main()"
    )
    command = [sys.executable, "-c", script, "logs", "--follow", "--store", store.uri]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout
    assert process.stderr
    assert process.stdout.readline() == b"a line\n"
    process.stdout.close()
    assert (process.wait(60), process.stderr.read()) == (0, b"")
    process.stderr.close()


def test_a_stage_finishes_its_work_when_nobody_reads_its_log(recipe: Callable[..., Recipe], store: Store) -> None:
    Path("pinned.yaml").write_text(to_yaml(recipe()))
    acting = str(Path(_acting_launcher()).with_name("acting.py"))
    command = [sys.executable, acting, "prepare", "--recipe", "pinned.yaml", "--store", store.uri]
    reading, writing = os.pipe()
    os.close(reading)
    environment = os.environ | {"ACTING": '{"prepare": "many steps"}'}
    done = subprocess.run(command, stdout=writing, stderr=writing, env=environment, timeout=120, check=False)
    os.close(writing)
    assert done.returncode == 0
    assert store.manifest("prepare", artifact_key("prepare", recipe(), {}))


def _acting_launcher() -> str:
    return str(Path(__file__).parents[1] / "acting_launcher.py")
