"""The command `llamarefine`: one click group, assembled from the modules in commands/.

Each command translates its options, calls into runs/ or cluster/, and prints the result. Third-party packages other
than click are imported inside the command that uses them, so that `llamarefine --help` stays fast.
"""

import click

from llamarefine_jobs.contract.version import __version__
from llamarefine_k8s.commands import launch, maintenance, monitoring, results
from llamarefine_k8s.commands.terminal import run_command


class _OrderedGroup(click.Group):
    """Lists its commands in the order in which they were added, not alphabetically."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=_OrderedGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, "--version", "-V", message="%(version)s")
def cli() -> None:
    """Fine-tune a small Llama in stages: SFT, DPO, one merge, and a before/after report.

    \b
    llamarefine init --demo            write a recipe to start from
    llamarefine run recipe.yaml        run the stages whose artifacts are missing
    llamarefine infer "Your question"  ask the trained model
    llamarefine pull --into ./model    download that model
    \b
    llamarefine submit recipe.yaml     run them on Kubernetes, one Job per stage
    llamarefine status                 show the progress, and why a stage is waiting

    RUN is the name of a run or the beginning of it. Without RUN, the newest run is used.
    """


for _command in (
    *(launch.init, launch.plan, launch.preflight, launch.run, launch.submit),
    *(monitoring.status, monitoring.logs, monitoring.cancel, monitoring.list_runs),
    *(results.pull, results.report, results.infer),
    *(maintenance.verify, maintenance.gc, maintenance.version),
):
    cli.add_command(_command)


def main() -> None:
    """Run `llamarefine`; see `terminal.run_command`."""
    run_command(cli)
