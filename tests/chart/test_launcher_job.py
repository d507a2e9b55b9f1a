"""The Job that starts the pipeline: anew for a new recipe or new images, and in no upgrade's way."""

from typing import Any

import pytest

from llamarefine_jobs.contract.errors import Disposition, all_errors

from .rendering import BUCKET, Object, Values, needs_helm, one, render
from .test_golden import RECIPE

pytestmark = needs_helm


def launcher(**more: Any) -> Object:
    settings = {**BUCKET["settings"], **more.pop("settings", {})}
    return one(render({"recipe": RECIPE, **more, "settings": settings}), "Job", "llamarefine-submit")


def name(**more: Any) -> str:
    found: str = launcher(**more)["metadata"]["name"]
    return found


def test_without_a_recipe_nothing_is_started() -> None:
    assert [each for each in render(BUCKET) if each["kind"] == "Job" and "annotations" not in each["metadata"]] == []


@pytest.mark.parametrize(
    "more",
    [
        {"networkPolicy": {"enabled": False}},
        {"minio": {"resources": {}}},
        {"settings": {"ttl_s": 60, "resources": {"sft": {"gpus": 2}}}},
    ],
)
def test_an_upgrade_of_something_else_leaves_it_as_it_is(more: Values) -> None:
    assert launcher(**more) == launcher()


@pytest.mark.parametrize(
    "more",
    [
        {"recipe": RECIPE.replace("docs", "faq")},
        {"settings": {"image_tag": "next"}},
        {"settings": {"image_registry": "registry.example.com"}},
        {"settings": {"s3_endpoint": "https://elsewhere.example.com"}},
        {"launcher": {"tolerations": [{"operator": "Exists"}]}},
    ],
)
def test_what_changes_the_recipe_or_the_pod_makes_another(more: Values) -> None:
    """A Job's pod cannot be changed: with the same name, helm's patch would be refused."""
    assert name(**more) != name()


def test_it_submits_the_recipe_beside_the_settings() -> None:
    pod = launcher()["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"] == ["submit", "recipe.yaml", "--settings", "llamarefine.yaml", "--detach"]
    assert container["workingDir"] == "/etc/llamarefine"
    config = next(volume for volume in pod["volumes"] if volume["name"] == "config")
    maps = [source["configMap"]["name"] for source in config["projected"]["sources"]]
    assert maps == ["llamarefine-settings", name()]
    assert {"name": "config", "mountPath": "/etc/llamarefine", "readOnly": True} in container["volumeMounts"]


def test_only_what_may_pass_by_itself_is_tried_again() -> None:
    rule = launcher()["spec"]["podFailurePolicy"]["rules"][-1]
    assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
    passing = [kind.exit_code for kind in all_errors() if kind.disposition is not Disposition.FAIL]
    assert rule["onExitCodes"]["values"] == passing


def test_it_stays_when_it_is_done() -> None:
    """With a TTL the next upgrade would find it missing, and make it anew."""
    assert "ttlSecondsAfterFinished" not in launcher()["spec"]
