"""Commands that check or clean a store, or describe the installation: verify, gc, version."""

import sys
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import click

from llamarefine_jobs.contract.version import __version__
from llamarefine_k8s.commands.options import (
    Age,
    json_option,
    open_store,
    option,
    public_key_option,
    run_argument,
    store_option,
)
from llamarefine_k8s.commands.terminal import open_console, print_json


@click.command()
@run_argument
@public_key_option
@store_option
@json_option
def verify(run: str | None, public_key: Path | None, store: str | None, as_json: bool) -> None:
    """Check every byte that RUN left in the store.

    Reads the artifacts, checkpoints, logs, report and statement and compares their digests. Prints one line per check.
    Continues after a failed check; exits 0 only if all pass.
    """
    from llamarefine_jobs.contract.errors import IntegrityError
    from llamarefine_k8s.commands import output
    from llamarefine_k8s.runs import records, signing, verification

    key = signing.read_public_key(public_key) if public_key else None
    opened = open_store(store)
    record = records.find(opened, run)
    found = verification.verify(opened, record, key)
    checks = list(found) if as_json else output.print_checks(open_console(), found)
    if as_json:
        print_json({"run": record.run, "checks": [check.as_json() for check in checks]})
    failed = sum(check.state == "FAIL" for check in checks)
    if failed:
        raise IntegrityError(f"{record.run}: {failed} of {len(checks)} checks failed")


@click.command()
@option("--older-than", metavar="AGE", type=Age(), help="Delete runs that last changed longer ago: 30d, 12h or 2w.")
@option("--keep", type=click.IntRange(min=1), metavar="N", help="Delete all but the newest N runs.")
@option("--delete", is_flag=True, help="Delete what is shown. Without it, nothing is deleted.")
@store_option
@json_option
def gc(older_than: timedelta | None, keep: int | None, delete: bool, store: str | None, as_json: bool) -> None:
    """Show, and with --delete remove, what no run refers to.

    Without --older-than and --keep, every run is kept; with both, a run is kept if either option keeps it. A deleted
    run's artifacts, checkpoints and uploaded files are deleted with it, unless a kept run was made from them. A run
    that is still being driven is always kept, and so is everything that changed within the last day, and an uploaded
    file that changed within the last week.
    """
    from llamarefine_k8s.commands import output
    from llamarefine_k8s.runs import garbage

    opened = open_store(store)
    found = garbage.find(opened, garbage.RetentionPolicy(keep, older_than), opened.now())
    if delete:
        garbage.remove(opened, found)
    if as_json:
        items = [asdict(item) for item in found.items]
        print_json({"removed": delete, "kept_runs": found.kept_runs, "size_bytes": found.size_bytes, "items": items})
    else:
        output.print_garbage(open_console(), found, removed=delete)


@click.command()
def version() -> None:
    """Print the versions of llamarefine, Python and the libraries."""
    from importlib import metadata

    from llamarefine_k8s.runs import local_executor

    missing = local_executor.missing_libraries()
    click.echo(f"llamarefine {__version__}\nPython {sys.version.split()[0]}")
    if missing:
        click.echo(f"stages cannot run here: {', '.join(missing)} not installed; {local_executor.INSTALL}")
    else:
        click.echo("\n".join(f"{name} {metadata.version(name)}" for name in local_executor.NEEDED))
