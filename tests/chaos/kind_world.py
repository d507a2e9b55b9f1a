"""A namespace of a kind cluster where runs are disturbed: the chart with its MinIO, reached from here and from pods."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.chart.kind_cluster import TAG, KindCluster
from tests.e2e import kind
from tests.k8s.acting import program_map
from tests.k8s.on_cluster import OnCluster
from tests.s3_server import KEY, SECRET

NAMESPACE, MINIO = "chaos", "llamarefine-minio"
_OUTSIDE = "minio-outside"
STAGES_NODE = "chaos=stages"  # a label of the nodes where the stages of a run may be that loses its node
ON_THE_WORKER: dict[str, Any] = {
    "node_selector": dict([STAGES_NODE.split("=")]),
    "tolerations": [
        {"key": "may-be-lost", "operator": "Exists"},
        # Kubernetes' own are 300 s, and a pod's grace period 120 s.
        *(
            {"key": f"node.kubernetes.io/{what}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 5}
            for what in ("unreachable", "not-ready")
        ),
    ],
    "grace_s": 20,
}


class World:
    """Where it all happens. `bucket` is the environment by which this process reaches its MinIO.

    Stages act, in the launcher's image; they train where `trains`, in their own ones.
    """

    def __init__(self, made: KindCluster, *, trains: bool = False) -> None:
        self.made, self.trains = made, trains
        self.node, self.worker = f"{kind.CLUSTER}-control-plane", f"{kind.CLUSTER}-worker"  # one may be lost
        made.make_namespace(NAMESPACE)
        made.apply(program_map() | {"metadata": program_map()["metadata"] | {"namespace": NAMESPACE}})
        values = {
            "settings.image_registry": "localhost",
            "settings.image_tag": TAG,
            "secret.accessKeyId": KEY,
            "secret.secretAccessKey": SECRET,
            "networkPolicy.enabled": "false",  # we come from outside
        }
        settings = [f"--set={name}={value}" for name, value in values.items()]
        made.run(
            *("helm", "upgrade", "--install", "llamarefine", "charts/llamarefine", "--namespace", NAMESPACE),
            *("--values", "k8s/kind-values.yaml", *settings, "--wait", "--timeout", "5m"),
        )
        self.endpoint = self._open_minio()
        self.bucket = {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }

    def kubectl(self, *arguments: str, check: bool = True, stdin: str | None = None) -> str:
        return self.made.kubectl("--namespace", NAMESPACE, *arguments, check=check, stdin=stdin)

    def on_node(self, *command: str) -> str:
        """Run a program on the node, as root."""
        return self.engine("exec", self.node, *command)

    @contextmanager
    def lending_worker(self) -> Iterator[None]:
        """While the second node, and no other, takes stages settled as ON_THE_WORKER; it is back afterwards."""
        self.kubectl("label", "node", self.worker, STAGES_NODE)
        try:
            yield
        finally:
            self.made.run(str(kind.engine(self.made.environment)), "unpause", self.worker, check=False)
            for node in (self.node, self.worker):
                self.kubectl("label", "node", node, STAGES_NODE.split("=")[0] + "-")

    def engine(self, *arguments: str) -> str:
        """What docker, or podman, does with the nodes, which are its containers."""
        return self.made.run(str(kind.engine(self.made.environment)), *arguments)

    def gateway(self) -> str:
        """This machine's address as pods see it."""
        network = self.engine("network", "inspect", "kind")
        found = re.search(r'"[Gg]ateway": "(\d+\.\d+\.\d+\.\d+)"', network)
        assert found, network
        return found[1]

    def launcher(self, folder: Path, endpoint: str | None = None) -> OnCluster:
        """`llamarefine` with a store of its own, named as the folder; its pods come to the bucket by `endpoint`."""
        made = OnCluster(self.made, NAMESPACE, self.endpoint, folder)
        made.settings["s3_endpoint"] = endpoint or self.endpoint
        return made

    def _open_minio(self) -> str:
        """A port of the node that leads to MinIO: one address for pods and for this machine."""
        service = next(each for each in self._objects("services") if each["metadata"]["name"] == MINIO)
        ports = [{"port": 9000, "targetPort": "s3"}]
        spec = {"type": "NodePort", "selector": service["spec"]["selector"], "ports": ports}
        metadata = {"name": _OUTSIDE, "namespace": NAMESPACE}
        self.made.apply({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec})
        path = "jsonpath={.spec.ports[0].nodePort}"
        port = self.kubectl("get", "service", _OUTSIDE, "--output", path).strip()
        address = 'jsonpath={.status.addresses[?(@.type=="InternalIP")].address}'
        node = self.made.kubectl("get", "node", self.node, "--output", address).split()[0]
        return f"http://{node}:{port}"

    def _objects(self, kinds: str) -> list[dict[str, Any]]:
        return self.made.objects(NAMESPACE, kinds)
