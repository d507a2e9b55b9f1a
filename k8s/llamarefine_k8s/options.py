"""The options that commands share. Every flag has an environment variable of its name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def option(flag: str, *names: str, **attributes: Any) -> Decorator:
    """A click option with an environment variable: --max-new-tokens is LLAMAREFINE_MAX_NEW_TOKENS."""
    variable = "LLAMAREFINE_" + flag.removeprefix("--").replace("-", "_").upper()
    return click.option(flag, *names, envvar=variable, show_envvar=True, **attributes)


store_option = option(
    "--store",
    metavar="URI",
    help="Where artifacts and runs are: s3://bucket/prefix, file:///folder or a path.  [default: `store` in "
    "llamarefine.yaml, else ./llamarefine-store]",
)
set_option = option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change the recipe, as in sft.epochs=2; may repeat."
)
json_option = option("--json", "as_json", is_flag=True, help="Print JSON.")
recipe_argument = click.argument("recipe", type=click.Path(dir_okay=False, path_type=Path))
run_argument = click.argument("run", required=False)


def cluster_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--context and --namespace."""
    for decorate in (
        option("--namespace", "-n", metavar="NAME", help="Of the cluster.  [default: the kubeconfig context's]"),
        option("--context", metavar="NAME", help="Of the kubeconfig.  [default: its current one]"),
    ):
        command = decorate(command)
    return command
