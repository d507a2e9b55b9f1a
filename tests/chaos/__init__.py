"""The chaos suites: real runs are disturbed by faults at random moments and must still end right. docs/chaos.md.

On this machine (`make chaos`, `python -m tests.chaos`; `test_chaos.py` runs a short form):

- `__main__.py`: the command, the order of the trials, the table of results.
- `workspaces.py`: the folder that a trial runs in (a recipe, its sources and a store), and digests of what it made.
- `processes.py`: runs a stage, or a writer of the store, as a process.
- `moments.py`: when a fault happens: marks of an undisturbed run, phases, the trigger.
- `faults.py`: what each fault does, and which exit codes and errors are right after it.
- `trials.py`: one trial: the fault, the restarts, the comparison with the undisturbed run.

On a kind cluster (`make chaos-kind`, `python -m tests.chaos.on_kind`): the package `on_kind`, with the same division.

A subject is what a trial disturbs: a stage, or "store", a writer that publishes checkpoints and an artifact.
"""
