"""The commands around runs: which there are, whether all of one is right, what may go, what runs here."""

import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import click

from llamarefine_jobs.contract.errors import LlamaRefineError
from llamarefine_jobs.contract.version import __version__
from llamarefine_k8s.commands.options import (
    Age,
    cluster_options,
    json_option,
    open_store,
    option,
    public_key_option,
    run_argument,
    set_option,
    settings_option,
    store_option,
)
from llamarefine_k8s.commands.terminal import open_console, print_json


@click.command()
@click.argument("recipe", type=click.Path(dir_okay=False, path_type=Path), required=False)
@set_option
@store_option
@cluster_options
@settings_option
@option("--local", is_flag=True, help="What `run` needs on this machine. It is so where the store is a folder.")
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
    """Prove the run of RECIPE before it holds a GPU: permissions, objects, nodes, memory, bucket, data.

    One line a check, on after what is wrong; ends well only where nothing failed. Without RECIPE, what any run
    needs. The objects are given to the API server to look at, and none is made; in the bucket one small object is
    written and removed.
    """
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
    console = open_console()
    checks = []
    for check in found:
        checks.append(check)
        if not as_json:
            output.print_check(console, check)
    if as_json:
        print_json([check.as_json() for check in checks])
    failed = sum(check.state == "FAIL" for check in checks)
    if failed:
        raise LlamaRefineError(f"{failed} of {len(checks)} checks failed")


@click.command()
@option("--older-than", metavar="AGE", type=Age(), help="Runs that last changed longer ago go, as in 30d, 12h or 2w.")
@option("--keep", type=click.IntRange(min=1), metavar="N", help="All runs but the newest N go.")
@option("--delete", is_flag=True, help="Remove it; without, it is only shown.")
@store_option
@json_option
def gc(older_than: timedelta | None, keep: int | None, delete: bool, store: str | None, as_json: bool) -> None:
    """Show what no run of the store refers to, and with --delete remove it.

    Without --older-than and --keep every run stays; with both, a run that either would keep. What goes takes its
    artifacts, checkpoints and uploaded files along, unless a run that stays was made from them. A run that is being
    driven stays, and so does all that changed within a day, an uploaded file within a week.
    """
    from llamarefine_k8s.commands import output
    from llamarefine_k8s.runs import garbage

    opened = open_store(store)
    found = garbage.find(opened, garbage.Keep(keep, older_than), opened.now())
    if delete:
        garbage.remove(opened, found)
    if as_json:
        items = [asdict(item) for item in found.items]
        print_json({"removed": delete, "kept_runs": found.kept_runs, "size_bytes": found.size_bytes, "items": items})
    else:
        output.print_garbage(open_console(), found, removed=delete)


@click.command()
@run_argument
@public_key_option
@store_option
@json_option
def verify(run: str | None, public_key: Path | None, store: str | None, as_json: bool) -> None:
    """Read all that RUN left in the store again, every byte, and say what is right and what is wrong."""
    from llamarefine_jobs.contract.errors import IntegrityError
    from llamarefine_k8s.commands import output
    from llamarefine_k8s.runs import records, signing, verification

    key = signing.read_public_key(public_key) if public_key else None
    opened = open_store(store)
    record = records.find(opened, run)
    checks = []
    console = open_console()
    for check in verification.verify(opened, record, key):
        checks.append(check)
        if not as_json:
            output.print_check(console, check)
    if as_json:
        print_json({"run": record.run, "checks": [check.as_json() for check in checks]})
    failed = sum(check.state == "FAIL" for check in checks)
    if failed:
        raise IntegrityError(f"{record.run}: {failed} of {len(checks)} checks failed")


@click.command(name="runs")
@option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="Only so many, the newest.")
@store_option
@json_option
def list_runs(limit: int, store: str | None, as_json: bool) -> None:
    """List the runs of the store, the newest first."""
    from llamarefine_k8s.commands import output
    from llamarefine_k8s.runs import records

    found = records.all_runs(open_store(store), limit=limit)
    if as_json:
        print_json([record.model_dump(mode="json") for record in found])
    else:
        output.print_runs(open_console(), found)


@click.command()
def version() -> None:
    """Print the versions of what runs here."""
    from importlib import metadata

    from llamarefine_k8s.runs import local_executor

    missing = local_executor.missing_libraries()
    click.echo(f"llamarefine {__version__}\nPython {sys.version.split()[0]}")
    if missing:
        click.echo(f"stages cannot run here: no {', '.join(missing)}; {local_executor.INSTALL}")
    else:
        click.echo("\n".join(f"{name} {metadata.version(name)}" for name in local_executor.NEEDED))
