"""The chaos suite on a kind cluster: `make chaos-kind`; `make e2e` runs short forms of it.

- `__main__.py`: the command. `suite.py`: runs a list of trials and prints their table.
- `namespace.py`: the namespace of the trials: the chart with MinIO, reachable from pods and from this machine.
- `faults.py`: what each fault does, the phases of a run, and the fault and phase of each trial.
- `trials.py`: one trial: submit a run, apply its fault, watch the run to its end, compare logs and artifacts.
"""

from .suite import run_trials

__all__ = ["run_trials"]
