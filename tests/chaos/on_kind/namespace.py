"""The namespace of a kind cluster in which the trials run: the chart with MinIO, reachable from here and from pods."""

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
_OUTSIDE_SERVICE = "minio-outside"
STAGES_NODE = "chaos=stages"  # label of the nodes on which the stages of "lose node" may run
# Settings of the run whose node is lost.
ON_THE_WORKER: dict[str, Any] = {
    "node_selector": dict([STAGES_NODE.split("=")]),
    "tolerations": [
        {"key": "may-be-lost", "operator": "Exists"},
        # Short, to save time: by default Kubernetes tolerates a lost node for 300 s, and the grace period is 120 s.
        *(
            {"key": f"node.kubernetes.io/{what}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 5}
            for what in ("unreachable", "not-ready")
        ),
    ],
    "grace_s": 20,
}


class ChaosNamespace:
    """A release of the chart with MinIO. `bucket` is the environment with which this process reaches MinIO.

    With `trains` the stages train, in their own images; otherwise acting.py plays them in the launcher's image.
    """

    def __init__(self, cluster: KindCluster, *, trains: bool = False) -> None:
        self.cluster, self.trains = cluster, trains
        self.node = f"{kind.CLUSTER}-control-plane"
        self.worker = f"{kind.CLUSTER}-worker"  # the node that "lose node" freezes
        cluster.make_namespace(NAMESPACE)
        cluster.apply(program_map() | {"metadata": program_map()["metadata"] | {"namespace": NAMESPACE}})
        values = {
            "settings.image_registry": "localhost",
            "settings.image_tag": TAG,
            "secret.accessKeyId": KEY,
            "secret.secretAccessKey": SECRET,
            "networkPolicy.enabled": "false",  # this process connects from outside the cluster
        }
        settings = [f"--set={name}={value}" for name, value in values.items()]
        cluster.run(
            *("helm", "upgrade", "--install", "llamarefine", "charts/llamarefine", "--namespace", NAMESPACE),
            *("--values", "k8s/kind-values.yaml", *settings, "--wait", "--timeout", "5m"),
        )
        self.endpoint = self._expose_minio()
        self.bucket = {
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
        }

    def kubectl(self, *arguments: str, check: bool = True, stdin: str | None = None) -> str:
        return self.cluster.kubectl("--namespace", NAMESPACE, *arguments, check=check, stdin=stdin)

    def on_node(self, *command: str) -> str:
        """Run a program on the first node, as root."""
        return self.engine("exec", self.node, *command)

    @contextmanager
    def stages_on_worker(self) -> Iterator[None]:
        """Run stages that have the settings ON_THE_WORKER on the second node only; restore that node afterwards."""
        self.kubectl("label", "node", self.worker, STAGES_NODE)
        try:
            yield
        finally:
            self.cluster.run(str(kind.engine(self.cluster.environment)), "unpause", self.worker, check=False)
            for node in (self.node, self.worker):
                self.kubectl("label", "node", node, STAGES_NODE.split("=")[0] + "-")

    def engine(self, *arguments: str) -> str:
        """Run docker or podman, whose containers are the nodes."""
        return self.cluster.run(str(kind.engine(self.cluster.environment)), *arguments)

    def gateway(self) -> str:
        """Return the address of this machine in the network of the pods."""
        network = self.engine("network", "inspect", "kind")
        found = re.search(r'"[Gg]ateway": "(\d+\.\d+\.\d+\.\d+)"', network)
        assert found, network
        return found[1]

    def launcher(self, folder: Path, endpoint: str | None = None) -> OnCluster:
        """Return `llamarefine` with a store named like the folder; its pods reach the bucket through `endpoint`."""
        launcher = OnCluster(self.cluster, NAMESPACE, self.endpoint, folder)
        launcher.settings["s3_endpoint"] = endpoint or self.endpoint
        return launcher

    def _expose_minio(self) -> str:
        """Expose MinIO at a port of the node, and return the address, which pods and this machine can reach."""
        service = next(each for each in self._objects("services") if each["metadata"]["name"] == MINIO)
        ports = [{"port": 9000, "targetPort": "s3"}]
        spec = {"type": "NodePort", "selector": service["spec"]["selector"], "ports": ports}
        metadata = {"name": _OUTSIDE_SERVICE, "namespace": NAMESPACE}
        self.cluster.apply({"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec})
        path = "jsonpath={.spec.ports[0].nodePort}"
        port = self.kubectl("get", "service", _OUTSIDE_SERVICE, "--output", path).strip()
        address = 'jsonpath={.status.addresses[?(@.type=="InternalIP")].address}'
        node = self.cluster.kubectl("get", "node", self.node, "--output", address).split()[0]
        return f"http://{node}:{port}"

    def _objects(self, kinds: str) -> list[dict[str, Any]]:
        return self.cluster.objects(NAMESPACE, kinds)
