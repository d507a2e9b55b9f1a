"""What a stage costs on a cluster beside its work: a run whose stages only act, beside plain Jobs of `true`.

    make kind-up && python tests/bench/overhead.py [--times 3]

Both are watched from here by one watch, in turn. A run's stages are `tests/k8s/acting.py` in the launcher's image, in
the release's namespace and bucket; its driver is the one that `submit` makes. The plain Jobs run `true` in the same
image, each made when the watch says that the one before is complete. Needs the chart on the current cluster, on which
nothing else should run; its bucket keeps a few kilobytes of each run.
"""

import argparse
import itertools
import os
import queue
import secrets
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.k8s.acting import patches, program_map

from llamarefine_jobs.contract.errors import LlamaRefineError
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.stages import SEQUENCE
from llamarefine_k8s.cluster import run_status, submission
from llamarefine_k8s.cluster.api import Cluster
from llamarefine_k8s.cluster.manifests import JOB_NAME, stage_job_name
from llamarefine_k8s.cluster.reasons import condition
from llamarefine_k8s.runs.records import run_id
from llamarefine_k8s.settings import Settings

PATIENCE_S = 300.0


class Moments:
    """When, on this machine's clock, a Job of a name was made, its pod ran and ended, and the Job was complete."""

    def __init__(self, cluster: Cluster) -> None:
        self.at_s: dict[tuple[str, str], float] = {}
        self._changes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        for kind in ("Job", "Pod"):
            threading.Thread(target=self._watch, args=(cluster, kind), daemon=True).start()

    def wait(self, job: str, moment: str) -> float:
        """The time of a moment, waited for."""
        until_s = time.monotonic() + PATIENCE_S
        while (job, moment) not in self.at_s:
            try:
                self._changes.get(timeout=max(0.0, until_s - time.monotonic()))
            except queue.Empty:
                sys.exit(f"{job} was not {moment} within {PATIENCE_S:g} s")
        return self.at_s[job, moment]

    def _watch(self, cluster: Cluster, kind: str) -> None:
        for _, item in cluster.watch(kind, stopped=self._stopped.is_set):
            now_s = time.monotonic()
            if kind == "Job":
                moments = ["created", *(["complete"] if condition(item, "Complete") else [])]
                job = item["metadata"]["name"]
            else:
                phase = item["status"].get("phase")
                moments = {"Running": ["running"], "Succeeded": ["running", "ended"]}.get(phase, [])
                job = (item["metadata"].get("labels") or {}).get(JOB_NAME, "")
            for moment in moments:
                self.at_s.setdefault((job, moment), now_s)
            self._changes.put(None)


def plain_jobs(cluster: Cluster, given: Settings, moments: Moments) -> list[str]:
    """Five Jobs of `true`, each made by the watch; their names."""
    names = [f"plain-{secrets.token_hex(4)}" for _ in SEQUENCE]
    for name in names:
        security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        container = {"name": "true", "image": given.image("launcher"), "command": ["true"], "securityContext": security}
        pod = {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [container],
        }
        job: dict[str, Any] = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}}
        cluster.create(job | {"spec": {"backoffLimit": 0, "template": {"spec": pod}}})
        moments.wait(name, "complete")
    return names


def drive(cluster: Cluster, given: Settings, moments: Moments) -> list[str]:
    """A run, driven to its end in the cluster; the names of its driver's Job and its stages'."""
    rows = {"source": "python-docstrings"}
    sources = {"base": {"source": "tiny-llama"}, "questions": rows, "preferences": rows}
    unpinned = Recipe.model_validate({"name": "overhead", "seed": secrets.randbelow(10**6), "prepare": sources})
    recipe = submission.bring_sources(unpinned, given, lambda text: None, upload=False)
    run = run_id(recipe)
    submission.start(cluster, recipe, given, lambda text: None)
    moments.wait(run, "complete")
    run_status.remove(cluster, run)
    return [run, *(stage_job_name(run, stage) for stage in SEQUENCE)]


def spans(moments: Moments, jobs: list[str], end: str) -> dict[str, list[float]]:
    """Seconds of each part of each Job; `end` is the moment upon which the next one is made."""
    at_s = moments.at_s
    pairs = list(itertools.pairwise(jobs))
    return {
        "created to running": [at_s[job, "running"] - at_s[job, "created"] for job in jobs],
        "running to ended": [at_s[job, "ended"] - at_s[job, "running"] for job in jobs],
        f"{end} to next created": [at_s[after, "created"] - at_s[job, end] for job, after in pairs],
        "created to next created": [at_s[after, "created"] - at_s[job, "created"] for job, after in pairs],
    }


def show(title: str, spans: list[dict[str, list[float]]]) -> None:
    """Median, least and most of each part."""
    print(title)
    for name in spans[0]:
        taken = [second for each in spans for second in each[name]]
        print(f"  {name:26} median {statistics.median(taken):5.2f} s   {min(taken):5.2f} to {max(taken):5.2f} s")


def find_release() -> tuple[Cluster, Settings]:
    """The cluster and the release's settings, its stages told to act; LlamaRefineError where there is none."""
    cluster = Cluster(None, os.environ.get("NAMESPACE", "llamarefine"))
    given = submission.load_settings(cluster, None)
    small = {"requests": {"cpu": "10m", "memory": "64Mi"}}
    acting = {"patches": patches(given.image("launcher")), "resources": dict.fromkeys(SEQUENCE, small)}
    return cluster, Settings.model_validate(given.model_dump() | acting | {"gpu_resource": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--times", type=int, default=3)
    times = parser.parse_args().times
    try:
        cluster, given = find_release()
    except LlamaRefineError as error:
        print(f"what a stage costs on a cluster was not measured: {error}")
        return
    cluster.create(program_map())
    moments = Moments(cluster)
    plain, ours, first = [], [], []
    for _ in range(times):
        jobs = plain_jobs(cluster, given, moments)
        plain.append(spans(moments, jobs, "complete"))
        for job in jobs:
            cluster.delete("Job", job)
        run, *stages = drive(cluster, given, moments)
        ours.append(spans(moments, stages, "ended"))
        first.append(
            {
                "to the driver's pod": [moments.at_s[run, "running"] - moments.at_s[run, "created"]],
                "to the first stage's pod": [moments.at_s[stages[0], "running"] - moments.at_s[run, "created"]],
            }
        )
    cluster.delete("ConfigMap", program_map()["metadata"]["name"])
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    print(f"{times} times {len(SEQUENCE)} Jobs, in turn; load at the end {load} on {os.cpu_count()} processors")
    show("a plain Job of `true`, made by a watch", plain)
    show("a stage that acts, made by the driver", ours)
    show("from submit", first)


if __name__ == "__main__":
    main()
