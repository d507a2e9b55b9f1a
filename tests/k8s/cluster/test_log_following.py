"""`llamarefine logs -f` through an outage of the API server."""

import re
from pathlib import Path

import yaml

from llamarefine_jobs.contract.errors import StoreError
from llamarefine_k8s.cluster.manifests import RUN
from tests.k8s.api_server import ApiServer, Fault
from tests.k8s.conftest import Launcher


def test_logs_gives_up_after_the_time_in_the_settings(
    server: ApiServer, launcher: Launcher, s3_uri: str, tmp_path: Path
) -> None:
    run = "small-00000000"
    server.put("jobs", {"metadata": {"name": run, "labels": {RUN: run}}, "spec": {}})
    server.faults = [Fault(r"GET .*/pods\?", status=503, times=10_000)]
    Path("llamarefine.yaml").write_text(yaml.safe_dump({"store": s3_uri, "give_up_after_s": 1}))
    code, _, err = launcher.run("logs", "-f", run, KUBECONFIG=str(server.kubeconfig(tmp_path)))
    assert code == StoreError.exit_code
    assert re.fullmatch(r"error: the API server answered 503: fault 503; gave up after 1 s\n", err)
