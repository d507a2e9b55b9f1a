"""The report as pages: one self-contained HTML file, and the same content in Markdown.

Every text that comes from data is escaped: by jinja2 in HTML, by `fenced` and `inline` in Markdown.
"""

import math
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any, NamedTuple

import jinja2
import yaml

from llamarefine_jobs.contract.artifact import short
from llamarefine_jobs.report.plots import Chart, draw_chart, draw_strip

_LONG_TEXT = 6000  # characters of an answer that the page shows; report.json has the whole answer
_LONG_FIGURE = 44  # characters that fit in the cell beside the name
_MOST_DIGITS = 5
_LEAST_UNITS = 3  # least width of an interval, in units of the last decimal that is shown


def html(report: Mapping[str, Any]) -> str:
    """Return the report as one HTML page that loads nothing from elsewhere."""
    return _render("report.html.j2", report)


def markdown(report: Mapping[str, Any]) -> str:
    """Return the report as Markdown."""
    return _render("report.md.j2", report)


def _render(template: str, report: Mapping[str, Any]) -> str:
    return (
        _environment()
        .get_template(template)
        .render(
            report=report,
            charts=_charts(report),
            recipe_yaml=yaml.safe_dump(report["recipe"], sort_keys=False, allow_unicode=True),
        )
    )


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("llamarefine_jobs.report"),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "estimate": estimate,
        "duration": duration,
        "size": size,
        "day": day,
        "short": short,
        "shorten": shorten,
        "words": words,
        "figure": figure,
        "by_kind": by_kind,
        "without": lambda values, name: {key: value for key, value in values.items() if key != name},
        "fenced": fenced,
        "inline": inline,
    }
    environment.globals |= {"draw_strip": draw_strip}
    return environment


def _charts(report: Mapping[str, Any]) -> list[tuple[str, str, Chart]]:
    """Return (title, stage, chart) for each training curve in the manifests."""
    wanted = (
        ("SFT: loss", "sft", {"training": "loss", "validation": "eval_loss"}, None),
        ("DPO: loss", "dpo", {"training": "loss", "validation": "eval_loss"}, math.log(2)),
        ("DPO: preference accuracy", "dpo", {"validation": "eval_reward_accuracy"}, 0.5),
    )
    drawn = []
    for title, stage, columns, guide in wanted:
        history = report["curves"].get(stage) or []
        series = {
            name: [(row["step"], row[column]) for row in history if _is_number(row.get(column)) and "step" in row]
            for name, column in columns.items()
        }
        chart = draw_chart(series, guide=guide)
        if chart:
            drawn.append((title, stage, chart))
    return drawn


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


# Format numbers and texts


def number(value: float | None, digits: int = 3) -> str:
    """Format `value` with a true minus sign and a space between thousands; a dash for None."""
    if value is None:
        return "–"
    text = f"{value:,.{digits}f}".replace("-", "\N{MINUS SIGN}").replace(",", "\N{NARROW NO-BREAK SPACE}")
    return text.lstrip("\N{MINUS SIGN}") if not re.search("[1-9]", text) else text


class FormattedEstimate(NamedTuple):
    """A value and its interval as text; `interval` is empty if there is none or if it is a point."""

    value: str
    interval: str


def estimate(values: Mapping[str, Any], digits: int, signed: bool = False) -> FormattedEstimate:
    """Format a value and its interval with `digits` decimals, or with more if the interval is narrow."""
    value, low, high = values["value"], values["low"], values["high"]
    bounded = low is not None and high is not None and high - low >= 10**-_MOST_DIGITS
    if bounded:
        needed = math.ceil(math.log10(_LEAST_UNITS / (high - low)))
        digits = min(max(digits, needed), max(digits, _MOST_DIGITS))
    text = number(value, digits)
    if signed and value > 0 and re.search("[1-9]", text):
        text = f"+{text}"
    return FormattedEstimate(text, f"{number(low, digits)} to {number(high, digits)}" if bounded else "")


def duration(seconds: float) -> str:
    """Format seconds in hours, minutes and seconds."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def size(size_bytes: float) -> str:
    """Format bytes in the largest unit in which the number is at least 1."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024 or unit == "GiB":
            break
        size_bytes /= 1024
    return f"{size_bytes:.0f} {unit}" if unit == "B" or size_bytes >= 10 else f"{size_bytes:.1f} {unit}"


def day(moment: str) -> str:
    """Format an ISO timestamp as a date and a time of day."""
    return datetime.fromisoformat(moment).strftime("%-d %B %Y, %H:%M UTC")


def shorten(text: str) -> str:
    """Cut a long text and say how much is left out."""
    if len(text) <= _LONG_TEXT:
        return text
    return f"{text[:_LONG_TEXT]}\n… {len(text) - _LONG_TEXT:,} more characters in report.json"


def words(name: Any) -> str:
    """Format a key of the data card or of a proof as words."""
    return str(name).replace("_", " ")


def figure(value: Any) -> str:
    """Format a value of the data card or of a proof; floats with four significant digits."""
    match value:
        case None:
            return "–"
        case bool():
            return "yes" if value else "no"
        case int():
            return number(value, 0)
        case float():
            return f"{value:.4g}".replace("-", "\N{MINUS SIGN}")
        case str():
            return value
        case Mapping():
            return "; ".join(f"{words(name)}: {figure(item)}" for name, item in value.items())
        case Sequence():
            return " / ".join(figure(item) for item in value)
        case _:
            return str(value)


class Kinds(NamedTuple):
    """The entries of a part of the data card or of a proof, sorted by how the page shows them."""

    figures: dict[str, Any]
    texts: dict[str, str]
    lists: dict[str, Sequence[Any]]
    parts: dict[str, Mapping[str, Any]]


def by_kind(values: Mapping[str, Any]) -> Kinds:
    """Sort entries into figures and short texts, long texts, lists, and nested parts; leave out empty lists."""
    kinds = Kinds({}, {}, {}, {})
    for name, value in values.items():
        match value:
            case Mapping():
                kinds.parts[name] = value
            case str() if len(value) > _LONG_FIGURE:
                kinds.texts[name] = value
            case list() | tuple():
                if value:
                    kinds.lists[name] = value
            case _:
                kinds.figures[name] = value
    return kinds


def fenced(text: str) -> str:
    """Return `text` as a Markdown code block with a fence that is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def inline(text: Any) -> str:
    """Escape `text` for a line or a table cell of Markdown."""
    flat = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", flat)
