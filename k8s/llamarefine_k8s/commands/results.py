"""Commands that use what a run made: pull, report, infer."""

from pathlib import Path
from typing import Any

import click

from llamarefine_k8s.commands.options import (
    open_store,
    option,
    public_key_option,
    run_argument,
    set_option,
    store_option,
)
from llamarefine_k8s.commands.terminal import open_console, print_text


@click.command()
@run_argument
@option(
    "--into",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    required=True,
    help="The folder to create or replace.",
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
    """Download the model of RUN, every byte verified.

    Beside the model's folder it writes the run's statement of what the model was made from. With --public-key, only
    what that key signed for RUN is downloaded: every byte must match the digest in the signed statement.
    """
    from llamarefine_jobs.contract.artifact import short
    from llamarefine_k8s.commands import output
    from llamarefine_k8s.runs import records, results, signing

    key = signing.read_public_key(public_key) if public_key else None
    opened = open_store(store)
    record = records.find(opened, run)
    manifest, statement = results.pull_verified(opened, record, what, into, key, force=force)
    output.print_pulled(open_console(), manifest, what, into, statement)
    if key:
        click.echo(f"  signed for {record.run} by the key {short(signing.name_of(key))}")


@click.command()
@run_argument
@option("--open", "in_browser", is_flag=True, help="Open the HTML report in the browser instead.")
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


@click.command()
@click.argument("run_and_questions", nargs=-1, metavar="[RUN] [QUESTION]...")
@option(
    "--prompts",
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="Read questions from a .jsonl file, or from a .txt file with one question per line.",
)
@option(
    "--answers",
    type=click.Path(dir_okay=False),
    metavar="FILE",
    help="Write the answers to a .jsonl file instead of printing them.",
)
@option(
    "--model",
    type=click.Choice(["merged", "sft", "base"]),
    default="merged",
    show_default=True,
    help="Which model answers.",
)
@option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help="Longest answer, in tokens.  [default: the recipe's `infer.max_new_tokens`]",
)
@set_option
@store_option
def infer(run_and_questions: tuple[str, ...], overrides: tuple[str, ...], store: str | None, **options: Any) -> int:
    """Ask the model of RUN a question, or start a conversation.

    Without a QUESTION and without --prompts, infer reads questions from the terminal until end of file.
    """
    from llamarefine_k8s.runs import local_executor, records

    opened = open_store(store)
    record, questions = records.find_first(opened, run_and_questions)
    arguments = local_executor.infer_arguments(questions, overrides, **options)
    return local_executor.infer(record.own_recipe(), opened.uri, arguments)
