"""Run trials on a kind cluster, and show the results as a table."""

import os
import platform
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.chart.kind_cluster import KindCluster

from .faults import CLUSTER_WIDE
from .namespace import ChaosNamespace
from .trials import Trial, run_trial


def run_trials(
    cluster: KindCluster,
    folder: Path,
    seed: int,
    cases: Sequence[tuple[str, str]],
    parallel: int = 1,
    *,
    trains: bool = False,
) -> dict[str, Any]:
    """Run one trial for each (fault, phase) of `cases`, and return the report that --json writes.

    `cases` contains ("nothing", "step"), the run that the others are compared with. With `trains` the stages are the
    real ones in their own images; otherwise tests/k8s/acting.py plays them in the launcher's image.
    """
    namespace = ChaosNamespace(cluster, trains=trains)
    os.environ |= namespace.bucket
    api = connect(cluster)
    began_s = time.monotonic()
    trials = [Trial(number, fault, phase) for number, (fault, phase) in enumerate(cases)]

    def run_one(trial: Trial) -> None:
        run_trial(trial, namespace, api, folder / f"{folder.name}-{trial.number}", seed)
        print(f"{trial.finding or 'right'}: {row(trial.as_json())}", flush=True)

    with ThreadPoolExecutor(parallel) as pool:
        list(pool.map(run_one, [trial for trial in trials if trial.fault not in CLUSTER_WIDE]))
    for trial in trials:
        if trial.fault in CLUSTER_WIDE:
            run_one(trial)
    undisturbed = next(trial.content for trial in trials if trial.fault == "nothing")
    for trial in trials:
        if not trial.finding and trial.content != undisturbed:
            other = [name for name in undisturbed if trial.content.get(name) != undisturbed[name]]
            trial.finding = f"other bytes than undisturbed: {other}"
    return {
        "seed": seed,
        "seconds": time.monotonic() - began_s,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "load": os.getloadavg(),
        "trials": [trial.as_json() for trial in trials],
    }


def connect(cluster: KindCluster) -> Any:
    """Return clients of the official Kubernetes library. The suite does not use LlamaRefine's own, which it tests."""
    from kubernetes import client, config

    connection = config.new_client_from_config(cluster.environment["KUBECONFIG"])
    connection.rest_client.pool_manager.connection_pool_kw |= {"retries": False, "timeout": 10}
    return SimpleNamespace(core=client.CoreV1Api(connection), jobs=client.BatchV1Api(connection))


def table(trials: Sequence[dict[str, Any]]) -> str:
    """Return a table with the outcome, the recovery time and the steps done twice of each trial."""
    lines = ["| fault | phase | outcome | recovered in s | steps repeated | pods of stage, driver | whole run in s |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    return "\n".join([*lines, *map(row, trials)])


def row(trial: dict[str, Any]) -> str:
    """Return one trial as a row of the table."""
    outcome = "WRONG" if trial["finding"] else "right"
    phase = f"{trial['phase']} {trial['step']}" if trial["phase"] == "step" else trial["phase"]
    figures = (trial["recovered_s"], trial["steps_repeated"])
    shown = ["-" if trial["fault"] == "nothing" or figure is None else f"{figure:g}" for figure in figures]
    pods = f"{trial['stage_pods']}, {trial['driver_pods']}"
    return f"| {trial['fault']} | {phase} | {outcome} | {' | '.join(shown)} | {pods} | {trial['lasted_s'] or 0:.0f} |"
