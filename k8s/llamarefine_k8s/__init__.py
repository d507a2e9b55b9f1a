"""What talks to Kubernetes, and to this machine: the launcher."""
