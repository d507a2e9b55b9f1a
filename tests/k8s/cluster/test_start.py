"""Starting a run: which of several submits creates the driver Job, what they remove, and what they report."""

import random
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from llamarefine_jobs.contract.errors import AccessError, LlamaRefineError, RecipeError
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.recipe_file import load_recipe
from llamarefine_k8s.cli import cli
from llamarefine_k8s.cluster import run_status
from llamarefine_k8s.cluster.api import Cluster
from llamarefine_k8s.cluster.api_requests import ApiRequests
from llamarefine_k8s.cluster.manifests import driver_job, owner_reference, run_config_map, stage_job
from llamarefine_k8s.cluster.run_objects import StageObjects, put_run_config_map
from llamarefine_k8s.cluster.submission import pin_for_cluster, require_driver_of, start
from llamarefine_k8s.runs.pipeline import Task
from llamarefine_k8s.runs.records import run_id
from llamarefine_k8s.settings import Settings, load, parse
from tests.k8s.api_server import ApiServer, Fault, use_kubeconfig

SUBMITS = 4


@pytest.fixture(autouse=True)
def kubeconfig(server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_kubeconfig(server.kubeconfig(tmp_path), monkeypatch)


def settings(number: int = 0) -> Settings:
    return Settings(store="s3://bucket/x", gpu_resource=None, grace_s=100 + number)


def submit(recipe: Recipe, number: int = 0) -> tuple[dict[str, Any], list[str]]:
    """Return the driver Job and what was reported."""
    reported: list[str] = []
    return start(Cluster(), recipe, settings(number), reported.append), reported


def leave_finished_run(server: ApiServer, recipe: Recipe) -> set[str]:
    """Create what a finished run leaves: driver Job, ConfigMap, a stage's Job and pod. Returns their uids."""
    run = run_id(recipe)
    ended = {"status": {"conditions": [{"type": "Failed", "status": "True"}]}}
    driver = server.put("jobs", driver_job(run, settings()) | ended)
    owner = owner_reference("Job", run, driver["metadata"]["uid"])
    task = Task(run, "prepare", "0" * 64, recipe, "s3://bucket/x")
    stage = server.put("jobs", stage_job(task, settings(), owner) | ended)
    config_map = server.put("configmaps", run_config_map(run, recipe, settings(), owner))
    labels = stage["spec"]["template"]["metadata"]["labels"]
    pod = server.put("pods", {"metadata": {"name": "left", "labels": labels}, "status": {"phase": "Failed"}})
    return {each["metadata"]["uid"] for each in (driver, stage, config_map, pod)}


def objects_of(server: ApiServer, run: str) -> list[tuple[str, str]]:
    return sorted((kind, name) for kind, name in server.objects if name.startswith(run))


def created(server: ApiServer, kind: str) -> list[str]:
    """Return the uids of all Jobs or ConfigMaps that were ever created."""
    return [each["metadata"]["uid"] for _, change, each in server.history if change == "ADDED" and each["kind"] == kind]


@pytest.mark.parametrize("seed", range(8))
def test_of_submits_in_the_same_instant_one_creates_the_job_and_the_others_attach(
    server: ApiServer, recipe: Callable[..., Recipe], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance, send, pinned = random.Random(seed), ApiRequests.send, recipe()
    left = leave_finished_run(server, pinned) if seed % 2 else set()

    def send_late(*arguments: Any, **more: Any) -> Any:
        time.sleep(chance.choice([0, 0.01, 0.05]))
        return send(*arguments, **more)

    monkeypatch.setattr(ApiRequests, "send", send_late)
    monkeypatch.setattr(run_status, "_POLL_S", 0.01)
    with ThreadPoolExecutor(SUBMITS) as pool:
        results = list(pool.map(lambda number: submit(pinned, number), range(SUBMITS)))
    run = run_id(pinned)
    assert objects_of(server, run) == [("configmaps", run), ("jobs", run)]
    assert len(set(created(server, "Job")) - left) == len(set(created(server, "ConfigMap")) - left) == 1
    job, config_map = server.objects["jobs", run], server.objects["configmaps", run]
    assert {each["metadata"]["uid"] for each, _ in results} == {job["metadata"]["uid"]}
    assert [owner["uid"] for owner in config_map["metadata"]["ownerReferences"]] == [job["metadata"]["uid"]]
    winner = [number for number, (_, reported) in enumerate(results) if not reported]
    assert len(winner) == 1
    assert config_map["data"] == run_config_map(run, pinned, settings(winner[0]))["data"]
    for _, reported in (results[number] for number in range(SUBMITS) if number not in winner):
        assert reported[0] == "runs already; this attaches to it"
        assert reported[1].startswith("it keeps the settings it was submitted with")


def test_what_an_earlier_run_left_is_removed(server: ApiServer, recipe: Callable[..., Recipe]) -> None:
    left = leave_finished_run(server, recipe())
    job, reported = submit(recipe())
    assert (reported, job["metadata"]["uid"] in left) == ([], False)
    assert not left & {each["metadata"]["uid"] for each in server.objects.values()}


def test_a_job_whose_submit_died_at_once_gets_its_config_map_from_the_next_submit(
    server: ApiServer, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamarefine_k8s.cluster.submission._CONFIG_MAP_S", 0.0)
    run = run_id(recipe())
    driver = server.put("jobs", driver_job(run, settings()))
    job, reported = submit(recipe())
    assert (job["metadata"]["uid"], reported) == (driver["metadata"]["uid"], ["runs already; this attaches to it"])
    assert server.objects["configmaps", run]["metadata"]["ownerReferences"][0]["uid"] == driver["metadata"]["uid"]


def test_a_job_whose_config_map_is_refused_is_not_left(server: ApiServer, recipe: Callable[..., Recipe]) -> None:
    server.faults.append(Fault("POST .*configmaps", status=403))
    with pytest.raises(LlamaRefineError, match="the cluster forbids it"):
        submit(recipe())
    assert objects_of(server, run_id(recipe())) == []


def test_a_job_of_the_same_name_that_is_not_ours_is_named(server: ApiServer, recipe: Callable[..., Recipe]) -> None:
    run = run_id(recipe())
    server.put("jobs", {"metadata": {"name": run, "labels": {}}, "spec": {}})
    with pytest.raises(LlamaRefineError, match="exists but was not created by llamarefine"):
        submit(recipe())
    assert objects_of(server, run) == [("jobs", run)]


def test_a_stage_job_that_another_driver_created_in_place_of_an_outdated_one_is_followed(
    server: ApiServer, recipe: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Task(run_id(recipe()), "prepare", "0" * 64, recipe(), "s3://bucket/x")
    server.put("jobs", stage_job(task, settings(1)))
    delete = Cluster.delete

    def delete_late(cluster: Cluster, kind: str, name: str, *arguments: Any, **more: Any) -> None:
        server.remove("jobs", name)
        server.put("jobs", stage_job(task, settings()))
        delete(cluster, kind, name, *arguments, **more)

    monkeypatch.setattr(Cluster, "delete", delete_late)
    followed = StageObjects(Cluster(), settings()).ensure_job(task)
    assert followed["metadata"]["uid"] == created(server, "Job")[-1]
    assert "DELETED" not in [
        change for _, change, each in server.history if each["metadata"]["uid"] == followed["metadata"]["uid"]
    ]


def test_a_config_map_that_did_not_change_gets_a_new_owner_only(
    server: ApiServer, recipe: Callable[..., Recipe]
) -> None:
    first, second = (
        run_config_map(run_id(recipe()), recipe(), settings(), owner_reference("Job", "x", uid)) for uid in "12"
    )
    made = put_run_config_map(Cluster(), first)
    kept = put_run_config_map(Cluster(), second)
    assert kept["metadata"]["uid"] == made["metadata"]["uid"]
    assert kept["metadata"]["ownerReferences"][0]["uid"] == "2"


@pytest.mark.parametrize(
    "change", [{"data": {"recipe.yaml": "edited", "llamarefine.yaml": ""}}, {"immutable": None}], ids=str
)
def test_a_config_map_that_somebody_replaced_is_replaced_again(
    server: ApiServer, recipe: Callable[..., Recipe], change: dict[str, Any]
) -> None:
    manifest = run_config_map(run_id(recipe()), recipe(), settings())
    edited = server.put("configmaps", manifest | change)
    put = put_run_config_map(Cluster(), manifest)
    assert put["metadata"]["uid"] != edited["metadata"]["uid"]
    assert (put["data"], put["immutable"]) == (manifest["data"], True)


def test_a_config_map_of_the_same_name_that_is_not_ours_stays(server: ApiServer, recipe: Callable[..., Recipe]) -> None:
    server.put("configmaps", {"metadata": {"name": run_id(recipe())}, "data": {}})
    with pytest.raises(AccessError, match="exists but was not created by llamarefine"):
        put_run_config_map(Cluster(), run_config_map(run_id(recipe()), recipe(), settings()))


def test_a_driver_refuses_the_recipe_of_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    require_driver_of("any")
    monkeypatch.setenv("LLAMAREFINE_DRIVER_RUN", "small-1")
    require_driver_of("small-1")
    with pytest.raises(RecipeError, match="was created for the run small-1, but its recipe is that of small-2"):
        require_driver_of("small-2")


def test_a_namespace_that_is_being_deleted_is_an_error_although_the_run_is_still_there(
    server: ApiServer, recipe: Callable[..., Recipe]
) -> None:
    """Kubernetes then refuses every new object, before it looks whether there is one of the same name."""
    submit(recipe())
    server.faults.append(Fault("POST ", status=403))
    with pytest.raises(AccessError, match="the cluster forbids it"):
        submit(recipe())


def test_a_driver_writes_the_config_map_that_it_read(
    server: ApiServer, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    """Otherwise each driver would replace the ConfigMap of its run."""
    nodes = {"node_selector": {}, "tolerations": [{"key": "x", "operator": "Exists"}]}
    given = parse({"store": "s3://bucket/x", "resources": {"prepare": nodes, "sft": {"requests": {"cpu": 2}}}}, "x")
    pinned = pin_for_cluster(recipe(), given, lambda text: None, upload=False)
    data = run_config_map(run_id(pinned), pinned, given)["data"]
    for name, text in data.items():
        (tmp_path / name).write_text(text)
    read_settings = load(tmp_path / "llamarefine.yaml")
    read = pin_for_cluster(load_recipe(tmp_path / "recipe.yaml"), read_settings, lambda text: None, upload=False)
    assert run_config_map(run_id(read), read, read_settings)["data"] == data


def test_submit_suggests_commands_with_the_typed_flags_and_the_store(
    server: ApiServer, recipe_file: Path, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMAREFINE_COMMAND", "llamarefine")
    server.put("serviceaccounts", {"metadata": {"name": "llamarefine-driver"}})
    command = ["submit", str(recipe_file), "--store", s3_uri, "--detach", "--no-memory-check"]
    typed = CliRunner().invoke(cli, [*command, "-n", "default", "--context", "fake"], catch_exceptions=False)
    flags = "--context fake --namespace default"
    assert re.search(rf"logs -f small-\w+ --store {s3_uri} {flags}$", typed.output, re.MULTILINE), typed.output
    Path("llamarefine.yaml").write_text(f"store: {s3_uri}\ngrace_s: 7\n")
    from_environment = CliRunner().invoke(cli, command, env={"LLAMAREFINE_NAMESPACE": "default"})
    assert re.search(r"logs -f small-\w+$", from_environment.output, re.MULTILINE), from_environment.output
    assert re.search(r"to change them, `llamarefine cancel small-\w+` first$", from_environment.output, re.MULTILINE)
