"""The chart's schema and the table in its README, written from values.schema.yaml and the launcher's own models."""

import json
from collections.abc import Iterator
from typing import Any

import yaml

from llamarefine_jobs.contract.recipe import json_schema
from llamarefine_jobs.contract.stages import STAGES
from llamarefine_k8s.settings import ALL, DRIVER, Settings

from .documents import ROOT, text_of
from .sections import replaced, table

CHART = ROOT / "charts/llamarefine"

DECIDED_BY_THE_CHART = ("context", "namespace")  # settings inside a cluster use no kubeconfig

Schema = dict[str, Any]


def contents() -> dict[str, str]:
    """Return what each generated file of the chart must contain, by its path in the repository."""
    schema = values_schema()
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    values_table = table(("value", "default", "what it is"), list(_rows(schema, values)))
    return {
        "charts/llamarefine/values.schema.json": json.dumps(schema, indent=2, ensure_ascii=False) + "\n",
        "charts/llamarefine/README.md": replaced(text_of("charts/llamarefine/README.md"), "values", values_table),
    }


def values_schema() -> Schema:
    """Return the schema of the chart's values: its own part, the launcher's settings and the recipe."""
    schema: Schema = yaml.safe_load((CHART / "values.schema.yaml").read_text(encoding="utf-8"))
    for name, model in (("Settings", _settings()), ("Recipe", json_schema())):
        for key in ("$schema", "$id"):
            model.pop(key, None)
        parts = model.pop("$defs", {})
        moved = {part: f"{name}.{part}" for part in parts} if name == "Recipe" else {part: part for part in parts}
        schema["$defs"] |= _moved({moved[part]: body for part, body in parts.items()} | {name: model}, moved)
    on_top = schema["properties"]["settings"]
    schema["properties"]["settings"] = _merged(schema["$defs"].pop("Settings"), on_top)
    return schema


def _settings() -> Schema:
    """Return the settings' schema: without what the chart decides, the stages' names as keys, `cpu: 2` allowed."""
    schema = Settings.model_json_schema()
    properties = schema["properties"]
    for name in DECIDED_BY_THE_CHART:
        del properties[name]
    for name, more in (("resources", (DRIVER,)), ("patches", (DRIVER, ALL))):
        each = properties[name].pop("additionalProperties")
        properties[name] |= {"properties": dict.fromkeys((*STAGES, *more), each), "additionalProperties": False}
    for name in ("requests", "limits"):
        schema["$defs"]["Resources"]["properties"][name]["additionalProperties"]["type"] = ["string", "number"]
    return schema


def _moved(schema: Any, names: dict[str, str]) -> Any:
    """Return `schema` with its references changed to the moved definitions, and without pydantic's titles."""
    if isinstance(schema, list):
        return [_moved(item, names) for item in schema]
    if not isinstance(schema, dict):
        return schema
    kept = {key: value for key, value in schema.items() if not (key == "title" and isinstance(value, str))}
    if isinstance(kept.get("$ref"), str):
        return kept | {"$ref": "#/$defs/" + names[kept["$ref"].removeprefix("#/$defs/")]}
    return {key: _moved(value, names) for key, value in kept.items()}


def _merged(below: Any, on_top: Any) -> Any:
    if not isinstance(below, dict):
        return on_top
    return below | {key: _merged(below.get(key), value) for key, value in on_top.items()}


def _rows(schema: Schema, defaults: Any, path: str = "") -> Iterator[tuple[str, ...]]:
    """Yield a row for each value, in the schema's order. A section with a description has a row of its own."""
    for name, value in schema["properties"].items():
        full = f"{path}.{name}" if path else name
        section = value.get("additionalProperties") is False and "properties" in value and full.count(".") < 2
        if name == "global":
            continue
        if section and full not in ("settings.resources", "settings.patches"):
            if "description" in value:
                yield f"**{full}**", "", value["description"]
            yield from _rows(value, defaults[name], full)
        else:
            default = defaults.get(name, value.get("default"))
            shown = f"`{json.dumps(default)}`" if default not in ("", None, [], {}) else ""
            yield f"`{full}`", shown, value["description"]
