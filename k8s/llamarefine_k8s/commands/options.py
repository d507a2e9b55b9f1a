"""The options that commands share. Every flag has an environment variable of its name."""

import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from llamarefine_jobs.store import Store

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
settings_option = option(
    "--settings", "file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="These settings alone."
)
public_key_option = option(
    "--public-key",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="PEM: the run's statement must be signed by its private half.",
)
json_option = option("--json", "as_json", is_flag=True, help="Print JSON.")
recipe_argument = click.argument("recipe", type=click.Path(dir_okay=False, path_type=Path))
run_argument = click.argument("run", required=False)


class Age(click.ParamType[timedelta]):
    """A length of time as people write it: 30d, 12h, 2w."""

    name = "age"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        found = re.fullmatch(r"([0-9]{1,5})([hdw])", str(value))
        if not found:
            self.fail(f"expected an age such as 30d, 12h or 2w, found {value}", param, ctx)
        return timedelta(hours=int(found[1]) * {"h": 1, "d": 24, "w": 7 * 24}[found[2]])


def open_store(given: str | None) -> "Store":
    """The store that --store names, else the settings."""
    from llamarefine_jobs.store import Store
    from llamarefine_k8s import settings

    return Store(settings.load(store=given).store)


def cluster_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--context and --namespace."""
    for decorate in (
        option("--namespace", "-n", metavar="NAME", help="Of the cluster.  [default: the kubeconfig context's]"),
        option("--context", metavar="NAME", help="Of the kubeconfig.  [default: its current one]"),
    ):
        command = decorate(command)
    return command
