"""The Kubernetes side: stages as Jobs, the driver, status and logs from the cluster, preflight.

Only api.py imports the Kubernetes client. manifests.py is pure, so `--dry-run` prints the objects that would be sent,
except for what is known only later: their owners, and the keys of all stages but the first.
"""

from typing import Any

KubeObject = dict[str, Any]
"""A Kubernetes object as the API server sends and accepts it in JSON."""
