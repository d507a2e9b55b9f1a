"""Fake Job controller and node for the tests' API server: each Job gets a pod, which runs a fake stage and ends."""

import random
import threading
import time
from typing import Any

from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.store import Store
from llamarefine_k8s.cluster.manifests import JOB_NAME, STAGE

from . import acting
from .api_server import ApiServer

LINES = 30


class FakeNode:
    """Runs each stage's Job that appears, in a thread of its own: logs LINES lines, then publishes the artifact."""

    def __init__(self, api: ApiServer, recipe: Recipe, store: Store, seed: int) -> None:
        self.started_stages: list[str] = []  # the stage of each Job that appeared, in order
        self._api, self._recipe, self._store = api, recipe, store
        self._chance = random.Random(seed)
        self._closed = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    @staticmethod
    def lines_of(stage: str) -> list[str]:
        """Return the lines that a stage logs, each of them twice."""
        return [f"{stage}: says {number // 2}" for number in range(LINES)]

    def _watch(self) -> None:
        known: set[str] = set()
        while not self._closed.is_set():
            with self._api.changed:
                jobs = [item for (kind, _), item in self._api.objects.items() if kind == "jobs"]
                new = [
                    job for job in jobs if job["metadata"]["uid"] not in known and STAGE in job["metadata"]["labels"]
                ]
                known |= {job["metadata"]["uid"] for job in new}
                if not new:
                    self._api.changed.wait(0.2)
            for job in new:
                self.started_stages.append(job["metadata"]["labels"][STAGE])
                threading.Thread(target=self._run, args=(job,), daemon=True).start()

    def _run(self, job: dict[str, Any]) -> None:
        name, stage = job["metadata"]["name"], job["metadata"]["labels"][STAGE]
        pod = f"{name}-abcde"
        owner = {"kind": "Job", "name": name, "uid": job["metadata"]["uid"]}
        metadata = {"name": pod, "labels": job["metadata"]["labels"] | {JOB_NAME: name}, "ownerReferences": [owner]}
        self._api.put("pods", {"metadata": metadata, "status": _pod("Running", {"running": {}})})
        for line in self.lines_of(stage):
            self._api.write_log(pod, line)
            time.sleep(self._chance.choice([0, 0, 0, 0.02, 0.1]))
        acting.publish(stage, self._recipe, self._store)
        with self._api.changed:
            self._api.ended.add(pod)
            self._api.change("pods", pod, {"status": _pod("Succeeded", {"terminated": {"exitCode": 0}})})
        time.sleep(self._chance.choice([0, 0.2]))
        self._api.change("jobs", name, {"status": {"conditions": [{"type": "Complete", "status": "True"}]}})


def _pod(phase: str, state: dict[str, Any]) -> dict[str, Any]:
    return {"phase": phase, "containerStatuses": [{"state": state}]}
