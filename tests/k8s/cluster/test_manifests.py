"""The objects of a run, compared with golden/<stage>.yaml beside this file. WRITE_GOLDEN=1 writes those files."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from llamarefine_jobs.contract.errors import Disposition, OutOfMemoryError, RecipeError, all_errors
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.stages import STAGES
from llamarefine_jobs.recipe_file import parse_recipe
from llamarefine_k8s.cluster.executor import with_halved_micro_batch
from llamarefine_k8s.cluster.manifests import (
    driver_job,
    owner_reference,
    patched,
    pod_failure_policy,
    run_config_map,
    stage_job,
    stage_job_name,
    stage_service,
)
from llamarefine_k8s.commands.output import yaml_of
from llamarefine_k8s.runs.pipeline import Task
from llamarefine_k8s.settings import Settings, parse

GOLDEN = Path(__file__).parent / "golden"
RECIPE = """\
name: golden
cpu_threads: 1
prepare:
  base: {source: tiny-llama, fingerprint: recipe}
  questions: {source: s3://bucket/faq.csv, fingerprint: etag:5f}
  preferences: {source: python-docstrings, fingerprint: "image:llamarefine-prepare:1"}
"""
RUN = "golden-12345678"
_MADE_FROM = re.compile(r"(llamarefine/made-from: ).*")
STORE = "s3://bucket/prefix"


@pytest.fixture
def recipe() -> Recipe:
    return parse_recipe(RECIPE, "golden")


def settings(**values: Any) -> Settings:
    return parse({"store": STORE, "s3_endpoint": "https://minio.example.com", "image_tag": "1"}, "test", **values)


def job(recipe: Recipe, stage: str = "sft", **values: Any) -> dict[str, Any]:
    owner = owner_reference("Job", RUN, "0c1d")
    return stage_job(Task(RUN, stage, "5f" * 32, recipe, STORE), settings(**values), owner)


def two_nodes(**values: Any) -> list[dict[str, Any]]:
    """Return the Service and the Job of a training on two nodes with two GPUs each."""
    recipe = parse_recipe(RECIPE, "golden", ["sft.nodes=2", "sft.gpus=2", "sft.micro_batch_rows=4"])
    owner = owner_reference("Job", RUN, "0c1d")
    service = stage_service(Task(RUN, "sft", "5f" * 32, recipe, STORE), owner)
    assert service
    return [service, job(recipe, "sft", **values)]


def pod(job: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = job["spec"]["template"]["spec"]
    return spec


def container(job: dict[str, Any]) -> dict[str, Any]:
    first: dict[str, Any] = pod(job)["containers"][0]
    return first


def _versionless(text: str) -> str:
    from llamarefine_jobs.contract.version import __version__

    text = text.replace(f"app.kubernetes.io/version: {__version__}", "app.kubernetes.io/version: VERSION")
    return _MADE_FROM.sub(r"\1DIGEST", text)


@pytest.mark.parametrize("name", [*STAGES, "driver", "run", "two-nodes"])
def test_the_object_equals_the_golden_file(name: str, recipe: Recipe) -> None:
    made = {
        "driver": lambda: driver_job(RUN, settings()),
        "run": lambda: run_config_map(RUN, recipe, settings()),
        "two-nodes": lambda: two_nodes(),
    }.get(name, lambda: job(recipe, name))()
    text = _versionless(yaml_of(made if isinstance(made, list) else [made])) + "\n"
    file = GOLDEN / f"{name}.yaml"
    if "WRITE_GOLDEN" in os.environ:
        file.write_text(text)
    assert text == file.read_text(), f"if the change is intended: WRITE_GOLDEN=1 pytest {__file__}"


def test_every_golden_file_is_compared() -> None:
    assert {file.stem for file in GOLDEN.iterdir()} == {*STAGES, "driver", "run", "two-nodes"}


@pytest.mark.parametrize("name", [*STAGES, "driver"])
def test_every_pod_meets_the_restricted_pod_security_standard(name: str, recipe: Recipe) -> None:
    made = driver_job(RUN, settings()) if name == "driver" else job(recipe, name)
    assert pod(made)["securityContext"]["runAsNonRoot"] is True
    assert pod(made)["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    security = container(made)["securityContext"]
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert security["readOnlyRootFilesystem"] is True
    assert pod(made).get("automountServiceAccountToken", True) is (name == "driver")


@pytest.mark.parametrize("name", [*STAGES, "driver"])
def test_credentials_are_only_references_to_a_secret(name: str, recipe: Recipe) -> None:
    made = driver_job(RUN, settings()) if name == "driver" else job(recipe, name)
    secret = {
        item["name"]: item
        for item in container(made)["env"]
        if item["name"].startswith("AWS_") and "KEY" in item["name"]
    }
    assert set(secret) == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}
    assert all("value" not in item for item in secret.values())


def test_every_exit_code_has_the_action_of_its_disposition() -> None:
    rules = pod_failure_policy("stage")["rules"]
    action = {code: rule["action"] for rule in rules if "onExitCodes" in rule for code in rule["onExitCodes"]["values"]}
    expected = {Disposition.FAIL: "FailJob", Disposition.RETRY: "Count", Disposition.RESUME: "Ignore"}
    for kind in all_errors():
        assert action[kind.exit_code] == expected[kind.disposition], kind
    assert rules[0] == {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget"}]}, (
        "it must come first: the first matching rule decides"
    )


def test_the_longest_job_name_is_valid(recipe: Recipe) -> None:
    longest = max(STAGES, key=len)
    assert len(stage_job_name(f"{'n' * 40}-12345678", longest)) <= 63


def test_the_pods_of_two_nodes_find_the_first_node_by_the_services_name() -> None:
    service, made = two_nodes()
    assert pod(made)["subdomain"] == service["metadata"]["name"]
    address = next(each["value"] for each in container(made)["env"] if each["name"] == "MASTER_ADDR")
    assert address == f"{made['metadata']['name']}-0.{service['metadata']['name']}"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": made["metadata"]["name"]}
    assert made["spec"]["backoffLimit"] == 2 * settings().retries


def test_the_longest_service_name_is_valid() -> None:
    recipe = parse_recipe(RECIPE.replace("golden", "'" + "9" * 40 + "'"), "golden", ["dpo.nodes=2"])
    service = stage_service(Task(f"{'9' * 40}-12345678", "dpo", "5f" * 32, recipe, STORE))
    assert service
    name = service["metadata"]["name"]
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name)
    assert len(name) <= 63


def test_pods_request_the_number_of_gpus_in_the_recipe() -> None:
    limits = container(two_nodes()[1])["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "2"
    on_cpus = container(two_nodes(resources={"sft": {"gpus": 0}})[1])["resources"]
    assert "limits" not in on_cpus
    with pytest.raises(RecipeError, match=r"sft\.gpus is 2 in the recipe, resources\.sft\.gpus is 4 in the settings"):
        two_nodes(resources={"sft": {"gpus": 4}})


def test_only_stages_that_need_gpus_request_them(recipe: Recipe) -> None:
    assert container(job(recipe, "sft"))["resources"]["limits"] == {"nvidia.com/gpu": "1"}
    assert "limits" not in container(job(recipe, "prepare"))["resources"]
    four = job(recipe, "sft", gpu_resource="amd.com/gpu", resources={"sft": {"gpus": 4}})
    assert container(four)["resources"]["limits"] == {"amd.com/gpu": "4"}
    for without in ({"gpu_resource": ""}, {"resources": {"sft": {"gpus": 0}}}):
        none = job(recipe, "sft", **without)
        assert "limits" not in container(none)["resources"]
        assert all(volume["name"] != "shared-memory" for volume in pod(none)["volumes"])


def test_a_limit_in_the_settings_replaces_the_default_request(recipe: Recipe) -> None:
    resources = container(job(recipe, "sft", resources={"sft": {"limits": {"memory": "1Gi"}}}))["resources"]
    assert resources["requests"] == {"cpu": "4"}
    assert resources["limits"]["memory"] == "1Gi"


def test_resources_name_other_nodes_for_one_stage_and_for_the_driver(recipe: Recipe) -> None:
    on_gpus = {"node_selector": {"gpu": "a100"}, "tolerations": [{"key": "gpu", "operator": "Exists"}]}
    anywhere = {"node_selector": {}, "tolerations": []}
    small = {"node_selector": {"size": "small"}, "tolerations": [{"key": "small", "operator": "Exists"}]}

    def placement(made: dict[str, Any]) -> tuple[Any, Any]:
        return pod(made).get("nodeSelector"), pod(made).get("tolerations")

    resources = {"prepare": anywhere, "merge": {"node_selector": {}}, "driver": small}
    assert placement(job(recipe, "sft", **on_gpus)) == tuple(on_gpus.values())
    assert placement(driver_job(RUN, settings(**on_gpus))) == (None, None)
    assert placement(driver_job(RUN, settings(**on_gpus, resources=resources))) == tuple(small.values())
    assert placement(job(recipe, "prepare", **on_gpus, resources=resources)) == (None, None)
    assert placement(job(recipe, "sft", **on_gpus, resources=resources)) == tuple(on_gpus.values())
    assert placement(job(recipe, "merge", **on_gpus, resources=resources)) == (None, on_gpus["tolerations"])


def test_placement_settings_are_in_the_pod(recipe: Recipe) -> None:
    toleration = {"key": "nvidia.com/gpu", "operator": "Exists"}
    made = job(
        recipe,
        node_selector={"gpu": "a100"},
        tolerations=[toleration],
        priority_class="batch",
        image_pull_secrets=["mine"],
        image_registry="registry.example.com/team/",
        stage_service_account="stages",
    )
    spec = pod(made)
    assert spec["nodeSelector"] == {"gpu": "a100"}
    assert spec["tolerations"] == [toleration]
    assert spec["priorityClassName"] == "batch"
    assert spec["imagePullSecrets"] == [{"name": "mine"}]
    assert spec["serviceAccountName"] == "stages"
    assert container(made)["image"] == "registry.example.com/team/llamarefine-sft:1"


def test_a_job_for_a_queue_is_created_suspended(recipe: Recipe) -> None:
    made = job(recipe, queue="gpus")
    assert made["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert made["spec"]["suspend"] is True
    assert "suspend" not in job(recipe)["spec"]


def test_a_patch_applies_to_all_stages_or_to_one(recipe: Recipe) -> None:
    certificate = {"name": "SSL_CERT_FILE", "value": "/etc/ca/ca.pem"}
    all_stages = {"spec": {"template": {"spec": {"containers": [{"name": "stage", "env": [certificate]}]}}}}
    patches = {"all": all_stages, "dpo": {"spec": {"backoffLimit": 0, "ttlSecondsAfterFinished": None}}}
    for stage in STAGES:
        made = job(recipe, stage, patches=patches)
        assert container(made)["env"][-1] == certificate
        assert container(made)["env"][:-1] == container(job(recipe, stage))["env"]
        assert (made["spec"]["backoffLimit"] == 0) is (stage == "dpo")
        assert ("ttlSecondsAfterFinished" in made["spec"]) is (stage != "dpo")
    assert driver_job(RUN, settings(patches=patches)) == driver_job(RUN, settings())


@pytest.mark.parametrize(
    ("before", "patch", "after"),
    [
        ({"a": 1, "b": {"c": 2}}, {"b": {"d": 3}}, {"a": 1, "b": {"c": 2, "d": 3}}),
        ({"a": 1, "b": 2}, {"a": None}, {"b": 2}),
        ({"l": [{"name": "x", "v": 1}, {"name": "y"}]}, {"l": [{"name": "x", "v": 2}, {"name": "z"}]},
         {"l": [{"name": "x", "v": 2}, {"name": "y"}, {"name": "z"}]}),
        ({"m": [{"name": "s", "mountPath": "/a"}]}, {"m": [{"name": "s", "mountPath": "/b"}]},
         {"m": [{"name": "s", "mountPath": "/a"}, {"name": "s", "mountPath": "/b"}]}),
        ({"args": ["a", "b"]}, {"args": ["c"]}, {"args": ["c"]}),
        ({}, {"new": {"x": None, "y": 1}}, {"new": {"y": 1}}),
        ({"l": [{"name": "x"}]}, {"l": []}, {"l": []}),
    ],
)  # fmt: skip
def test_a_patch_merges_as_documented(before: dict[str, Any], patch: dict[str, Any], after: dict[str, Any]) -> None:
    copy = yaml.safe_load(yaml.safe_dump(before))
    assert patched(before, patch) == after
    assert before == copy


def test_jobs_that_differ_have_different_digests(recipe: Recipe) -> None:
    digests = {
        job(recipe, **values)["metadata"]["annotations"]["llamarefine/made-from"]
        for values in ({}, {"image_tag": "2"}, {"resources": {"sft": {"gpus": 2}}})
    }
    assert len(digests) == 3


def test_the_run_config_map_holds_recipe_and_settings_unchanged(recipe: Recipe) -> None:
    given = settings(resources={"sft": {"gpus": 2}}, tolerations=[{"operator": "Exists"}], context="mine")
    text = run_config_map(RUN, recipe, given)["data"]["llamarefine.yaml"]
    assert parse(yaml.safe_load(text), "the map") == given.model_copy(update={"context": None})
    assert parse_recipe(run_config_map(RUN, recipe, given)["data"]["recipe.yaml"], "the map") == recipe


@pytest.mark.parametrize(("settings", "rows"), [("{}", (16, 8, 4, 2)), ("{micro_batch_rows: 4, gpus: 2}", (4, 2))])
def test_a_killed_training_restarts_with_half_the_rows_in_a_pass_until_one_is_left(
    settings: str, rows: tuple[int, ...]
) -> None:
    halves = parse_recipe(RECIPE, "golden", [f"sft={settings}", "sft.on_out_of_memory=halve_micro_batch"])
    task, killed, lines = Task(RUN, "sft", "5f" * 32, halves, STORE), OutOfMemoryError("sft was killed"), []
    for _ in rows:
        task = with_halved_micro_batch(task, killed, lines.append)
    assert task.oom_micro_batch_rows == rows
    assert lines[0] == (
        f"sft: sft was killed; restarts with micro-batches of {rows[1]} rows instead of up to {rows[0]}, from the "
        "newest checkpoint; the 16 rows of a step stay"
    )
    with pytest.raises(OutOfMemoryError):
        with_halved_micro_batch(task, killed, lines.append)


def test_a_pod_gets_the_micro_batches_that_were_too_large(recipe: Recipe) -> None:
    def tried_rows(task: Task) -> list[str]:
        (container,) = stage_job(task, settings())["spec"]["template"]["spec"]["containers"]
        return [each["value"] for each in container["env"] if each["name"] == "LLAMAREFINE_RAN_OUT_AT_ROWS"]

    assert tried_rows(Task(RUN, "sft", "5f" * 32, recipe, STORE)) == []
    assert tried_rows(Task(RUN, "sft", "5f" * 32, recipe, STORE, oom_micro_batch_rows=(8, 4))) == ["[8, 4]"]


@pytest.mark.parametrize("name", [*STAGES, "driver"])
def test_without_a_secret_no_keys_are_mounted(name: str, recipe: Recipe) -> None:
    """With workload identity, keys in a folder would take precedence over the role."""
    given = parse({"store": STORE, "secret_name": None}, "test")
    made = driver_job(RUN, given) if name == "driver" else stage_job(Task(RUN, name, "5f" * 32, recipe, STORE), given)
    assert "bucket-keys" not in str(made)
    assert "LLAMAREFINE_BUCKET_KEYS" not in str(made)
