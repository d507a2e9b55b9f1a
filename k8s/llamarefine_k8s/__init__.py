"""The launcher: runs the stages as processes on this machine or as Jobs on a Kubernetes cluster."""
