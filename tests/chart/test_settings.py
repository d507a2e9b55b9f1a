"""The launcher reads the settings that a release writes: the same keys with the same values, nulls included."""

from typing import get_args

import pytest
import yaml

from llamarefine_jobs.contract.version import __version__
from llamarefine_k8s.cluster.manifests import SETTINGS_MAP
from llamarefine_k8s.settings import Settings, parse

from .rendering import BUCKET, MINIO, ROOT, Values, needs_helm, one, render, settings_text
from .test_golden import CASES, EVERYTHING

pytestmark = needs_helm

NULLABLE = [name for name, field in Settings.model_fields.items() if type(None) in get_args(field.annotation)]
CAN_BE_NULL = [name for name in NULLABLE if name not in ("namespace", "context")]


def settings_of(values: Values) -> Settings:
    return parse(yaml.safe_load(settings_text(render(values))), "llamarefine.yaml")


@pytest.mark.parametrize("case", CASES)
def test_the_launcher_accepts_every_release(case: str) -> None:
    settings_of(CASES[case])


def test_the_values_of_make_kind_up_give_minio_and_no_gpu() -> None:
    values = yaml.safe_load((ROOT / "k8s/kind-values.yaml").read_text(encoding="utf-8"))
    found = settings_of(values)
    assert (found.store, found.gpu_resource) == ("s3://llamarefine", None)


def test_the_settings_map_has_the_name_that_the_launcher_reads() -> None:
    assert one(render(BUCKET), "ConfigMap")["metadata"]["name"] == SETTINGS_MAP


def test_a_setting_that_is_not_given_has_the_launchers_default() -> None:
    given = {"store": "s3://bucket/prefix", "namespace": "team", "stage_service_account": "llamarefine-stage"}
    assert settings_of(BUCKET) == Settings(**given)  # type: ignore[arg-type]


def test_every_given_setting_reaches_the_launcher() -> None:
    given = EVERYTHING["settings"] | {"namespace": "team"}
    assert settings_of(EVERYTHING) == parse(given, "the test")


def test_some_settings_can_be_null_and_have_another_default() -> None:
    assert len(CAN_BE_NULL) > 5
    assert any(Settings.model_fields[name].default is not None for name in CAN_BE_NULL)


@pytest.mark.parametrize("name", CAN_BE_NULL)
def test_null_stays_null(name: str) -> None:
    """helm drops nulls; the launcher must not then use its default."""
    values = {"settings": {**BUCKET["settings"], name: None}}
    assert getattr(settings_of(values), name) is None


def test_with_minio_enabled_it_is_the_store() -> None:
    found = settings_of(MINIO)
    assert (found.store, found.s3_endpoint) == ("s3://llamarefine", "http://llamarefine-minio:9000")


def test_image_names_equal_the_launchers() -> None:
    assert settings_of(BUCKET).image("sft") == f"llamarefine-sft:{__version__}"
    launcher = one(
        render({**BUCKET, "recipe": {"name": "x", "prepare": prepare_section()}}), "Job", "llamarefine-submit"
    )
    assert launcher["spec"]["template"]["spec"]["containers"][0]["image"] == settings_of(BUCKET).image("launcher")


def test_the_registry_is_prefixed_to_every_image() -> None:
    settings = {**BUCKET["settings"], "image_registry": "registry.example.com/team/", "image_tag": "v1"}
    objects = render({**MINIO, "settings": settings})
    pod = one(objects, "Deployment")["spec"]["template"]["spec"]
    names = {container["image"] for container in (*pod["initContainers"], *pod["containers"])}
    assert names == {"registry.example.com/team/llamarefine-minio:v1"}


def prepare_section() -> Values:
    return {"questions": {"source": "q.csv"}, "preferences": {"source": "p.jsonl"}}
