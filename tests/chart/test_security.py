"""Every pod is restricted, credentials lie in one Secret, and the network is closed but for what is used."""

from typing import Any

import pytest

from llamarefine_k8s.cluster import manifests

from .rendering import BUCKET, MINIO, Object, Values, needs_helm, one, pods, render
from .test_golden import CASES, EVERYTHING

pytestmark = needs_helm


def all_pods() -> list[tuple[str, Object]]:
    found = [(f"{case}: {name}", pod) for case, values in CASES.items() for name, pod in pods(render(values)).items()]
    assert len(found) > 5
    return found


def test_every_pod_passes_the_restricted_standard() -> None:
    for name, pod in all_pods():
        security = pod["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod["spec"]), name
        assert all("hostPath" not in volume for volume in pod["spec"]["volumes"]), name
        for container in (*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "readOnlyRootFilesystem": True,
            }, name


def test_only_who_talks_to_the_api_server_has_a_token() -> None:
    for name, pod in all_pods():
        is_minio = pod["metadata"]["labels"]["app.kubernetes.io/component"] == "minio"
        assert (pod["spec"].get("automountServiceAccountToken") is False) == is_minio, name
    assert one(render(BUCKET), "ServiceAccount", "llamarefine-stage")["automountServiceAccountToken"] is False


def test_credentials_are_in_the_secret_and_nowhere_else() -> None:
    for values in (MINIO | {"recipe": EVERYTHING["recipe"]}, EVERYTHING):
        outside = [each for each in render(values) if each["kind"] != "Secret"]
        assert "secret-key" not in str(outside).replace("secretKeyRef", "")


def test_a_secret_that_exists_is_only_referred_to() -> None:
    objects = render({**BUCKET, "recipe": EVERYTHING["recipe"]})
    assert [each for each in objects if each["kind"] == "Secret"] == []
    (container,) = one(objects, "Job", "llamarefine-submit")["spec"]["template"]["spec"]["containers"]
    referred = [variable["valueFrom"]["secretKeyRef"] for variable in container["env"] if "valueFrom" in variable]
    assert [reference["name"] for reference in referred] == ["llamarefine-bucket"] * 2


def test_workload_identity_needs_no_secret() -> None:
    objects = render({"recipe": EVERYTHING["recipe"], "settings": {**BUCKET["settings"], "secret_name": None}})
    assert "Secret" not in {each["kind"] for each in objects}
    assert "secretKeyRef" not in str(objects)


def test_the_driver_is_granted_what_it_is_said_to_use() -> None:
    objects = render(EVERYTHING)
    binding = one(objects, "RoleBinding")
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "runner", "namespace": "team"}]
    assert binding["roleRef"]["name"] == one(objects, "Role")["metadata"]["name"]
    for rule in one(objects, "Role")["rules"]:
        assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"]


# The network


def reached(objects: list[Object], labels: dict[str, str]) -> list[tuple[Any, Any]]:
    """Whom a pod with `labels` may call: peers and ports, of every policy that selects it."""
    found = []
    for policy in (each for each in objects if each["kind"] == "NetworkPolicy"):
        if selects(policy["spec"]["podSelector"], labels):
            found += [(rule.get("to"), ports(rule)) for rule in policy["spec"].get("egress", [])]
    return found


def selects(selector: Object, labels: dict[str, str]) -> bool:
    exact = selector.get("matchLabels", {}).items() <= labels.items()
    return exact and all(labels.get(rule["key"]) in rule["values"] for rule in selector.get("matchExpressions", []))


def ports(rule: Object) -> list[int]:
    return [port["port"] for port in rule.get("ports", [])]


def labels_of(component: str) -> dict[str, str]:
    """The labels that the launcher gives to a stage's pod, or to the driver's."""
    return manifests._labels("a-run", component)


DNS = [53, 53]


@pytest.mark.parametrize("stage", ["merge", "evaluate", "infer"])
def test_a_stage_reaches_names_and_the_bucket(stage: str) -> None:
    objects = render(MINIO)
    minio = [{"podSelector": {"matchLabels": one(objects, "Service")["spec"]["selector"]}}]
    (dns, bucket) = reached(objects, labels_of(stage))
    assert dns[1] == DNS
    assert bucket == (minio, [9000])


def test_prepare_reaches_https_too() -> None:
    assert reached(render(MINIO), labels_of("prepare"))[2:] == [(None, [443])]


def test_the_processes_of_a_training_reach_each_other() -> None:
    objects = render(MINIO)
    (more,) = reached(objects, labels_of("sft"))[2:]
    (peer,) = more[0]
    assert selects(peer["podSelector"], labels_of("sft"))
    assert not selects(peer["podSelector"], labels_of("prepare"))
    assert one(objects, "NetworkPolicy", "llamarefine-training")["spec"]["ingress"] == [{"from": [peer]}]


@pytest.mark.parametrize("component", ["driver", "launcher", "test"])
def test_the_driver_reaches_the_api_server_too(component: str) -> None:
    labels = {"app.kubernetes.io/name": "llamarefine", "app.kubernetes.io/component": component}
    (more,) = reached(render(EVERYTHING), labels)[3:]
    assert more == ([{"ipBlock": {"cidr": "10.0.0.1/32"}}], [6443])


def test_nothing_reaches_a_pod_but_what_is_named() -> None:
    for policy in (each["spec"] for each in render(MINIO) if each["kind"] == "NetworkPolicy"):
        if selects(policy["podSelector"], labels_of("merge")):
            assert policy["policyTypes"] == ["Ingress", "Egress"]
            assert "ingress" not in policy


@pytest.mark.parametrize(
    ("endpoint", "port"),
    [
        (None, 443),
        ("https://minio.example.com", 443),
        ("http://minio.storage", 80),
        ("http://minio.storage:9000", 9000),
        ("https://minio.example.com:8443/", 8443),
        ("http://[fd00::1]:7480", 7480),
    ],
)
def test_the_buckets_port_is_its_endpoints(endpoint: str | None, port: int) -> None:
    values: Values = {"settings": {**BUCKET["settings"], "s3_endpoint": endpoint}}
    assert reached(render(values), labels_of("merge"))[1] == (None, [port])


def test_no_policy_is_made_where_none_is_wanted() -> None:
    assert "NetworkPolicy" not in {each["kind"] for each in render({**BUCKET, "networkPolicy": {"enabled": False}})}
