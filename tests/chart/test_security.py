"""Every pod is restricted, credentials are only in the Secret, and network policies allow only the traffic in use."""

import base64
from typing import Any

import pytest

from llamarefine_k8s.cluster import manifests

from .rendering import BUCKET, MINIO, Object, Values, needs_helm, one, pods, render
from .test_golden import CASES, EVERYTHING

pytestmark = needs_helm


def all_pods() -> list[tuple[str, Object]]:
    """Return the pod templates of every golden case, each with a name for error messages."""
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


def test_only_pods_that_call_the_api_server_have_a_token() -> None:
    for name, pod in all_pods():
        is_minio = pod["metadata"]["labels"]["app.kubernetes.io/component"] == "minio"
        assert (pod["spec"].get("automountServiceAccountToken") is False) == is_minio, name
    assert one(render(BUCKET), "ServiceAccount", "llamarefine-stage")["automountServiceAccountToken"] is False


def test_credentials_are_only_in_the_secret() -> None:
    encoded = base64.b64encode(b"secret-key").decode()
    for values in (MINIO | {"recipe": EVERYTHING["recipe"]}, EVERYTHING):
        with_key = [each for each in render(values) if "secret-key" in str(each) or encoded in str(each)]
        assert [each["kind"] for each in with_key] == ["Secret"]


def test_without_keys_in_the_values_pods_refer_to_an_existing_secret() -> None:
    objects = render({**BUCKET, "recipe": EVERYTHING["recipe"]})
    assert [each for each in objects if each["kind"] == "Secret"] == []
    (container,) = one(objects, "Job", "llamarefine-submit")["spec"]["template"]["spec"]["containers"]
    referred = [variable["valueFrom"]["secretKeyRef"] for variable in container["env"] if "valueFrom" in variable]
    assert [reference["name"] for reference in referred] == ["llamarefine-bucket"] * 2


def test_with_workload_identity_there_is_no_secret() -> None:
    objects = render({"recipe": EVERYTHING["recipe"], "settings": {**BUCKET["settings"], "secret_name": None}})
    assert "Secret" not in {each["kind"] for each in objects}
    assert "secretKeyRef" not in str(objects)


def test_the_role_is_bound_to_the_driver_and_has_no_wildcard() -> None:
    objects = render(EVERYTHING)
    binding = one(objects, "RoleBinding")
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": "runner", "namespace": "team"}]
    assert binding["roleRef"]["name"] == one(objects, "Role")["metadata"]["name"]
    for rule in one(objects, "Role")["rules"]:
        assert "*" not in rule["verbs"] + rule["resources"] + rule["apiGroups"]


# The network


def allowed_egress(objects: list[Object], labels: dict[str, str]) -> list[tuple[Any, Any]]:
    """Return the peers and ports that a pod with `labels` may connect to, of every policy that selects it."""
    found = []
    for policy in (each for each in objects if each["kind"] == "NetworkPolicy"):
        if selects(policy["spec"]["podSelector"], labels):
            found += [(rule.get("to"), ports(rule)) for rule in policy["spec"].get("egress", [])]
    return found


def selects(selector: Object, labels: dict[str, str]) -> bool:
    """Whether a label selector matches a pod with `labels`."""
    exact = selector.get("matchLabels", {}).items() <= labels.items()
    return exact and all(labels.get(rule["key"]) in rule["values"] for rule in selector.get("matchExpressions", []))


def ports(rule: Object) -> list[int]:
    return [port["port"] for port in rule.get("ports", [])]


def labels_of(component: str) -> dict[str, str]:
    """Return the labels that the launcher gives to the pod of a stage, or of the driver."""
    return manifests._labels("a-run", component)


DNS = [53, 53]


@pytest.mark.parametrize("stage", ["merge", "evaluate", "infer"])
def test_a_stage_may_connect_to_dns_and_the_bucket(stage: str) -> None:
    objects = render(MINIO)
    minio = [{"podSelector": {"matchLabels": one(objects, "Service")["spec"]["selector"]}}]
    (dns, bucket) = allowed_egress(objects, labels_of(stage))
    assert dns[1] == DNS
    assert bucket == (minio, [9000])


def test_prepare_may_also_connect_to_https() -> None:
    assert allowed_egress(render(MINIO), labels_of("prepare"))[2:] == [(None, [443])]


def test_pods_of_one_training_may_connect_to_each_other() -> None:
    objects = render(MINIO)
    (rule,) = allowed_egress(objects, labels_of("sft"))[2:]
    (peer,) = rule[0]
    assert selects(peer["podSelector"], labels_of("sft"))
    assert not selects(peer["podSelector"], labels_of("prepare"))
    assert one(objects, "NetworkPolicy", "llamarefine-training")["spec"]["ingress"] == [{"from": [peer]}]


@pytest.mark.parametrize("component", ["driver", "launcher", "test"])
def test_driver_and_launcher_may_also_connect_to_the_api_server(component: str) -> None:
    labels = {"app.kubernetes.io/name": "llamarefine", "app.kubernetes.io/component": component}
    (rule,) = allowed_egress(render(EVERYTHING), labels)[3:]
    assert rule == ([{"ipBlock": {"cidr": "10.0.0.1/32"}}], [6443])


def test_nothing_may_connect_to_a_stage() -> None:
    policies = [each["spec"] for each in render(MINIO) if each["kind"] == "NetworkPolicy"]
    selecting = [policy for policy in policies if selects(policy["podSelector"], labels_of("merge"))]
    assert selecting
    for policy in selecting:
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
def test_the_policys_port_is_the_port_of_the_endpoint(endpoint: str | None, port: int) -> None:
    values: Values = {"settings": {**BUCKET["settings"], "s3_endpoint": endpoint}}
    assert allowed_egress(render(values), labels_of("merge"))[1] == (None, [port])


def test_network_policies_can_be_disabled() -> None:
    assert "NetworkPolicy" not in {each["kind"] for each in render({**BUCKET, "networkPolicy": {"enabled": False}})}
