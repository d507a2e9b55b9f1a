"""Compute the geometry of the report's charts. The HTML template draws them as SVG and adds colours and words."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One series: its SVG path and its points, in pixels of the chart."""

    name: str
    path: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Chart:
    """Lines on common axes; each tick is (position in pixels, label)."""

    width: int
    height: int
    left: int
    bottom: float
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    guide: float | None  # y of a horizontal line to compare the lines with


@dataclass(frozen=True)
class Whisker:
    """One model's value and interval on a strip, in pixels; `low` and `high` are None if there is no interval."""

    model: str
    y: float
    value: float
    low: float | None
    high: float | None


def draw_chart(
    series: Mapping[str, Sequence[Point]], *, guide: float | None = None, width: int = 320, height: int = 200
) -> Chart | None:
    """Return a chart of the series that have points, on axes that contain all of them; None if no series has points."""
    drawn = {name: points for name, points in series.items() if points}
    if not drawn:
        return None
    left, right, top, bottom = 36, 8, 10, height - 24
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points] + ([] if guide is None else [guide])
    y_ticks = _ticks(min(ys), max(ys), 4)
    low_y, high_y = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)
    last_x = max(xs) or 1.0

    def place(point: Point) -> Point:
        x = left + (width - left - right) * point[0] / last_x
        return round(x, 1), round(bottom - (bottom - top) * (point[1] - low_y) / (high_y - low_y), 1)

    lines = []
    for name, points in drawn.items():
        placed = tuple(place(point) for point in sorted(points))
        lines.append(Line(name, "M" + "L".join(f"{x} {y}" for x, y in placed), placed))
    x_ticks = [tick for tick in _ticks(0, last_x, 5) if tick <= last_x]
    return Chart(
        width=width,
        height=height,
        left=left,
        bottom=bottom,
        lines=tuple(lines),
        x_ticks=tuple((place((tick, low_y))[0], f"{tick:g}") for tick in x_ticks),
        y_ticks=tuple((place((0, tick))[1], f"{tick:g}") for tick in y_ticks),
        guide=None if guide is None else place((0, guide))[1],
    )


def draw_strip(values: Mapping[str, Mapping[str, Any]], *, width: int, row_height: int = 15) -> list[Whisker]:
    """Return the models' values and intervals, one below the other on one scale."""
    ends = [value[end] for value in values.values() for end in ("value", "low", "high") if value[end] is not None]
    low, extent, margin = min(ends), (max(ends) - min(ends)) or 1.0, 6

    def place(value: float | None) -> float | None:
        return None if value is None else round(margin + (width - 2 * margin) * (value - low) / extent, 1)

    placed = ({end: place(value[end]) for end in ("value", "low", "high")} for value in values.values())
    return [
        Whisker(model, row_height * (row + 0.5), ends["value"] or 0.0, ends["low"], ends["high"])
        for row, (model, ends) in enumerate(zip(values, placed, strict=True))
    ]


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round numbers that enclose `low` to `high`, in steps of 1, 2 or 5 times a power of ten."""
    extent = (high - low) or abs(high) or 1.0
    rough = extent / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.10g}") for index in range(first, max(last, first + 1) + 1)]
