"""What is printed of runs: the comparison a run ends with, plans, lists."""

import shlex
from collections.abc import Mapping, Sequence
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
from llamarefine_k8s.runs.gpu_memory import gib
from llamarefine_k8s.runs.plan import PlannedStage
from llamarefine_k8s.runs.records import RunRecord, where
from llamarefine_k8s.runs.results import PARTS, Example, Interval, Metric, Report, part_of, part_place

_SHOWN_CHARACTERS = 240
_NAMES = {"base": "base", "sft": "base + SFT", "merged": "merged"}
_VERDICTS = {"better": "green", "worse": "red"}
_UNCLEAR = "—"
_ARROWS = {"lower": " ↓", "higher": " ↑"}


def print_header(console: Console, run: str, store: Store) -> None:
    """Which run this is, and where it is kept."""
    console.print(Text.assemble((run, "bold"), (f"  in {where(store, '.').removesuffix('/.')}", "dim")), soft_wrap=True)


def print_report(console: Console, report: Report) -> None:
    """The before/after table, one example, the gates, the caveats."""
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
    console.print(Text(f"± reaches the {report.confidence:.0%} interval; {_UNCLEAR} no clear change", "dim"))
    for caveat in report.caveats:
        console.print(Text(f"! {caveat}", "yellow"))
    for example in report.examples[:1]:
        _print_example(console, example)
    for gate in report.gates:
        sign, style = ("✓", "green") if gate.passed else ("✗", "red")
        bound = gate.bound.replace("_", " ")
        console.print(Text(f"{sign} gate: {gate.metric} of {gate.model} {bound}, measured {gate.value:.4g}", style))


def print_places(console: Console, store: Store, record: RunRecord, into: Path | None) -> None:
    """Where model and report lie."""
    if into:
        report, model = str(into / "report.html"), str(into / "model")
    else:
        report = where(store, run_path(record.run, "report", "report.html"))
        model = part_place(store, part_of(store, record, "model"), "model")
    console.print(f"\nreport  {report}\nmodel   {model}", soft_wrap=True)


def print_next(console: Console, run: str, store: str | None, *, is_here: bool = False) -> None:
    """What to type after a run; `store` is named where the settings here do not."""
    flags = ["--store", store] if store and store != settings.load().store else []
    console.print("\nnext")
    for words, more in (("infer", ["Your question"]), ("pull", ["--into", "./model"]), ("report", ["--open"])):
        if words != "pull" or not is_here:
            console.print(f"  {command()} {shlex.join([words, run, *more, *flags])}", soft_wrap=True)


def print_status(console: Console, store: Store, record: RunRecord) -> None:
    """A run and its stages."""
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
        console.print("The same command goes on from there.")


def print_live(console: Console, record: RunRecord | None, jobs: Sequence[StageStatus], trouble: str | None) -> None:
    """What the cluster says of a run beyond its record: a driver that does not run, a stage that waits, and why."""
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
    if trouble and record and record.state == "running":
        console.print(Text(f"the cluster could not be asked: {trouble}", "dim"), soft_wrap=True)


def yaml_of(objects: Sequence[dict[str, Any]]) -> str:
    """Objects as a stream of YAML documents, each as it is sent."""
    return yaml.dump_all(objects, Dumper=_Plain, sort_keys=False, allow_unicode=True, width=120).rstrip()


class _Plain(yaml.SafeDumper):
    """No anchors for what stands twice, and a text of several lines as a block."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Plain.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def print_runs(console: Console, records: Sequence[RunRecord]) -> None:
    """One line a run, the newest first."""
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for title in ("RUN", "STATE", "STAGES", "LAST CHANGE"):
        table.add_column(title, no_wrap=True)
    for record in records:
        ready = sum(stage.state in ("done", "reused") for stage in record.stages.values())
        state = record.state if record.gates_passed is not False else f"{record.state}, gates failed"
        table.add_row(record.run, state, f"{ready}/{len(record.stages)}", _ago(record.updated_at))
    console.print(table)


def print_plan(
    console: Console, run: str, store: Store, planned: Sequence[PlannedStage], memory: Mapping[str, int]
) -> None:
    """What a run would do, one line a stage; `memory` is what trainings are estimated to need of a GPU's, in bytes."""
    states = {"there": ("is there", "green"), "due": ("will run", "cyan"), "follows": ("will run", "cyan")}
    print_header(console, run, store)
    table = Table.grid(padding=(0, 3, 0, 0))
    for stage in planned:
        key = short(stage.key) if stage.key else "key not known yet"
        row = (stage.stage, Text(*states[stage.state]), Text(key, "dim"), "; ".join(stage.reasons))
        known = [f"took {duration(stage.took_s)} last time"] if stage.took_s is not None else []
        if stage.state != "there" and (needs := memory.get(stage.stage)):
            known.append(f"about {gib(needs)} of GPU memory (estimated)")
        table.add_row(*row, Text(", ".join(known), "dim"))
    console.print(table)
    due = sum(stage.state != "there" for stage in planned)
    if not due:
        console.print("Nothing to run.")


def print_pulled(console: Console, manifest: Manifest, what: str, into: Path, statement: Path | None = None) -> None:
    """What was brought where, and how it is used."""
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
        console.print(f"  {into.with_name(statement.name)} says what it was made from", soft_wrap=True)


def print_check(console: Console, check: Check) -> None:
    """One line of `preflight` or `verify`."""
    style = {"ok": "green", "warning": "yellow", "FAIL": "red bold"}[check.state]
    console.print(Text.assemble((f"{check.state:<8}", style), f"{check.name}: {check}"), soft_wrap=True)


def print_garbage(console: Console, found: Garbage, *, removed: bool) -> None:
    """What goes, one line each, and what stays."""
    for item in found.items:
        number = len(item.files) + bool(item.marker)
        text = f"{number} object{'s' if number > 1 else ''}, {decimal(item.size_bytes)}; {item.why}"
        console.print(Text.assemble(f"{item.kind} {item.name}  ", (text, "dim")), soft_wrap=True)
    stay = f"{found.kept_runs} run{'s' if found.kept_runs != 1 else ''} stay{'s' if found.kept_runs == 1 else ''}"
    if not found.items:
        console.print(f"nothing to remove; {stay}")
        return
    done = "removed" if removed else "would go, and --delete removes it"
    console.print(f"{decimal(found.size_bytes)} {done}; {stay}", soft_wrap=True)


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
    reach = max(measured.high - measured.value, measured.value - measured.low)
    return value.append(f" ±{reach:,.{digits}f}", "dim")


def _verdict(metric: Metric, source: str, target: str) -> Text:
    for change in metric.changes:
        if (change.source, change.target) == (source, target):
            word = _UNCLEAR if change.verdict == "no clear change" else change.verdict
            return Text(word, _VERDICTS.get(change.verdict, "dim"))
    return Text("")


def _shortened(text: str) -> str:
    line = " ".join(strip_control_characters(text.replace("\n", " ⏎ ")).split()) or "(nothing)"
    return line if len(line) <= _SHOWN_CHARACTERS else f"{line[:_SHOWN_CHARACTERS]}…"


def _ago(then: datetime) -> str:
    seconds = (datetime.now(UTC) - then).total_seconds()
    if seconds < 5:
        return "just now"
    return f"{duration(seconds)} ago" if seconds < 86_400 else f"{then:%Y-%m-%d %H:%M} UTC"
