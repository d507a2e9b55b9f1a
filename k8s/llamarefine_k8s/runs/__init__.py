"""A run: its plan, its loop over the stages, its record, its results, its verification.

Knows executors only by the interface in pipeline.py; the local executor lives here. Never talks to a cluster.
"""
