"""A run: its plan, the loop over its stages, its record, its results, its statement and its verification.

The loop in pipeline.py runs stages through the Executor protocol. local_executor.py implements it with processes on
this machine, cluster/executor.py with Kubernetes Jobs. Nothing in this package talks to a cluster.
"""
