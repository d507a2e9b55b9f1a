"""The Job that submits the pipeline: a new recipe or new images create another one; other upgrades leave it."""

from typing import Any

import pytest

from llamarefine_jobs.contract.errors import Disposition, all_errors

from .rendering import BUCKET, Object, Values, is_hook, needs_helm, one, render
from .test_golden import RECIPE

pytestmark = needs_helm


def release(**more: Any) -> list[Object]:
    """Return the objects of a release with a bucket, a recipe and these values."""
    settings = {**BUCKET["settings"], **more.pop("settings", {})}
    return render({"recipe": RECIPE, **more, "settings": settings})


def launcher(**more: Any) -> Object:
    return one(release(**more), "Job", "llamarefine-submit")


def name(**more: Any) -> str:
    found: str = launcher(**more)["metadata"]["name"]
    return found


def test_without_a_recipe_there_is_no_launcher_job() -> None:
    assert [each["metadata"]["name"] for each in render(BUCKET) if each["kind"] == "Job" and not is_hook(each)] == []


@pytest.mark.parametrize(
    "more",
    [
        {"networkPolicy": {"enabled": False}},
        {"serviceAccounts": {"driverAnnotations": {"iam.example.com/role": "driver"}}},
        {"settings": {"ttl_s": 60, "resources": {"sft": {"gpus": 2}}}},
    ],
)
def test_an_upgrade_that_changes_neither_recipe_nor_pod_leaves_the_job_unchanged(more: Values) -> None:
    assert release(**more) != release(), "the upgrade changes another object"
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
def test_a_changed_recipe_or_pod_changes_the_jobs_name(more: Values) -> None:
    """The pod template of a Job is immutable: the API server would refuse helm's patch of a Job of the same name."""
    assert name(**more) != name()


def test_the_job_submits_the_recipe_with_the_releases_settings() -> None:
    pod = launcher()["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"] == ["submit", "recipe.yaml", "--settings", "llamarefine.yaml", "--detach"]
    assert container["workingDir"] == "/etc/llamarefine"
    config = next(volume for volume in pod["volumes"] if volume["name"] == "config")
    maps = [source["configMap"]["name"] for source in config["projected"]["sources"]]
    assert maps == ["llamarefine-settings", name()]
    assert {"name": "config", "mountPath": "/etc/llamarefine", "readOnly": True} in container["volumeMounts"]


def test_only_errors_that_may_pass_are_retried() -> None:
    rule = launcher()["spec"]["podFailurePolicy"]["rules"][-1]
    assert (rule["action"], rule["onExitCodes"]["operator"]) == ("FailJob", "NotIn")
    retried = [kind.exit_code for kind in all_errors() if kind.disposition is not Disposition.FAIL]
    assert rule["onExitCodes"]["values"] == retried


def test_the_finished_job_is_kept() -> None:
    """With a TTL, Kubernetes would delete it, and the next upgrade would create it again and submit again."""
    assert "ttlSecondsAfterFinished" not in launcher()["spec"]
