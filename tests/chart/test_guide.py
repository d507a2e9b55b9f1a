"""docs/cluster.md: its values files and helm commands render, and its table of permissions equals the chart's Role."""

import re
import shlex

import pytest
import yaml

from llamarefine_jobs.contract.artifact import artifact_key
from llamarefine_jobs.recipe_file import load_recipe
from llamarefine_k8s.cluster.manifests import driver_job, stage_job
from llamarefine_k8s.runs.pipeline import Task
from llamarefine_k8s.settings import parse

from .rendering import BUCKET, DEMO, ROOT, Object, Values, helm, needs_helm, one, render, settings_text

GUIDE = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w*)\n(.*?)^```", GUIDE, re.DOTALL | re.MULTILINE)
VALUES: list[Values] = [yaml.safe_load(text) for language, text in BLOCKS if language == "yaml"]
COMMANDS = [
    shlex.split(line.partition(" | ")[0], comments=True)
    for _, text in BLOCKS
    for line in text.replace("\\\n", " ").splitlines()
    if re.match(r"helm (install|template) ", line)
]


def test_the_guide_has_values_and_commands() -> None:
    assert len(VALUES) > 5
    assert len(COMMANDS) > 2


def with_store(values: Values) -> Values:
    """Add a store to values of the guide, most of which leave it out."""
    return {**values, "settings": {**BUCKET["settings"], **values.get("settings", {})}}


@needs_helm
@pytest.mark.parametrize("number", range(len(VALUES)))
def test_each_values_file_renders_settings_that_the_launcher_accepts(number: int) -> None:
    parse(yaml.safe_load(settings_text(render(with_store(VALUES[number])))), f"block {number}")


@needs_helm
@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_each_helm_command_renders(number: int) -> None:
    options = [str(ROOT / each) if each.startswith("charts/") else each for each in COMMANDS[number][2:]]
    options = [each.replace("=jobs/", f"={ROOT}/jobs/") for each in options]
    assert "kind:" in helm("template", *options, "--kube-version", "1.34").stdout


@needs_helm
def test_proxy_and_certificate_authority_reach_every_pod() -> None:
    (values,) = [each for each in VALUES if "HTTPS_PROXY" in str(each)]
    objects = render({**values, "recipe": yaml.safe_load(DEMO.read_text(encoding="utf-8"))})
    settings = parse(yaml.safe_load(settings_text(objects)), "the guide")
    recipe = load_recipe(DEMO)
    task = Task("demo-00000000", "prepare", artifact_key("prepare", recipe, {}), recipe, settings.store)
    launcher = one(objects, "Job", "llamarefine-submit")
    for job in (launcher, driver_job("demo-00000000", settings), stage_job(task, settings)):
        assert {"HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE", "AWS_CA_BUNDLE"} <= environment_names(job)
        pod = job["spec"]["template"]["spec"]
        assert {"name": "trusted", "configMap": {"name": "trusted"}} in pod["volumes"]
        assert "/trusted" in {mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}


def environment_names(job: Object) -> set[str]:
    (container,) = job["spec"]["template"]["spec"]["containers"]
    return {variable["name"] for variable in container["env"]}


@needs_helm
def test_the_table_of_permissions_equals_the_role() -> None:
    table = re.search(r"<!-- role -->\n(.*?)<!-- /role -->", GUIDE, re.DOTALL)
    assert table
    rows = re.findall(r"\| `(.*?)` \| (.*?) \|", table[1])
    rules = one(render(BUCKET), "Role")["rules"]
    assert rows == [
        (".".join(filter(None, (rule["resources"][0], rule["apiGroups"][0]))), ", ".join(rule["verbs"]))
        for rule in rules
    ]


def test_every_relative_link_leads_to_a_file() -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", GUIDE)
    assert links
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
