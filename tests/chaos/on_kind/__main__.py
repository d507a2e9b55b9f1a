"""The chaos suite on a kind cluster: `make chaos-kind SEED=1`.

Each trial submits the pipeline to a kind cluster, where tests/k8s/acting.py plays the stages in the launcher's image,
and applies one fault in one phase of the stage sft. A trial is right if every file of every stage has the same sha256
as undisturbed, there was one Job for each stage, and each line of the stage's log was kept once. Anything else is a
finding and fails the suite.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

from tests.chart.kind_cluster import cluster
from tests.e2e import kind

from .faults import CASES, TRAINED_CASES
from .suite import run_trials, table

_TWO_NODES = Path(__file__).with_name("two-nodes.yaml")


def main() -> int:
    """Create a cluster, run the suite on it, and return 1 if a trial has a finding."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.on_kind", description=(__doc__ or "").split("\n\n")[1])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--parallel", type=int, default=3, help="number of runs at the same time, unless a fault hits the whole cluster"
    )
    parser.add_argument("--only", default="", metavar="REGEX", help="run only the trials whose `fault, phase` matches")
    parser.add_argument("--train", action="store_true", help="run stages that train, in their own images of 7 GB")
    parser.add_argument("--json", type=Path, help="write the results of every trial to this file")
    options = parser.parse_args()
    selectable = TRAINED_CASES if options.train else CASES
    cases = [case for case in selectable if case[0] == "nothing" or re.search(options.only, ", ".join(case))]
    nodes = None if options.train else _TWO_NODES
    with tempfile.TemporaryDirectory(prefix="llamarefine-chaos-") as folder, cluster(Path(folder), nodes) as made:
        if options.train:
            kind.make(made.environment, "kind-up")  # builds and loads the stages' images too: gigabytes
        report = run_trials(made, Path(folder), options.seed, cases, parallel=options.parallel, trains=options.train)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report["trials"]))
    findings = [trial for trial in report["trials"] if trial["finding"]]
    for trial in findings:
        print(f"WRONG: {trial['fault']}, {trial['phase']}: {trial['finding']}")
    print(f"{len(cases)} trials in {report['seconds']:.0f} s, seed {options.seed}: {len(findings)} wrong")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
