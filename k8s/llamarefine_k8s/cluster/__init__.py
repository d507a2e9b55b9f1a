"""The Kubernetes side: stages as Jobs, the driver, status and logs from the cluster, preflight.

Only api.py talks to the API server; manifests.py is pure, so a dry run prints exactly what is sent.
"""
