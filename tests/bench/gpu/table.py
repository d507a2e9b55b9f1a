"""Format the figures as a table for the documents, with the targets."""

from typing import Any

TARGETS = """\
Targets, on an H100 or H200 at TinyLlama's shape: SFT at least 79,000 tokens/s (35 % MFU), five times the
earlier attempt and 1.5 times plain TRL + PEFT; three epochs of 7,108 rows under 60 s of training; 10,000 pairs for one
epoch under 180 s."""
_NOT_MEASURED = "not measured"
_COLUMNS = ("stage", "arm", "backend", "tokens/s", "× plain", "MFU", "peak memory", "memory estimated")
_COLUMNS += ("load", "build", "timed steps", "whole training")


def markdown(found: dict[str, Any]) -> str:
    """Return a table of all measurements; a figure that is null is shown as "not measured"."""
    libraries = ", ".join(f"{name} {version}" for name, version in found["libraries"].items() if version)
    lines = [
        f"Measured {found['at']} at commit `{found['commit'] or 'unknown'}`, shape {found['shape']}, "
        f"on {found['gpu'] or 'a CPU'}, driver {found['driver'] or 'none'}, CUDA {found['cuda'] or 'none'}; "
        f"{libraries}.",
        f"Rows: {found['rows']['read']} of {found['rows']['source']}. Command: `{found['command']}`.",
        "",
        "| " + " | ".join(_COLUMNS) + " |",
        "| --- | --- | --- |" + " ---: |" * (len(_COLUMNS) - 3),
    ]
    plain = {one["stage"]: one.get("tokens_per_s") for one in found["measurements"] if one["arm"] == "plain"}
    for one in found["measurements"]:
        if one["error"]:
            lines.append(f"| {one['stage']} | {one['arm']} | failed: {one['error']} |" + " |" * (len(_COLUMNS) - 3))
            continue
        cells = [
            one["stage"],
            one["arm"],
            one["backend"],
            _figure(one["tokens_per_s"], "{:,.0f}"),
            _ratio(one["tokens_per_s"], plain.get(one["stage"])),
            _figure(one["mfu"], "{:.1%}"),
            _figure(one["peak_memory_bytes"] and one["peak_memory_bytes"] / 2**30, "{:.1f} GiB"),
            f"{one['estimated_memory_bytes'] / 2**30:.1f} GiB",
            _figure(one["load_seconds"], "{:.1f} s"),
            _figure(one["build_seconds"], "{:.1f} s"),
            f"{one['timed_steps']} in {one['timed_seconds']:.1f} s",
            f"{_figure(one['whole_training_seconds_estimated'], '{:.0f} s')} (estimated)",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", TARGETS, ""])


def _figure(value: float | None, form: str) -> str:
    return _NOT_MEASURED if value is None else form.format(value)


def _ratio(value: float | None, other: float | None) -> str:
    return f"{value / other:.2f}" if value and other else _NOT_MEASURED
