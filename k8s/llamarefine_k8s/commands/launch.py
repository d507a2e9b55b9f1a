"""Commands that take a recipe: write one, plan it, check it, run it here or on a cluster."""

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from llamarefine_k8s.commands.options import (
    cluster_options,
    json_option,
    open_store,
    option,
    recipe_argument,
    set_option,
    settings_option,
    store_option,
    typed_cluster_flags,
)
from llamarefine_k8s.commands.terminal import open_console, print_json, print_text

if TYPE_CHECKING:
    from llamarefine_jobs.contract.recipe import Recipe
    from llamarefine_jobs.store import Store
    from llamarefine_k8s.cluster.api import Cluster
    from llamarefine_k8s.runs.records import RunRecord
    from llamarefine_k8s.settings import Settings


@click.command()
@click.argument("path", type=click.Path(dir_okay=False, path_type=Path), default="recipe.yaml")
@option("--name", help="Name of the recipe's runs: lower-case letters, digits and dashes.")
@option("--base", metavar="SOURCE", help="Base model: a Hub id, a folder, s3:// or tiny-llama.")
@option("--questions", metavar="SOURCE", help="Questions and answers: a CSV, JSONL or Parquet file, s3:// or https://.")
@option("--preferences", metavar="SOURCE", help="Preference pairs: the same kinds, or hf://datasets/owner/name.")
@option("--demo", is_flag=True, help="Write the small recipe that a CPU runs in minutes, on generated data.")
def init(path: Path, demo: bool, **sources: str | None) -> None:
    """Write a commented recipe to start from.

    PATH is the file to write (default: recipe.yaml). On a terminal, init asks for every value that no option gives.
    """
    from llamarefine_k8s.commands import starter_recipe

    if not demo and sys.stdin.isatty():
        for name, default in starter_recipe.defaults(path).items():
            sources[name] = sources[name] or click.prompt(name, default=default)
    starter_recipe.write_recipe(path, {name: value for name, value in sources.items() if value is not None}, demo=demo)
    click.echo(f"wrote {path}; next: llamarefine plan {path}, then llamarefine run {path}")


@click.command()
@recipe_argument
@set_option
@store_option
@json_option
def plan(recipe: Path, overrides: tuple[str, ...], store: str | None, as_json: bool) -> None:
    """Show which stages of RECIPE would run, and why. Runs none of them."""
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
        needed = {stage: gpu_memory.describe(pinned, stage, size_bytes) for stage, size_bytes in memory.items()}
        output.print_plan(open_console(), records.run_id(pinned), opened, planned, needed)


@click.command()
@click.argument("recipe", type=click.Path(dir_okay=False, path_type=Path), required=False)
@set_option
@store_option
@cluster_options
@settings_option
@option("--local", is_flag=True, help="Check what `run` needs on this machine. Implied where the store is a folder.")
@json_option
def preflight(
    recipe: Path | None,
    overrides: tuple[str, ...],
    store: str | None,
    context: str | None,
    namespace: str | None,
    file: Path | None,
    local: bool,
    as_json: bool,
) -> None:
    """Check all that RECIPE needs before it occupies a GPU.

    Prints one line per check: permissions, Kubernetes objects, nodes, GPU memory, bucket, data. Continues after a
    failed check; exits 0 only if all pass. Without RECIPE, checks what every run needs. The API server validates the
    objects without creating them; in the bucket, one small object is written and deleted.
    """
    from llamarefine_jobs.contract.errors import LlamaRefineError
    from llamarefine_jobs.recipe_file import load_recipe
    from llamarefine_k8s import settings
    from llamarefine_k8s.cluster import preflight, submission
    from llamarefine_k8s.cluster.api import Cluster
    from llamarefine_k8s.commands import output

    loaded = load_recipe(recipe, overrides) if recipe else None
    named = store or settings.read_file(file or settings.default_file()).get("store")
    if local or (named and not str(named).startswith("s3://")):
        found = preflight.check_local(loaded, settings.load(file, store=store))
    else:
        found = preflight.check_cluster(
            loaded,
            lambda: Cluster(context, namespace),
            lambda cluster: submission.load_settings(cluster, file, store=store, context=context, namespace=namespace),
            named,
        )
    checks = list(found) if as_json else output.print_checks(open_console(), found)
    if as_json:
        print_json([check.as_json() for check in checks])
    failed = sum(check.state == "FAIL" for check in checks)
    if failed:
        raise LlamaRefineError(f"{failed} of {len(checks)} checks failed")


@click.command()
@recipe_argument
@set_option
@store_option
@option(
    "--into",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Afterwards, copy the model to DIR/model and the report to DIR.",
)
@json_option
def run(recipe: Path, overrides: tuple[str, ...], store: str | None, into: Path | None, as_json: bool) -> None:
    """Run the pipeline of RECIPE on this machine, stage by stage.

    Stages whose artifact is already in the store are skipped. After Ctrl-C, or after a failure is fixed, the same
    command resumes where it stopped; trainings resume from their last checkpoint.
    """
    from llamarefine_jobs.recipe_file import load_recipe
    from llamarefine_jobs.sources.pinning import pin
    from llamarefine_jobs.store import Store
    from llamarefine_k8s import settings
    from llamarefine_k8s.commands import output
    from llamarefine_k8s.commands.display import open_display
    from llamarefine_k8s.runs import local_executor, records, results
    from llamarefine_k8s.runs.pipeline import Pipeline

    given, progress = settings.load(store=store), open_console(stderr=True)
    opened = Store(given.store, given.retry_policy(progress.print))
    if into:
        results.check_replaceable(opened, "model", into / "model")
    pinned = pin(load_recipe(recipe, overrides))
    local_executor.require_libraries_for(pinned, opened)
    output.print_header(progress, records.run_id(pinned), opened)
    executor = local_executor.LocalExecutor(give_up_after_s=given.give_up_after_s)
    with open_display(progress, lambda path: records.where(opened, path)) as display:
        record = Pipeline(pinned, opened, executor, display).drive()
    if into:
        results.pull_model_and_report(opened, record, into)
    _print_result(opened, record, store, into, as_json=as_json)


@click.command()
@recipe_argument
@set_option
@store_option
@cluster_options
@settings_option
@option("--detach", "-d", is_flag=True, help="Return after submitting; do not follow the log.")
@option("--foreground", is_flag=True, help="Drive the run from this process instead of from a Job in the cluster.")
@option("--dry-run", is_flag=True, help="Print every object as YAML. Create and upload nothing.")
@option("--no-memory-check", is_flag=True, help="Submit even if a training's estimate far exceeds the largest GPU.")
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
    """Run the pipeline of RECIPE on a Kubernetes cluster.

    A driver Job in the cluster creates one Job for each stage that is due. Local files of the recipe are uploaded to
    the bucket first. Ctrl-C only stops following the log: the run continues, and the same command follows it again.
    """
    from llamarefine_jobs.recipe_file import load_recipe
    from llamarefine_k8s.cluster import placement, submission
    from llamarefine_k8s.cluster.api import Cluster
    from llamarefine_k8s.commands import output
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
    pinned = submission.pin_for_cluster(loaded, given, progress.print, upload=not dry_run)
    run = records.run_id(pinned)
    submission.require_driver_of(run)
    if dry_run:
        click.echo(output.yaml_of(submission.objects_of(pinned, given, foreground=foreground)))
        return
    opened = open_store(given.store)
    if records.DRIVER_JOB not in os.environ:  # the `submit` that created this driver printed the header
        output.print_header(progress, run, opened)
    if foreground:
        _drive_in_foreground(cluster, pinned, given, opened)
        return
    flags = typed_cluster_flags()
    follow, cancel = (
        output.suggested(["logs", "-f", run], given.store, flags),
        output.suggested(["cancel", run], None, flags),
    )
    job = submission.start(cluster, pinned, given, lambda text: progress.print(text, soft_wrap=True), cancel=cancel)
    if detach:
        progress.print(f"to follow its log: {follow}", soft_wrap=True)
    else:
        _follow(cluster, job, given, run, f"the run continues; to follow it: {follow}; to stop it: {cancel}")


def _drive_in_foreground(cluster: "Cluster", pinned: "Recipe", given: "Settings", opened: "Store") -> None:
    """Drive a run on the cluster from this process, showing its progress, then print the result."""
    from llamarefine_k8s.cluster import submission
    from llamarefine_k8s.commands.display import open_display
    from llamarefine_k8s.runs import records

    with open_display(open_console(stderr=True), lambda path: records.where(opened, path)) as display:
        record = submission.drive(cluster, pinned, given, display)
    _print_result(opened, record, given.store, None)


def _follow(cluster: "Cluster", job: dict[str, Any], given: "Settings", run: str, advice: str) -> None:
    """Print the log of a driver Job until it ends; after Ctrl-C or `| head`, print `advice`."""
    from llamarefine_jobs.contract.errors import GateError
    from llamarefine_k8s.cluster import submission
    from llamarefine_k8s.commands import output

    try:
        submission.follow(cluster, job, given, print_text)
    except (KeyboardInterrupt, BrokenPipeError):
        open_console(stderr=True).print(advice, soft_wrap=True)
        return
    except GateError:  # the run made a model, so say how to use it
        output.print_next(open_console(), run, given.store)
        raise
    output.print_next(open_console(), run, given.store)


def _print_result(
    opened: "Store", record: "RunRecord", store: str | None, into: Path | None, *, as_json: bool = False
) -> None:
    """Print what a finished run made and which commands to type next. Raises GateError if a quality gate failed."""
    from llamarefine_k8s.commands import output
    from llamarefine_k8s.runs import results
    from llamarefine_k8s.runs.records import DRIVER_JOB

    report = results.read_report(opened, record.run)
    if as_json:
        print_json(record.model_dump(mode="json"))
    else:
        output.print_report(open_console(), report)
        output.print_places(open_console(), opened, record, into)
        if DRIVER_JOB not in os.environ:  # a driver's log is followed by a `submit`, which prints the next commands
            output.print_next(open_console(), record.run, store, is_here=into is not None)
    results.check_gates(report)
