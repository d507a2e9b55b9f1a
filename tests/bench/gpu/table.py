"""Format the figures as tables for the documents, with the targets."""

from typing import Any

TARGETS = """\
Targets, on an H100 or H200 at TinyLlama's shape: SFT with 16 rows a step at least 45,000 tokens/s and 15 times plain;
with 64 or more rows at least 80,000 tokens/s (36 % MFU). Three epochs of the CSV from imports to adapter in at most
60 s, of it 25 s of training; DPO on 10,000 pairs for one epoch, its reference included, in at most 120 s. The first
step at most 30 s after the start, 15 s with a warm compile cache."""
_NOT_MEASURED = "not measured"
_COLUMNS = ("stage", "arm", "rows a step", "tokens/s", "× plain", "MFU", "ms a step (10 % to 90 %)", "kernels a step")
_COLUMNS += ("GPU ms a step", "peak memory", "import", "load", "compile and capture", "first step")


def markdown(found: dict[str, Any]) -> str:
    """Return tables of all measurements; a figure that is null is shown as "not measured"."""
    libraries = ", ".join(f"{name} {version}" for name, version in found["libraries"].items() if version)
    lines = [
        f"Measured {found['at']} at commit `{found['commit'] or 'unknown'}`, shape {found['shape']}, "
        f"on {found['gpu'] or 'a CPU'}, driver {found['driver'] or 'none'}, CUDA {found['cuda'] or 'none'}; "
        f"{libraries}.",
        f"Rows: {found['rows']['read']} of {found['rows']['source']}, {found['rows']['pairs']} pairs. "
        f"Command: `{found['command']}`. Steps are timed after a warm-up; the four columns on the right are the start.",
        "",
        _row(_COLUMNS),
        "| --- | --- |" + " ---: |" * (len(_COLUMNS) - 2),
    ]
    steps = [one for one in found["measurements"] if "whole_s" not in one]
    plain = {
        (one["stage"], one["rows"]): one.get("tokens_per_s")
        for one in steps
        if one["arm"] == "plain" and "without" not in one["name"]
    }
    for one in steps:
        name = one["arm"] + (", cuDNN's attention off" if "without" in one["name"] else "")
        if one["error"]:
            lines.append(_row((one["stage"], name, str(one["rows"]), f"failed: {one['error']}")))
            continue
        ms = one["step_ms"]
        cells = [
            one["stage"],
            name,
            str(one["rows"]),
            _figure(one["tokens_per_s"], "{:,.0f}"),
            _ratio(one["tokens_per_s"], plain.get((one["stage"], one["rows"]))),
            _figure(one["mfu"], "{:.1%}"),
            f"{ms['median']:.1f} ({ms['p10']:.1f} to {ms['p90']:.1f})",
            _figure(one["kernels_per_step"], "{:,.0f}"),
            _figure(one["gpu_ms_per_step"], "{:.1f}"),
            _figure(one["peak_memory_bytes"] and one["peak_memory_bytes"] / 2**30, "{:.1f} GiB"),
            "-" if one["import_s"] is None else f"{one['import_s']:.1f} s",
            _figure(one["load_s"], "{:.1f} s"),
            _figure(one["prepare_s"], "{:.1f} s"),
            _figure(one["first_step_s"], "{:.1f} s"),
        ]
        lines.append(_row(cells))
    lines += ["", *_whole(found), "", TARGETS, ""]
    ways = [
        f"- {one['arm']}, {one['name']}: {way}" for one in found["measurements"] for way in one.get("slower_ways", [])
    ]
    lines += ["Slower ways that were taken:", "", *ways, ""] if ways else []
    lines += ["Not run:", "", *(f"- {one}" for one in found["not_run"]), ""] if found["not_run"] else []
    return "\n".join(lines)


def _whole(found: dict[str, Any]) -> list[str]:
    """Return the table of the whole trainings, each a process of its stage."""
    lines = [
        _row(("whole training by the stage", "from start to adapter", "start to first step", "training", "steps")),
        "| --- |" + " ---: |" * 4,
    ]
    for one in found["measurements"]:
        if "whole_s" in one:
            start = _figure(one["start_to_prepared_s"], "{:.1f} s")
            whole = one["error"] or _figure(one["whole_s"], "{:.1f} s")
            lines.append(_row((one["stage"], whole, start, _figure(one["training_s"], "{:.1f} s"), str(one["steps"]))))
    return lines


def _row(cells: Any) -> str:
    return "| " + " | ".join(cells) + " |"


def _figure(value: float | None, form: str) -> str:
    return _NOT_MEASURED if value is None else form.format(value)


def _ratio(value: float | None, other: float | None) -> str:
    return f"{value / other:.2f}" if value and other else _NOT_MEASURED
