"""A release on a real cluster: installed, tested, upgraded and removed; its namespace admits only restricted pods.

The cluster lacks the stages' images, so each run waits in its first stage, and the tests can upgrade a running release.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from .kind_cluster import TAG, KindCluster, eventually
from .rendering import CHART, DEMO, Object

pytestmark = pytest.mark.skipif(
    not os.environ.get("LLAMAREFINE_E2E"), reason="takes minutes and a container engine; `make e2e` runs it"
)

RELEASE, NAMESPACE = "llamarefine", "team"
VALUES = (
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
    """A fresh release with a recipe whose run has started; it is uninstalled after the test."""
    helm(cluster, "install", f"--set-file=recipe={DEMO}", "--wait", "--wait-for-jobs", "--timeout=3m")
    eventually(lambda: runs(cluster))
    yield cluster
    helm_uninstall(cluster)
    eventually(lambda: left_over(cluster) == [])


def helm(cluster: KindCluster, verb: str, *more: str) -> str:
    return cluster.run("helm", verb, RELEASE, CHART, "-n", NAMESPACE, *VALUES, *more)


def helm_uninstall(cluster: KindCluster) -> None:
    cluster.run("helm", "uninstall", RELEASE, "-n", NAMESPACE, "--ignore-not-found")


def jobs(cluster: KindCluster, component: str) -> dict[str, str]:
    """Return the Jobs of a component: name to uid."""
    found = cluster.objects(NAMESPACE, "jobs", f"app.kubernetes.io/component={component}")
    return {job["metadata"]["name"]: job["metadata"]["uid"] for job in found}


def runs(cluster: KindCluster) -> dict[str, str]:
    """Return the runs, which are the drivers' Jobs: name to uid."""
    return jobs(cluster, "driver")


def left_over(cluster: KindCluster) -> list[str]:
    """Return the objects in the namespace, without those that every namespace has."""
    kinds = "jobs,pods,configmaps,secrets,serviceaccounts,roles,rolebindings,networkpolicies,services,deployments,pvc"
    found = [(each["kind"], each["metadata"]["name"]) for each in cluster.objects(NAMESPACE, kinds)]
    return [f"{kind} {name}" for kind, name in found if name not in ("kube-root-ca.crt", "default")]


def pod_of(cluster: KindCluster, component: str) -> Object:
    (pod,) = cluster.objects(NAMESPACE, "pods", f"app.kubernetes.io/component={component}")
    return pod


def test_an_installed_recipe_starts_a_run_that_creates_its_first_stage(release: KindCluster) -> None:
    (run,) = runs(release)
    assert run.startswith("demo-")
    eventually(lambda: f"{run}-prepare" in jobs(release, "stage"))
    assert pod_of(release, "launcher")["status"]["phase"] == "Succeeded"


def test_pods_of_stages_and_minio_have_no_token(release: KindCluster) -> None:
    eventually(lambda: release.objects(NAMESPACE, "pods", "app.kubernetes.io/component=stage"))
    for component in ("stage", "minio"):
        spec = pod_of(release, component)["spec"]
        assert spec["serviceAccountName"] == "llamarefine-stage"
        assert "serviceAccountToken" not in str(spec["volumes"])


def test_an_upgrade_that_changes_neither_recipe_nor_images_starts_nothing(release: KindCluster) -> None:
    launchers, drivers = jobs(release, "launcher"), runs(release)
    secret = release.objects(NAMESPACE, "secrets", "app.kubernetes.io/component=bucket")[0]["data"]
    helm(release, "upgrade", f"--set-file=recipe={DEMO}", "--set=settings.ttl_s=60", "--wait", "--timeout=3m")
    assert (jobs(release, "launcher"), runs(release)) == (launchers, drivers)
    assert release.objects(NAMESPACE, "secrets", "app.kubernetes.io/component=bucket")[0]["data"] == secret


def test_an_upgrade_with_another_recipe_starts_another_run_and_keeps_the_first_running(
    release: KindCluster, tmp_path: Path
) -> None:
    launchers, first = jobs(release, "launcher"), runs(release)
    other = tmp_path / "recipe.yaml"
    other.write_text(DEMO.read_text(encoding="utf-8").replace("seed: 7", "seed: 8"), encoding="utf-8")
    helm(release, "upgrade", f"--set-file=recipe={other}", "--wait", "--wait-for-jobs", "--timeout=3m")
    assert not launchers.items() & jobs(release, "launcher").items()
    now = eventually(lambda: len(found := runs(release)) == 2 and found)
    assert first.items() <= now.items()


def test_helm_test_passes_and_leaves_no_job(release: KindCluster) -> None:
    output = release.run("helm", "test", RELEASE, "-n", NAMESPACE)
    assert "put, conditional put, get, list and delete work from here" in output
    assert re.search(r"ok +permissions: all \d+ are granted in namespace team", output)
    assert "FAIL" not in output
    assert jobs(release, "test") == {}


def test_helm_test_names_a_missing_permission(release: KindCluster) -> None:
    release.kubectl("-n", NAMESPACE, "delete", "rolebinding", "llamarefine-driver")
    output = release.run("helm", "test", RELEASE, "-n", NAMESPACE, check=False)
    assert "system:serviceaccount:team:llamarefine-driver may not create, get, list, watch, delete jobs" in output
    release.kubectl("-n", NAMESPACE, "delete", "job", "llamarefine-test")


def test_uninstalling_during_a_run_leaves_no_object(release: KindCluster) -> None:
    eventually(lambda: jobs(release, "stage"))
    helm_uninstall(release)
    eventually(lambda: left_over(release) == [])
