"""The chaos suite on a real cluster: `make chaos-kind SEED=1`.

Each trial submits the pipeline to a kind cluster, its stages played by tests/k8s/acting.py in the launcher's image,
and lets one fault happen in one phase of the stage sft. Right is: the same sha256 of every stage's files as
undisturbed, one Job for each stage, each line of the stage's log once. Anything else is a finding and fails the suite.
"""

import argparse
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.chart.kind_cluster import KindCluster, cluster
from tests.e2e import kind

from .kind_faults import CASES, SHARED, TRAINED_CASES
from .kind_trials import Trial, carry_out
from .kind_world import World

_NODES = Path(__file__).with_name("two-nodes.yaml")


def main() -> int:
    """Run the suite on a cluster of its own; 1 where something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.on_kind", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--at-once", type=int, default=3, help="runs side by side, where a fault meets only its own")
    parser.add_argument("--only", default="", metavar="REGEX", help="the trials whose `fault, phase` it finds")
    parser.add_argument("--train", action="store_true", help="stages that train, in their own images of 7 GB")
    parser.add_argument("--json", type=Path, help="write every trial there")
    options = parser.parse_args()
    every = TRAINED_CASES if options.train else CASES
    cases = [case for case in every if case[0] == "nothing" or re.search(options.only, ", ".join(case))]
    nodes = None if options.train else _NODES
    with tempfile.TemporaryDirectory(prefix="llamarefine-chaos-") as folder, cluster(Path(folder), nodes) as made:
        if options.train:
            kind.make(made.environment, "kind-up")  # every image: gigabytes
        report = suffer(made, Path(folder), options.seed, cases, at_once=options.at_once, trains=options.train)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report["trials"]))
    findings = [trial for trial in report["trials"] if trial["finding"]]
    for trial in findings:
        print(f"WRONG: {trial['fault']}, {trial['phase']}: {trial['finding']}")
    print(f"{len(cases)} trials in {report['seconds']:.0f} s, seed {options.seed}: {len(findings)} wrong")
    return 1 if findings else 0


def suffer(
    made: KindCluster,
    folder: Path,
    seed: int,
    cases: Sequence[tuple[str, str]],
    at_once: int = 1,
    *,
    trains: bool = False,
) -> dict[str, Any]:
    """One trial for each of `cases`, `("nothing", "step")` among them; what each did, as plain values."""
    world = World(made, trains=trains)
    os.environ |= world.bucket
    api = connect(made)
    began_s = time.monotonic()
    trials = [Trial(number, fault, phase) for number, (fault, phase) in enumerate(cases)]

    def one(trial: Trial) -> None:
        carry_out(trial, world, api, folder / f"{folder.name}-{trial.number}", seed)
        print(f"{trial.finding or 'right'}: {row(trial.as_json())}", flush=True)

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(one, [trial for trial in trials if trial.fault not in SHARED]))
    for trial in trials:
        if trial.fault in SHARED:
            one(trial)
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


def connect(made: KindCluster) -> Any:
    """Kubernetes' own client: not ours, which is what is tried."""
    from kubernetes import client, config

    given = config.new_client_from_config(made.environment["KUBECONFIG"])
    given.rest_client.pool_manager.connection_pool_kw |= {"retries": False, "timeout": 10}
    return SimpleNamespace(core=client.CoreV1Api(given), jobs=client.BatchV1Api(given))


def table(trials: Sequence[dict[str, Any]]) -> str:
    """Fault by phase: whether it ended right, how long until the run went on, how many steps were done twice."""
    lines = ["| fault | phase | outcome | recovered in s | steps repeated | pods of stage, driver | whole run in s |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    return "\n".join([*lines, *map(row, trials)])


def row(trial: dict[str, Any]) -> str:
    """One trial as a line of the table."""
    outcome = "WRONG" if trial["finding"] else "right"
    phase = f"{trial['phase']} {trial['step']}" if trial["phase"] == "step" else trial["phase"]
    figures = (trial["recovered_s"], trial["steps_repeated"])
    shown = ["-" if trial["fault"] == "nothing" or figure is None else f"{figure:g}" for figure in figures]
    pods = f"{trial['stage_pods']}, {trial['driver_pods']}"
    return f"| {trial['fault']} | {phase} | {outcome} | {' | '.join(shown)} | {pods} | {trial['lasted_s'] or 0:.0f} |"


if __name__ == "__main__":
    sys.exit(main())
