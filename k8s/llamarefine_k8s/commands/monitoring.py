"""Commands that watch and stop runs: status, logs, cancel, runs."""

from dataclasses import asdict

import click

from llamarefine_k8s.commands.options import (
    cluster_options,
    json_option,
    open_store,
    option,
    run_argument,
    store_option,
)
from llamarefine_k8s.commands.terminal import open_console, print_json, print_text


@click.command()
@run_argument
@store_option
@cluster_options
@json_option
def status(run: str | None, store: str | None, context: str | None, namespace: str | None, as_json: bool) -> None:
    """Show the progress of RUN, and why a stage is waiting.

    Prints one line per stage. On a cluster, also prints what keeps a stage from running and what to do about it.
    """
    from llamarefine_k8s.cluster import run_status
    from llamarefine_k8s.commands import output

    opened = open_store(store)
    record, jobs, cluster_error = run_status.find_status(opened, run, context, namespace)
    if as_json:
        known = record.model_dump(mode="json") if record else {}
        print_json(known | ({"cluster": [asdict(job) for job in jobs]} if jobs else {}))
    else:
        if record:
            output.print_status(open_console(), opened, record)
        output.print_cluster_status(open_console(), record, jobs, cluster_error)


@click.command()
@click.argument("run_and_stage", nargs=-1, metavar="[RUN] [STAGE]")
@option("--follow", "-f", is_flag=True, help="Print lines as they are written, until the run ends.")
@store_option
@cluster_options
def logs(
    run_and_stage: tuple[str, ...], follow: bool, store: str | None, context: str | None, namespace: str | None
) -> None:
    """Print the log of RUN, or of one of its stages.

    STAGE is the name of a stage, or `driver`; without it, the logs of all stages are printed one after the other. Each
    log is read from the cluster while the stage's pod exists there, afterwards from the store.
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


@click.command()
@click.argument("run")
@cluster_options
def cancel(run: str, context: str | None, namespace: str | None) -> None:
    """Stop RUN on the cluster and delete its objects there.

    Artifacts and checkpoints stay in the bucket, so the same submit resumes the run.
    """
    from llamarefine_k8s.cluster import run_status
    from llamarefine_k8s.cluster.api import Cluster

    cluster = Cluster(context, namespace)
    name = run_status.find_run(cluster, run)
    run_status.remove(cluster, name)
    click.echo(f"{name}: stopped, and deleted from the cluster; the same submit resumes it")


@click.command(name="runs")
@option("--limit", type=click.IntRange(min=1), default=50, show_default=True, help="List at most so many runs.")
@store_option
@json_option
def list_runs(limit: int, store: str | None, as_json: bool) -> None:
    """List the runs in the store, newest first."""
    from llamarefine_k8s.commands import output
    from llamarefine_k8s.runs import records

    found = records.all_runs(open_store(store), limit=limit)
    if as_json:
        print_json([record.model_dump(mode="json") for record in found])
    else:
        output.print_runs(open_console(), found)
