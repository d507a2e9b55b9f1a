"""Options and arguments shared by several commands. Every flag can also be set by an environment variable."""

import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

if TYPE_CHECKING:
    from llamarefine_jobs.store import Store

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def option(flag: str, *names: str, **attributes: Any) -> Decorator:
    """Return a click option that an environment variable can set, too: LLAMAREFINE_STORE for --store."""
    variable = "LLAMAREFINE_" + flag.removeprefix("--").replace("-", "_").upper()
    return click.option(flag, *names, envvar=variable, show_envvar=True, **attributes)


store_option = option(
    "--store",
    metavar="URI",
    help="Where artifacts and runs are kept: s3://bucket/prefix, file:///folder or a path.  [default: `store` in "
    "llamarefine.yaml, else ./llamarefine-store]",
)
set_option = option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key of the recipe, such as sft.epochs=2. Repeatable.",
)
settings_option = option(
    "--settings",
    "file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Use only this file; ignore the chart's settings.",
)
public_key_option = option(
    "--public-key",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Public key (PEM). Fail unless its private key signed the run's statement.",
)
json_option = option("--json", "as_json", is_flag=True, help="Print JSON.")
recipe_argument = click.argument("recipe", type=click.Path(dir_okay=False, path_type=Path))
run_argument = click.argument("run", required=False)


class Age(click.ParamType[timedelta]):
    """A duration in hours, days or weeks, written as 12h, 30d or 2w."""

    name = "age"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> timedelta:
        found = re.fullmatch(r"([0-9]{1,5})([hdw])", str(value))
        if not found:
            self.fail(f"expected an age such as 30d, 12h or 2w, found {value}", param, ctx)
        return timedelta(hours=int(found[1]) * {"h": 1, "d": 24, "w": 7 * 24}[found[2]])


def open_store(given: str | None) -> "Store":
    """Open the store that --store names, or else the one in the settings."""
    from llamarefine_jobs.store import Store
    from llamarefine_k8s import settings

    return Store(settings.load(store=given).store)


def typed_cluster_flags() -> list[str]:
    """Return --context and --namespace as the user typed them, for the commands that a message suggests.

    What the environment says is left out: it also applies to the next command.
    """
    context = click.get_current_context()
    return [
        word
        for name in ("context", "namespace")
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
        for word in (f"--{name}", str(context.params[name]))
    ]


def cluster_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --context and --namespace to a command."""
    for decorate in (
        option("--namespace", "-n", metavar="NAME", help="Kubernetes namespace.  [default: the context's]"),
        option("--context", metavar="NAME", help="Context of the kubeconfig.  [default: the current one]"),
    ):
        command = decorate(command)
    return command
