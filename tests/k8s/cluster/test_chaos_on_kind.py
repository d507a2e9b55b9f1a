"""A short form of `make chaos-kind`: the API server is killed and a stage's pod evicted during runs."""

import os
from pathlib import Path

import pytest

from tests.chaos.on_kind import run_trials
from tests.chart.kind_cluster import KindCluster

pytestmark = pytest.mark.skipif(
    not os.environ.get("LLAMAREFINE_E2E"), reason="builds images and takes minutes: `make e2e` runs it"
)
CASES = (("nothing", "step"), ("evict stage", "checkpoint"), ("kill API server", "step"))


def test_an_eviction_and_a_killed_api_server_do_not_change_what_a_run_makes(
    kind_cluster: KindCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.setenv(name, "")  # so that pytest restores what `run_trials` sets
    report = run_trials(kind_cluster, tmp_path, 1, CASES, parallel=2)
    assert [trial for trial in report["trials"] if trial["finding"]] == []
    assert [trial["fault"] for trial in report["trials"]] == [fault for fault, _ in CASES]
    evicted = report["trials"][1]
    assert evicted["stage_pods"] == 2
    assert len(evicted["content"]) > 5
