"""The chart's values: valid ones pass `helm lint`, and each mistake is refused with an error that names it."""

from typing import Any

import jsonschema
import pytest
import yaml

from llamarefine_jobs.contract.version import __version__
from tests.repo.chart import DECIDED_BY_THE_CHART, values_schema

from .rendering import BUCKET, CHART, DEMO, MINIO, Values, helm, needs_helm, refusal, render
from .test_golden import CASES


@needs_helm
@pytest.mark.parametrize("case", CASES)
def test_lint_reports_no_warning(case: str) -> None:
    output = helm("lint", "--strict", CHART, values=CASES[case]).stdout
    assert "0 chart(s) failed" in output
    assert "WARNING" not in output


@needs_helm
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"minoi": {"enabled": True}}, "'minoi' not allowed"),
        ({"minio": {"enable": True}}, "at '/minio': additional properties 'enable' not allowed"),
        ({"settings": {"sotre": "s3://b"}}, "at '/settings': additional properties 'sotre' not allowed"),
        ({"settings": {"resources": {"stf": {}}}}, "at '/settings/resources': additional properties 'stf'"),
        ({"settings": {"resources": {"sft": {"gpu": 1}}}}, "at '/settings/resources/sft': additional properties 'gpu'"),
        ({"settings": {"resources": {"sft": {"limits": {"memory": "8 GB"}}}}}, "/settings/resources/sft/limits/memory"),
        ({"settings": {"patches": {"every": {}}}}, "at '/settings/patches': additional properties 'every'"),
        ({"settings": {"image_pull_policy": "Sometimes"}}, "value must be one of 'Always', 'IfNotPresent', 'Never'"),
        ({"settings": {"ttl_s": "1h"}}, "at '/settings/ttl_s': got string, want integer"),
        ({"settings": {"namespace": "other"}}, "'namespace' not allowed"),
        ({"networkPolicy": {"apiServer": {"ports": [0]}}}, "/networkPolicy/apiServer/ports/0"),
        ({"recipe": {"name": "docs", "prepare": {}, "stf": {}}}, "at '/recipe': additional properties 'stf'"),
        ({"recipe": "name: ["}, "recipe: cannot be read as YAML"),
        ({"secret": {"accessKeyId": "key"}}, "accessKeyId and secretAccessKey go together"),
        (MINIO | {"settings": {"secret_name": None}}, "settings.secret_name is empty"),
    ],
)
def test_an_invalid_value_is_refused_and_named(values: Values, words: str) -> None:
    settings = BUCKET["settings"] | values.get("settings", {})
    assert words in refusal({**values, "settings": settings})


@needs_helm
def test_a_release_without_a_bucket_is_refused() -> None:
    assert "settings.store is empty: name a bucket" in refusal({})


def test_every_section_of_the_schema_refuses_unknown_keys() -> None:
    """Except sections whose keys the user chooses: labels, and raw parts of pods and policies."""
    sections = list(sections_of(values_schema()))
    assert len(sections) > 20
    free = {"settings", "requests", "limits", "node_selector", "Strings", "global", "resources", "items", "each"}
    assert [path for path, is_closed in sections if not is_closed and path[-1] not in free] == []


def sections_of(schema: Any, path: tuple[str, ...] = ("values",)) -> Any:
    """Yield the path of each object in a schema that lists its keys, and whether it refuses all others."""
    if isinstance(schema, list):
        for item in schema:
            yield from sections_of(item, path)
    elif isinstance(schema, dict):
        if isinstance(schema.get("properties"), dict):
            yield path, schema.get("additionalProperties") is False
        for name, value in schema.items():
            yield from sections_of(value, (*path, name))


def test_values_yaml_lists_every_value_and_mentions_every_setting() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    schema = values_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(values, schema)
    assert set(values) == set(schema["properties"]) - {"global"}
    for section in set(values) - {"settings", "recipe"}:
        assert set(values[section]) == set(schema["properties"][section]["properties"]), section
    commented = (CHART / "values.yaml").read_text(encoding="utf-8")
    assert [name for name in schema["properties"]["settings"]["properties"] if name not in commented] == []
    assert not set(DECIDED_BY_THE_CHART) & set(values["settings"])


def test_the_chart_has_the_version_of_the_package() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert (chart["version"], chart["appVersion"]) == (__version__, __version__)


@needs_helm
def test_a_recipe_may_be_a_file_or_inline_values() -> None:
    from llamarefine_jobs.recipe_file import load_recipe, parse_recipe

    as_keys = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    for objects in (render(BUCKET, f"--set-file=recipe={DEMO}"), render({**BUCKET, "recipe": as_keys})):
        (text,) = [each["data"]["recipe.yaml"] for each in objects if "recipe.yaml" in each.get("data", {})]
        assert parse_recipe(text, "recipe.yaml") == load_recipe(DEMO)


@needs_helm
def test_the_packaged_chart_leaves_out_the_schemas_source(tmp_path: Any) -> None:
    import tarfile

    helm("package", CHART, "--destination", tmp_path)
    with tarfile.open(next(tmp_path.iterdir())) as packed:
        names = {name.removeprefix("llamarefine/") for name in packed.getnames()}
    assert {"values.schema.json", "values.yaml", "templates/NOTES.txt"} <= names
    assert "values.schema.yaml" not in names
