"""The Kubernetes side: stages as Jobs, the driver, status and logs from the cluster, preflight.

Only api.py imports the Kubernetes client. manifests.py is pure, so `--dry-run` prints exactly what is sent.
"""

from typing import Any

KubeObject = dict[str, Any]
"""A Kubernetes object as the API server sends and accepts it in JSON."""
