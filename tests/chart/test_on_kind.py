"""A release on a real cluster: installed, tested, upgraded, removed, in a namespace that takes restricted pods only.

The stages' images are not there, so a run waits in its first stage: long enough to see what an upgrade does to it.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from .kind_cluster import TAG, KindCluster, eventually
from .rendering import CHART, DEMO, Object

pytestmark = pytest.mark.skipif(
    not os.environ.get("LLAMAREFINE_E2E"), reason="takes minutes and an engine; `make e2e` runs it"
)

RELEASE, NAMESPACE = "llamarefine", "team"
GIVEN = (
    "--set=minio.enabled=true,settings.image_registry=localhost,settings.gpu_resource=null",
    f"--set=settings.image_tag={TAG},settings.image_pull_policy=Never,settings.stage_service_account=llamarefine-stage",
    "--set=settings.resources.prepare.requests.cpu=100m,settings.resources.prepare.requests.memory=64Mi",
)


@pytest.fixture(scope="module")
def cluster(kind_cluster: KindCluster) -> KindCluster:
    kind_cluster.make_namespace(NAMESPACE)
    return kind_cluster


@pytest.fixture
def release(cluster: KindCluster) -> Iterator[KindCluster]:
    """A fresh release with a recipe, its run at work."""
    helm(cluster, "install", f"--set-file=recipe={DEMO}", "--wait", "--wait-for-jobs", "--timeout=3m")
    eventually(lambda: runs(cluster))
    yield cluster
    helm_uninstall(cluster)
    eventually(lambda: left_over(cluster) == [])


def helm(cluster: KindCluster, verb: str, *more: str) -> str:
    return cluster.run("helm", verb, RELEASE, CHART, "-n", NAMESPACE, *GIVEN, *more)


def helm_uninstall(cluster: KindCluster) -> None:
    cluster.run("helm", "uninstall", RELEASE, "-n", NAMESPACE, "--ignore-not-found")


def jobs(cluster: KindCluster, component: str) -> dict[str, str]:
    """The Jobs of a component, name and uid."""
    found = cluster.objects(NAMESPACE, "jobs", f"app.kubernetes.io/component={component}")
    return {job["metadata"]["name"]: job["metadata"]["uid"] for job in found}


def runs(cluster: KindCluster) -> dict[str, str]:
    return jobs(cluster, "driver")


def left_over(cluster: KindCluster) -> list[str]:
    """All that is in the namespace, but for what every namespace has."""
    kinds = "jobs,pods,configmaps,secrets,serviceaccounts,roles,rolebindings,networkpolicies,services,deployments,pvc"
    there = [(each["kind"], each["metadata"]["name"]) for each in cluster.objects(NAMESPACE, kinds)]
    return [f"{kind} {name}" for kind, name in there if name not in ("kube-root-ca.crt", "default")]


def pod_of(cluster: KindCluster, component: str) -> Object:
    (pod,) = cluster.objects(NAMESPACE, "pods", f"app.kubernetes.io/component={component}")
    return pod


def test_an_installed_recipe_becomes_a_run_whose_first_stage_is_made(release: KindCluster) -> None:
    (run,) = runs(release)
    assert run.startswith("demo-")
    eventually(lambda: f"{run}-prepare" in jobs(release, "stage"))
    assert pod_of(release, "launcher")["status"]["phase"] == "Succeeded"


def test_no_pod_of_a_stage_holds_a_token(release: KindCluster) -> None:
    eventually(lambda: release.objects(NAMESPACE, "pods", "app.kubernetes.io/component=stage"))
    for component in ("stage", "minio"):
        spec = pod_of(release, component)["spec"]
        assert spec["serviceAccountName"] == "llamarefine-stage"
        assert "serviceAccountToken" not in str(spec["volumes"])


def test_an_upgrade_that_changes_neither_recipe_nor_images_starts_nothing(release: KindCluster) -> None:
    submitted, driven = jobs(release, "launcher"), runs(release)
    secret = release.objects(NAMESPACE, "secrets", "app.kubernetes.io/component=bucket")[0]["data"]
    helm(release, "upgrade", f"--set-file=recipe={DEMO}", "--set=settings.ttl_s=60", "--wait", "--timeout=3m")
    assert (jobs(release, "launcher"), runs(release)) == (submitted, driven)
    assert release.objects(NAMESPACE, "secrets", "app.kubernetes.io/component=bucket")[0]["data"] == secret


def test_an_upgrade_with_another_recipe_starts_another_run_and_leaves_the_first_at_work(
    release: KindCluster, tmp_path: Path
) -> None:
    submitted, first = jobs(release, "launcher"), runs(release)
    other = tmp_path / "recipe.yaml"
    other.write_text(DEMO.read_text(encoding="utf-8").replace("seed: 7", "seed: 8"), encoding="utf-8")
    helm(release, "upgrade", f"--set-file=recipe={other}", "--wait", "--wait-for-jobs", "--timeout=3m")
    assert not submitted.items() & jobs(release, "launcher").items()
    now = eventually(lambda: len(found := runs(release)) == 2 and found)
    assert first.items() <= now.items()


def test_the_releases_own_test_passes_and_leaves_nothing(release: KindCluster) -> None:
    said = release.run("helm", "test", RELEASE, "-n", NAMESPACE)
    assert "put, conditional put, get, list and delete work from here" in said
    assert re.search(r"ok +permissions: all \d+ are granted in namespace team", said)
    assert "FAIL" not in said
    assert jobs(release, "test") == {}


def test_the_releases_own_test_names_a_permission_that_is_missing(release: KindCluster) -> None:
    release.kubectl("-n", NAMESPACE, "delete", "rolebinding", "llamarefine-driver")
    said = release.run("helm", "test", RELEASE, "-n", NAMESPACE, check=False)
    assert "system:serviceaccount:team:llamarefine-driver may not create, get, list, watch, delete jobs" in said
    release.kubectl("-n", NAMESPACE, "delete", "job", "llamarefine-test")


def test_uninstalling_in_the_middle_of_a_run_leaves_nothing(release: KindCluster) -> None:
    eventually(lambda: jobs(release, "stage"))
    helm_uninstall(release)
    eventually(lambda: left_over(release) == [])
