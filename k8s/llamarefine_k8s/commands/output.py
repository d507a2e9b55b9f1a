"""What the commands print: the comparison at the end of a run, its status, plans, lists, checks."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from llamarefine_jobs.contract.artifact import Manifest, run_path, short
from llamarefine_jobs.store import Store
from llamarefine_jobs.untrusted.control_characters import strip_control_characters
from llamarefine_k8s import settings
from llamarefine_k8s.cluster.run_status import StageStatus
from llamarefine_k8s.commands.display import duration, stage_table
from llamarefine_k8s.commands.terminal import command
from llamarefine_k8s.runs.checks import Check
from llamarefine_k8s.runs.garbage import Garbage
from llamarefine_k8s.runs.plan import PlannedStage
from llamarefine_k8s.runs.records import RunRecord, where
from llamarefine_k8s.runs.results import PARTS, Example, Interval, Metric, Report, part_of, part_place

_SHOWN_CHARACTERS = 240
_NAMES = {"base": "base", "sft": "base + SFT", "merged": "merged"}
_VERDICTS = {"better": "green", "worse": "red"}
_UNCLEAR = "—"
_ARROWS = {"lower": " ↓", "higher": " ↑"}


def print_header(console: Console, run: str, store: Store) -> None:
    """Print the run's name and its store."""
    console.print(Text.assemble((run, "bold"), (f"  in {where(store, '.').removesuffix('/.')}", "dim")), soft_wrap=True)


def print_report(console: Console, report: Report) -> None:
    """Print the before/after table, the caveats, one example and the gates."""
    narrow = console.width < 104
    changes = {"by SFT": ("base", "sft"), "by DPO": ("sft", "merged"), "by both": ("base", "merged")}
    shown = ["by both"] if narrow else list(changes)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("on held-out rows")
    for model in report.models:
        table.add_column(_NAMES[model], justify="right", no_wrap=True)
    for name in shown:
        table.add_column(name)
    for metric in report.metrics:
        title = metric.title.partition(" (")[0] + _ARROWS.get(metric.better or "", "")
        cells = [_value(metric.values.get(model), metric.digits) for model in report.models]
        table.add_row(title, *cells, *(_verdict(metric, *changes[name]) for name in shown))
    console.print()
    console.print(table)
    console.print(Text(f"±: half-width of the {report.confidence:.0%} interval; {_UNCLEAR}: no clear change", "dim"))
    for caveat in report.caveats:
        console.print(Text(f"! {caveat}", "yellow"))
    for example in report.examples[:1]:
        _print_example(console, example)
    for gate in report.gates:
        sign, style = ("✓", "green") if gate.passed else ("✗", "red")
        bound = gate.bound.replace("_", " ")
        console.print(Text(f"{sign} gate: {gate.metric} of {gate.model} {bound}, measured {gate.value:.4g}", style))


def print_places(console: Console, store: Store, record: RunRecord, into: Path | None) -> None:
    """Print the paths of the report and the model."""
    if into:
        report, model = str(into / "report.html"), str(into / "model")
    else:
        report = where(store, run_path(record.run, "report", "report.html"))
        model = part_place(store, part_of(store, record, "model"), "model")
    console.print(f"\nreport  {report}\nmodel   {model}", soft_wrap=True)


def print_next(console: Console, run: str, store: str | None, *, is_here: bool = False) -> None:
    """Print the commands to type after a run."""
    console.print("\nnext")
    for name, arguments in (("infer", ["Your question"]), ("pull", ["--into", "./model"]), ("report", ["--open"])):
        if name != "pull" or not is_here:
            console.print(f"  {suggested([name, run, *arguments], store)}", soft_wrap=True)


def suggested(words: Sequence[str], store: str | None = None, flags: Sequence[str] = ()) -> str:
    """Return a command for the user to type, with --store unless the settings here name that store already."""
    store_flags = ["--store", store] if store and store != settings.load().store else []
    return f"{command()} {shlex.join([*words, *store_flags, *flags])}"


def print_status(console: Console, store: Store, record: RunRecord) -> None:
    """Print a run's state and the table of its stages."""
    style = {"done": "green", "failed": "red", "interrupted": "yellow"}.get(record.state, "cyan")
    head = Text.assemble((record.run, "bold"), "  ", (record.state, style), (f"  {_ago(record.updated_at)}", "dim"))
    if record.state == "running":
        by = f"process {record.driver.pid} on {record.driver.host}"
        head.append(f", driven by {'its Job' if record.driver.host == record.run else by}", "dim")
    if record.gates_passed is False:
        head.append("  quality gates failed", "red")
    console.print(head, soft_wrap=True)
    console.print(stage_table(record))
    for stage in record.stages.values():
        if stage.state == "failed" and stage.log:
            console.print(Text(f"log: {where(store, stage.log)}", "dim"), soft_wrap=True)
    if record.state == "interrupted":
        console.print("Rerun the same command to resume.")


def print_cluster_status(
    console: Console, record: RunRecord | None, jobs: Sequence[StageStatus], cluster_error: str | None
) -> None:
    """Print what only the cluster shows, not the run's record: a driver or a stage that waits or failed, and why.

    `cluster_error` says why the cluster could not be read, if it could not; it is printed only for a running run.
    """
    done = record is not None and record.state == "done"
    for job in jobs:
        if job.state == "waits" and not done:
            console.print(
                Text(f"{job.name} waits: {job.reason or 'its pod is being started'}", "yellow"), soft_wrap=True
            )
        elif job.state == "failed" and (record is None or job.name not in record.stages):
            console.print(Text(f"{job.name} failed: {job.reason}", "red"), soft_wrap=True)
        elif record is None:
            console.print(f"{job.name} {job.state}")
    if cluster_error and record and record.state == "running":
        console.print(Text(f"the cluster's state is unknown: {cluster_error}", "dim"), soft_wrap=True)


def yaml_of(objects: Sequence[dict[str, Any]]) -> str:
    """Return Kubernetes objects as a stream of YAML documents, without anchors."""
    return yaml.dump_all(objects, Dumper=_Plain, sort_keys=False, allow_unicode=True, width=120).rstrip()


class _Plain(yaml.SafeDumper):
    """Writes repeated values in full instead of as anchors, and multi-line texts as blocks."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Plain.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def print_runs(console: Console, records: Sequence[RunRecord]) -> None:
    """Print one line per run, in the given order."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for title in ("RUN", "STATE", "STAGES", "LAST CHANGE"):
        table.add_column(title, no_wrap=True)
    for record in records:
        ready = sum(stage.state in ("done", "reused") for stage in record.stages.values())
        state = record.state if record.gates_passed is not False else f"{record.state}, gates failed"
        table.add_row(record.run, state, f"{ready}/{len(record.stages)}", _ago(record.updated_at))
    console.print(table)


def print_plan(
    console: Console, run: str, store: Store, planned: Sequence[PlannedStage], memory: Mapping[str, str]
) -> None:
    """Print one line per stage of a plan. `memory` is the estimated GPU memory of each training, as text."""
    states = {"there": ("in the store", "green"), "due": ("will run", "cyan"), "follows": ("will run", "cyan")}
    print_header(console, run, store)
    table = Table.grid(padding=(0, 3, 0, 0))
    for stage in planned:
        key = short(stage.key) if stage.key else "no key yet"
        row = (stage.stage, Text(*states[stage.state]), Text(key, "dim"), "; ".join(stage.reasons))
        known = [f"took {duration(stage.took_s)} last time"] if stage.took_s is not None else []
        if stage.state != "there" and (needs := memory.get(stage.stage)):
            known.append(f"{needs} of GPU memory (estimated)")
        table.add_row(*row, Text(", ".join(known), "dim"))
    console.print(table)
    due = sum(stage.state != "there" for stage in planned)
    if not due:
        console.print("Nothing to run.")


def print_pulled(console: Console, manifest: Manifest, what: str, into: Path, statement: Path | None = None) -> None:
    """Print what was downloaded, where to, and how to load it."""
    files = manifest.part(PARTS[what][1]) if PARTS[what][1] else manifest.files
    size = decimal(sum(file.size_bytes for file in files))
    counted = f"{len(files)} file{'s' if len(files) > 1 else ''}, {size}"
    console.print(f"{into}: {what} {short(manifest.key)}, {counted}, every byte verified", soft_wrap=True)
    loads = {
        "model": f'AutoModelForCausalLM.from_pretrained("{into}")',
        "sft": f'PeftModel.from_pretrained(base, "{into}")',
        "dpo": f'PeftModel.from_pretrained(base_with_sft_merged, "{into}")',
        "report": f"open {into / 'report.html'}",
    }
    console.print(f"  {loads[what]}", soft_wrap=True)
    if statement:
        console.print(f"  {into.with_name(statement.name)} states what it was made from", soft_wrap=True)


def print_checks(console: Console, found: Iterable[Check]) -> list[Check]:
    """Print one line per check of `preflight` or `verify`, each as soon as its outcome is known; return all of them."""
    checks = []
    for check in found:
        style = {"ok": "green", "warning": "yellow", "FAIL": "red bold"}[check.state]
        console.print(Text.assemble((f"{check.state:<8}", style), f"{check.name}: {check}"), soft_wrap=True)
        checks.append(check)
    return checks


def print_garbage(console: Console, found: Garbage, *, removed: bool) -> None:
    """Print one line per item of garbage, then its size and how many runs are kept."""
    for item in found.items:
        number = len(item.files) + bool(item.marker)
        text = f"{number} object{'s' if number > 1 else ''}, {decimal(item.size_bytes)}; {item.why}"
        console.print(Text.assemble(f"{item.kind} {item.name}  ", (text, "dim")), soft_wrap=True)
    kept = f"{found.kept_runs} run{'s' if found.kept_runs != 1 else ''} kept"
    if not found.items:
        console.print(f"nothing to remove; {kept}")
        return
    action = "removed" if removed else "would be removed; add --delete to remove it"
    console.print(f"{decimal(found.size_bytes)} {action}; {kept}", soft_wrap=True)


def _print_example(console: Console, example: Example) -> None:
    console.print(Text("\none held-out question, answered", "bold"))
    texts = {"question": example.question, "reference": example.reference}
    texts |= {_NAMES[model]: answer for model, answer in example.answers.items()}
    _print_pairs(console, [(name, _shortened(text)) for name, text in texts.items()])


def _print_pairs(console: Console, pairs: Sequence[tuple[str, str]]) -> None:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="dim")
    grid.add_column(overflow="fold")
    for name, text in pairs:
        grid.add_row(name, Text(text))
    console.print(Padding(grid, (0, 0, 0, 2)))


def _value(measured: Interval | None, digits: int) -> Text:
    if measured is None:
        return Text("not measured", "dim")
    value = Text(f"{measured.value:,.{digits}f}")
    if measured.low is None or measured.high is None:  # too few test rows for an interval
        return value.append(" ±?", "dim")
    half_width = max(measured.high - measured.value, measured.value - measured.low)
    return value.append(f" ±{half_width:,.{digits}f}", "dim")


def _verdict(metric: Metric, source: str, target: str) -> Text:
    for change in metric.changes:
        if (change.source, change.target) == (source, target):
            text = _UNCLEAR if change.verdict == "no clear change" else change.verdict
            return Text(text, _VERDICTS.get(change.verdict, "dim"))
    return Text("")


def _shortened(text: str) -> str:
    line = " ".join(strip_control_characters(text.replace("\n", " ⏎ ")).split()) or "(nothing)"
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]}…"


def _ago(then: datetime) -> str:
    seconds = (datetime.now(UTC) - then).total_seconds()
    if seconds < 5:
        return "just now"
    return f"{duration(seconds)} ago" if seconds < 86_400 else f"{then:%Y-%m-%d %H:%M} UTC"
