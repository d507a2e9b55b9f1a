"""Measure the overhead of a stage on a cluster: a run whose stages do no work, compared with plain Jobs of `true`.

    make kind-up && python tests/bench/overhead.py [--times 3]

The two take turns, and this process watches both. `tests/k8s/acting.py` plays the run's stages in the launcher's
image, in the namespace and bucket of the release; the driver is the one that `submit` creates. The plain Jobs run
`true` in the same image, and each is created when the watch reports that the previous one is complete. Needs the chart
on the current cluster, where nothing else should run; its bucket keeps a few kilobytes of each run.
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

DEADLINE_S = 300.0


class JobTimes:
    """When, on this machine's clock, each Job was created, its pod ran and ended, and the Job was complete."""

    def __init__(self, cluster: Cluster) -> None:
        self.at_s: dict[tuple[str, str], float] = {}
        self._changes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        for kind in ("Job", "Pod"):
            threading.Thread(target=self._watch, args=(cluster, kind), daemon=True).start()

    def wait(self, job: str, event: str) -> float:
        """Wait for an event of a Job and return its time; exit after DEADLINE_S."""
        until_s = time.monotonic() + DEADLINE_S
        while (job, event) not in self.at_s:
            try:
                self._changes.get(timeout=max(0.0, until_s - time.monotonic()))
            except queue.Empty:
                sys.exit(f"{job} was not {event} within {DEADLINE_S:g} s")
        return self.at_s[job, event]

    def _watch(self, cluster: Cluster, kind: str) -> None:
        for _, item in cluster.watch(kind, stopped=self._stopped.is_set):
            now_s = time.monotonic()
            if kind == "Job":
                events = ["created", *(["complete"] if condition(item, "Complete") else [])]
                job = item["metadata"]["name"]
            else:
                phase = item["status"].get("phase")
                events = {"Running": ["running"], "Succeeded": ["running", "ended"]}.get(phase, [])
                job = (item["metadata"].get("labels") or {}).get(JOB_NAME, "")
            for event in events:
                self.at_s.setdefault((job, event), now_s)
            self._changes.put(None)


def run_plain_jobs(cluster: Cluster, settings: Settings, times: JobTimes) -> list[str]:
    """Run as many Jobs of `true` as there are stages, one after the other; return their names."""
    names = [f"plain-{secrets.token_hex(4)}" for _ in SEQUENCE]
    for name in names:
        security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        container = {
            "name": "true",
            "image": settings.image("launcher"),
            "command": ["true"],
            "securityContext": security,
        }
        pod = {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [container],
        }
        job: dict[str, Any] = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}}
        cluster.create(job | {"spec": {"backoffLimit": 0, "template": {"spec": pod}}})
        times.wait(name, "complete")
    return names


def run_pipeline(cluster: Cluster, settings: Settings, times: JobTimes) -> list[str]:
    """Submit a run and wait for its end; return the names of the driver's Job and of the stages' Jobs."""
    rows = {"source": "python-docstrings"}
    sources = {"base": {"source": "tiny-llama"}, "questions": rows, "preferences": rows}
    unpinned = Recipe.model_validate({"name": "overhead", "seed": secrets.randbelow(10**6), "prepare": sources})
    recipe = submission.pin_for_cluster(unpinned, settings, lambda text: None, upload=False)
    run = run_id(recipe)
    submission.start(cluster, recipe, settings, lambda text: None)
    times.wait(run, "complete")
    run_status.remove(cluster, run)
    return [run, *(stage_job_name(run, stage) for stage in SEQUENCE)]


def durations(times: JobTimes, jobs: list[str], end: str) -> dict[str, list[float]]:
    """Return the seconds of each part of each Job; the next Job is created upon the event `end`."""
    at_s = times.at_s
    pairs = list(itertools.pairwise(jobs))
    return {
        "created to running": [at_s[job, "running"] - at_s[job, "created"] for job in jobs],
        "running to ended": [at_s[job, "ended"] - at_s[job, "running"] for job in jobs],
        f"{end} to next created": [at_s[after, "created"] - at_s[job, end] for job, after in pairs],
        "created to next created": [at_s[after, "created"] - at_s[job, "created"] for job, after in pairs],
    }


def show(title: str, measured: list[dict[str, list[float]]]) -> None:
    """Print the median, the shortest and the longest duration of each part."""
    print(title)
    for name in measured[0]:
        taken = [second for each in measured for second in each[name]]
        print(f"  {name:26} median {statistics.median(taken):5.2f} s   {min(taken):5.2f} to {max(taken):5.2f} s")


def find_release() -> tuple[Cluster, Settings]:
    """Return the cluster and the release's settings, changed so that acting.py plays the stages.

    Raises LlamaRefineError if there is no release.
    """
    cluster = Cluster(None, os.environ.get("NAMESPACE", "llamarefine"))
    settings = submission.load_settings(cluster, None)
    small = {"requests": {"cpu": "10m", "memory": "64Mi"}}
    acting = {"patches": patches(settings.image("launcher")), "resources": dict.fromkeys(SEQUENCE, small)}
    return cluster, Settings.model_validate(settings.model_dump() | acting | {"gpu_resource": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--times", type=int, default=3)
    repetitions = parser.parse_args().times
    try:
        cluster, settings = find_release()
    except LlamaRefineError as error:
        print(f"the overhead of a stage on a cluster was not measured: {error}")
        return
    cluster.create(program_map())
    times = JobTimes(cluster)
    plain, ours, first = [], [], []
    for _ in range(repetitions):
        jobs = run_plain_jobs(cluster, settings, times)
        plain.append(durations(times, jobs, "complete"))
        for job in jobs:
            cluster.delete("Job", job)
        run, *stages = run_pipeline(cluster, settings, times)
        ours.append(durations(times, stages, "ended"))
        first.append(
            {
                "to the driver's pod": [times.at_s[run, "running"] - times.at_s[run, "created"]],
                "to the first stage's pod": [times.at_s[stages[0], "running"] - times.at_s[run, "created"]],
            }
        )
    cluster.delete("ConfigMap", program_map()["metadata"]["name"])
    load = ", ".join(f"{each:.1f}" for each in os.getloadavg())
    jobs_of_each_kind = f"{repetitions} times {len(SEQUENCE)} Jobs of each kind"
    print(f"{jobs_of_each_kind}, in turn; load at the end {load} on {os.cpu_count()} processors")
    show("a plain Job of `true`, created by this process", plain)
    show("a stage that does no work, created by the driver", ours)
    show("from submit", first)


if __name__ == "__main__":
    main()
