"""The command `llamarefine`: translate options, call, print. What is heavy is imported where it is used."""

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llamarefine_jobs.contract.version import __version__
from llamarefine_k8s.commands import maintenance
from llamarefine_k8s.commands.options import (
    cluster_options,
    json_option,
    open_store,
    option,
    public_key_option,
    recipe_argument,
    run_argument,
    set_option,
    settings_option,
    store_option,
)
from llamarefine_k8s.commands.terminal import command, open_console, print_json, print_text, run_command

if TYPE_CHECKING:
    from llamarefine_jobs.store import Store
    from llamarefine_k8s.runs.records import RunRecord


class _InOrder(click.Group):
    """Lists its commands in the order of a person's work."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, "--version", "-V", message="%(version)s")
def cli() -> None:
    """Fine-tune a small Llama in stages: SFT, DPO, one merge, a measured before/after report.

    \b
    llamarefine init --demo            write a recipe to start from
    llamarefine run recipe.yaml        run its stages; what is in the store already is not run again
    llamarefine infer "Your question"  ask the model it made
    llamarefine pull --into ./model    bring that model here
    \b
    llamarefine submit recipe.yaml     the same on a Kubernetes cluster: a Job for each stage
    llamarefine status                 how far it is, and why something waits

    RUN names a run: the beginning of its name is enough, and without one the newest is meant.
    """


@cli.command(short_help="Write a commented recipe to start from.")
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path), default="recipe.yaml")
@option("--name", help="Names the runs: lower case, digits, -.")
@option("--base", metavar="SOURCE", help="Base model: a Hub id, a folder, s3:// or tiny-llama.")
@option("--questions", metavar="SOURCE", help="Questions and answers: a CSV, JSONL or Parquet file, s3:// or https://.")
@option("--preferences", metavar="SOURCE", help="Preference pairs: the same kinds, or hf://datasets/owner/name.")
@option("--demo", is_flag=True, help="The small recipe that a CPU runs in minutes, on data it makes itself.")
def init(path: Path, demo: bool, **sources: str | None) -> None:
    """Write a commented recipe to PATH (recipe.yaml) to start from; on a terminal it asks for what is not given."""
    from llamarefine_k8s.commands import starter_recipe

    if not demo and sys.stdin.isatty():
        for name, default in starter_recipe.defaults(path).items():
            sources[name] = sources[name] or click.prompt(name, default=default)
    starter_recipe.write_recipe(path, {name: value for name, value in sources.items() if value is not None}, demo=demo)
    click.echo(f"wrote {path}; next: llamarefine plan {path}, then llamarefine run {path}")


@cli.command()
@recipe_argument
@set_option
@store_option
@json_option
def plan(recipe: Path, overrides: tuple[str, ...], store: str | None, as_json: bool) -> None:
    """Show which stages of RECIPE would run, and why; runs none."""
    from llamarefine_jobs.recipe_file import load_recipe
    from llamarefine_jobs.sources.pinning import pin
    from llamarefine_k8s.commands import output
    from llamarefine_k8s.runs import gpu_memory, plan, records

    opened = open_store(store)
    pinned = pin(load_recipe(recipe, overrides))
    planned = plan.plan(pinned, opened)
    memory = gpu_memory.estimates(pinned, opened.uri, ask_hub=False)
    if as_json:
        stages = [asdict(stage) | {"estimated_gpu_memory_bytes": memory.get(stage.stage)} for stage in planned]
        print_json({"run": records.run_id(pinned), "store": opened.uri, "stages": stages})
    else:
        output.print_plan(open_console(), records.run_id(pinned), opened, planned, memory)


cli.add_command(maintenance.preflight)


@cli.command()
@recipe_argument
@set_option
@store_option
@option("--into", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", help="Bring model/ and report here.")
@json_option
def run(recipe: Path, overrides: tuple[str, ...], store: str | None, into: Path | None, as_json: bool) -> None:
    """Run the pipeline of RECIPE on this machine, stage by stage.

    A stage whose result is in the store already is not run again. After Ctrl-C, or a failure that
    was put right, the same command goes on where it stopped: trainings from their last checkpoint.
    """
    from llamarefine_jobs.recipe_file import load_recipe
    from llamarefine_jobs.sources.pinning import pin
    from llamarefine_jobs.store import Store
    from llamarefine_k8s import settings
    from llamarefine_k8s.commands import output
    from llamarefine_k8s.commands.display import open_display
    from llamarefine_k8s.runs import local_executor, plan, provenance, records, results
    from llamarefine_k8s.runs.pipeline import Pipeline

    given, progress = settings.load(store=store), open_console(stderr=True)
    opened = Store(given.store, given.retry_policy(progress.print))
    if into:
        results.check_replaceable(opened, "model", into / "model")
    pinned = pin(load_recipe(recipe, overrides))
    if local_executor.missing_libraries() and any(stage.state != "there" for stage in plan.plan(pinned, opened)):
        local_executor.require_train_extra()  # before anything starts
    output.print_header(progress, records.run_id(pinned), opened)
    executor = local_executor.LocalExecutor(give_up_after_s=given.give_up_after_s)
    with open_display(progress, lambda path: records.where(opened, path)) as display:
        record = Pipeline(pinned, opened, executor, display).drive()
    if into:
        results.pull(opened, results.part_of(opened, record, "model"), "model", into / "model")
        provenance.pull(opened, record.run, into / "model")
        results.pull_report(opened, results.part_of(opened, record, "report"), into)
    _print_end(opened, record, store, into, as_json=as_json)


@cli.command()
@recipe_argument
@set_option
@store_option
@cluster_options
@settings_option
@option("--detach", "-d", is_flag=True, help="Do not follow the run's log.")
@option("--foreground", is_flag=True, help="Drive the run from this process; without, a Job in the cluster does.")
@option("--dry-run", is_flag=True, help="Print every object that would be made, as YAML; make none, upload nothing.")
@option("--no-memory-check", is_flag=True, help="Submit though a training's estimate is far over the largest GPU.")
def submit(
    recipe: Path,
    overrides: tuple[str, ...],
    store: str | None,
    context: str | None,
    namespace: str | None,
    file: Path | None,
    detach: bool,
    foreground: bool,
    dry_run: bool,
    no_memory_check: bool,
) -> None:
    """Run the pipeline of RECIPE on a cluster: a driver Job makes a Job for each stage that is due.

    Local files of the recipe are brought into the bucket first. The run goes on whatever happens here:
    Ctrl-C only ends the following of its log, and the same command follows it again.
    """
    from llamarefine_jobs.contract.errors import GateError
    from llamarefine_jobs.recipe_file import load_recipe
    from llamarefine_k8s.cluster import placement, submission
    from llamarefine_k8s.cluster.api import Cluster
    from llamarefine_k8s.commands import output
    from llamarefine_k8s.commands.display import open_display
    from llamarefine_k8s.runs import records

    loaded = load_recipe(recipe, overrides)
    cluster = Cluster(context, namespace)
    given = submission.load_settings(cluster, file, store=store, context=context, namespace=namespace)
    progress = open_console(stderr=True)
    cluster.retry_policy = given.retry_policy(progress.print)
    if not (foreground or dry_run):
        submission.require_account(cluster, given.service_account)
    if not (dry_run or no_memory_check or submission.is_in_cluster()):
        placement.require_memory(cluster, given, loaded, lambda text: progress.print(text, soft_wrap=True))
    pinned = submission.bring_sources(loaded, given, progress.print, upload=not dry_run)
    run = records.run_id(pinned)
    if dry_run:
        click.echo(output.yaml_of(submission.objects_of(pinned, given, foreground=foreground)))
        return
    opened = open_store(given.store)
    if records.DRIVER_JOB not in os.environ:  # whoever follows a driver was told already
        output.print_header(progress, run, opened)
    if foreground:
        with open_display(progress, lambda path: records.where(opened, path)) as display:
            record = submission.drive(cluster, pinned, given, display)
        _print_end(opened, record, given.store, None)
        return
    job = submission.start(cluster, pinned, given, progress.print, command=command())
    if detach:
        progress.print(f"{command()} logs -f {run}   follows it")
        return
    try:
        submission.follow(cluster, job, given, print_text)
    except KeyboardInterrupt:
        progress.print(f"the run goes on; {command()} logs -f {run} follows it, {command()} cancel {run} ends it")
        return
    except GateError:  # there is a model all the same
        output.print_next(open_console(), run, given.store)
        raise
    output.print_next(open_console(), run, given.store)


@cli.command()
@run_argument
@store_option
@cluster_options
@json_option
def status(run: str | None, store: str | None, context: str | None, namespace: str | None, as_json: bool) -> None:
    """Show how far RUN is, stage by stage; on a cluster, what keeps a stage from running, and what to do about it."""
    from llamarefine_k8s.cluster import run_status
    from llamarefine_k8s.commands import output

    opened = open_store(store)
    record, jobs, trouble = run_status.find_status(opened, run, context, namespace)
    if as_json:
        known = record.model_dump(mode="json") if record else {}
        print_json(known | ({"cluster": [asdict(job) for job in jobs]} if jobs else {}))
    else:
        if record:
            output.print_status(open_console(), opened, record)
        output.print_live(open_console(), record, jobs, trouble)


@cli.command()
@click.argument("run_and_stage", nargs=-1, metavar="[RUN] [STAGE]")
@option("--follow", "-f", is_flag=True, help="Go on as lines come, to the run's end.")
@store_option
@cluster_options
def logs(
    run_and_stage: tuple[str, ...], follow: bool, store: str | None, context: str | None, namespace: str | None
) -> None:
    """Print the log of RUN: of STAGE, of the `driver`, or of all stages one after the other.

    It comes from the cluster while a stage's pod is there, afterwards from the store.
    """
    from llamarefine_k8s import settings
    from llamarefine_k8s.cluster import run_status

    name, stage = run_status.run_and_stage(run_and_stage)
    give_up_after_s = settings.load(store=store).give_up_after_s
    lines = run_status.all_lines(
        open_store(store), name, stage, context, namespace, follow=follow, give_up_after_s=give_up_after_s
    )
    for line in lines:
        print_text(line)


@cli.command()
@click.argument("run")
@cluster_options
def cancel(run: str, context: str | None, namespace: str | None) -> None:
    """End RUN on the cluster and leave nothing of it there; what it made stays in the bucket."""
    from llamarefine_k8s.cluster import run_status
    from llamarefine_k8s.cluster.api import Cluster

    cluster = Cluster(context, namespace)
    name = run_status.find_run(cluster, run)
    run_status.remove(cluster, name)
    click.echo(f"{name}: nothing is left of it on the cluster; the same submit goes on where it stopped")


cli.add_command(maintenance.list_runs)


@cli.command()
@run_argument
@option(
    "--into", type=click.Path(file_okay=False, path_type=Path), metavar="DIR", required=True, help="The new folder."
)
@option(
    "--what",
    type=click.Choice(["model", "sft", "dpo", "report"]),
    default="model",
    show_default=True,
    help="The merged model, an adapter, or the report.",
)
@option("--force", is_flag=True, help="Replace the folder, whatever it holds.")
@public_key_option
@store_option
def pull(run: str | None, into: Path, what: str, force: bool, public_key: Path | None, store: str | None) -> None:
    """Bring the model of RUN to a folder here, every byte verified, and beside it what it was made from.

    With --public-key only what that key signed for RUN comes: each byte as the run's statement names it.
    """
    from llamarefine_jobs.contract.artifact import short
    from llamarefine_k8s.commands import output
    from llamarefine_k8s.runs import provenance, records, results, signing

    key = signing.read_public_key(public_key) if public_key else None
    opened = open_store(store)
    record = records.find(opened, run)
    manifest = results.part_of(opened, record, what)
    signed = provenance.require(opened, record.run, manifest, key) if key else None
    results.pull(opened, manifest, what, into, force=force)
    statement = provenance.pull(opened, record.run, into, signed) if what == "model" else None
    output.print_pulled(open_console(), manifest, what, into, statement)
    if key:
        click.echo(f"  as the key {short(signing.name_of(key))} signed it for {record.run}")


@cli.command()
@run_argument
@option("--open", "in_browser", is_flag=True, help="Open the page in the browser instead.")
@store_option
def report(run: str | None, in_browser: bool, store: str | None) -> None:
    """Print the before/after report of RUN as Markdown."""
    from llamarefine_k8s.runs import records, results

    opened = open_store(store)
    name = records.find(opened, run).run
    if in_browser:
        page = results.report_page(opened, name)
        click.echo(f"opening {page}")
        click.launch(str(page))
    else:
        print_text(results.report_text(opened, name))


@cli.command()
@click.argument("run_and_questions", nargs=-1, metavar="[RUN] [QUESTION]...")
@option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="Questions: .jsonl, or .txt with one a line.",
)
@option(
    "--answers", type=click.Path(dir_okay=False), metavar="FILE", help="Write the answers to a .jsonl file instead."
)
@option(
    "--model",
    type=click.Choice(["merged", "sft", "base"]),
    default="merged",
    show_default=True,
    help="Which one answers.",
)
@option("--max-new-tokens", type=click.IntRange(min=1), help="The longest answer.  [default: the recipe's]")
@set_option
@store_option
def infer(run_and_questions: tuple[str, ...], overrides: tuple[str, ...], store: str | None, **options: Any) -> int:
    """Ask the model of RUN. Without a QUESTION or --prompts it is a conversation, question by question."""
    from llamarefine_k8s.runs import local_executor, records

    opened = open_store(store)
    record, questions = records.find_first(opened, run_and_questions)
    arguments = local_executor.infer_arguments(questions, overrides, **options)
    return local_executor.infer(record.own_recipe(), opened.uri, arguments)


for kept in (maintenance.verify, maintenance.gc, maintenance.version):
    cli.add_command(kept)


def main() -> None:
    """Run the command; see `terminal.run_command`."""
    run_command(cli)


def _print_end(
    opened: "Store", record: "RunRecord", store: str | None, into: Path | None, *, as_json: bool = False
) -> None:
    """What a finished run shows: the comparison, and what to type next."""
    from llamarefine_k8s.commands import output
    from llamarefine_k8s.runs import results
    from llamarefine_k8s.runs.records import DRIVER_JOB

    report = results.read_report(opened, record.run)
    if as_json:
        print_json(record.model_dump(mode="json"))
    else:
        output.print_report(open_console(), report)
        output.print_places(open_console(), opened, record, into)
        if DRIVER_JOB not in os.environ:  # its log is read on another machine, by someone who is told there
            output.print_next(open_console(), record.run, store, is_here=into is not None)
    results.check_gates(report)
