"""A stage that a thread executes on the tests' API server, and what a Job's controller and a node do for it."""

import threading
from typing import Any

from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_k8s.cluster.api import Cluster
from llamarefine_k8s.cluster.executor import ClusterExecutor
from llamarefine_k8s.cluster.manifests import JOB_NAME
from llamarefine_k8s.cluster.manifests import RUN as RUN_LABEL
from llamarefine_k8s.runs.pipeline import Task
from llamarefine_k8s.settings import Settings

from .api_server import ApiServer, Object

RUN, JOB = "small-00000000", "small-00000000-sft"
DELETED = {"deletionTimestamp": "2026-11-25T00:00:00Z", "deletionGracePeriodSeconds": 0}
RUNNING = {"phase": "Running", "containerStatuses": [{"state": {"running": {}}}]}
SUCCEEDED = {"phase": "Succeeded", "containerStatuses": [{"state": {"terminated": {"exitCode": 0}}}]}


class RunningStage:
    """A stage that a background thread executes."""

    def __init__(self, cluster: Cluster, recipe: Recipe, **settings: Any) -> None:
        self.lines: list[str] = []
        self.error: BaseException | None = None
        self.task = Task(RUN, "sft", "0" * 64, recipe, "s3://models/llama")
        self.executor = ClusterExecutor(cluster, Settings(store="s3://models/llama", gpu_resource=None, **settings))
        self.thread = threading.Thread(target=self._execute, daemon=True)
        self.thread.start()

    def _execute(self) -> None:
        try:
            self.executor.execute(self.task, self.lines.append)
        except BaseException as error:
            self.error = error


def put_pod(server: ApiServer, name: str, status: Object, **metadata: Any) -> None:
    uid = server.objects["jobs", JOB]["metadata"]["uid"]
    metadata |= {
        "name": name,
        "labels": {JOB_NAME: JOB, RUN_LABEL: RUN},
        "ownerReferences": [{"kind": "Job", "name": JOB, "uid": uid}],
    }
    server.put("pods", {"metadata": metadata, "spec": {"nodeName": "gone"}, "status": status})


def finish(server: ApiServer, running: RunningStage) -> None:
    """Let a second pod succeed and the Job complete, as the Job's controller and another node do."""
    put_pod(server, "two", SUCCEEDED, creationTimestamp="2099-01-01T00:00:00Z")
    server.ended |= {"one", "two"}
    server.change("jobs", JOB, {"status": {"conditions": [{"type": "Complete", "status": "True"}]}})
    running.thread.join(60)
    assert not running.thread.is_alive()
