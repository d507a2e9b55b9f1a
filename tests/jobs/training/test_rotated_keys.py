"""The bucket's keys are replaced during a training: it waits for the next ones, and ends with the same bytes."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from llamarefine_jobs.contract.artifact import Manifest
from llamarefine_jobs.contract.environment import BUCKET_KEYS, GIVE_UP_VARIABLE
from llamarefine_jobs.store import Store
from tests import s3_server
from tests.jobs import processes, tiny

URI = "s3://rotated"
STOPPED_AT_STEP = 6


def published(store: Store) -> Manifest:
    """Return the only artifact of sft."""
    (key,) = {entry.path.split("/")[2] for entry in store.entries("artifacts/sft/")}
    manifest = store.manifest("sft", key)
    assert manifest
    return manifest


def test_a_training_whose_keys_are_replaced_ends_with_the_same_adapter(
    tmp_path: Path, rotating_minio: s3_server.RotatingMinio, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The former keys are refused from step 6 on; the new ones come only after the last step."""
    (tmp_path / "recipe.yaml").write_text(tiny.RECIPE)
    undisturbed, in_bucket = Store(str(tmp_path / "store")), Store(URI)
    prepared = tiny.write_prepared(tmp_path / "prepared")
    for store in (undisturbed, in_bucket):
        tiny.publish_prepared(store, prepared, tiny.recipe())
    exit_code, lines = processes.run("sft", tmp_path / "recipe.yaml", undisturbed.uri)
    assert exit_code == 0, "\n".join(lines)

    monkeypatch.setenv(BUCKET_KEYS, str(tmp_path / "keys"))
    rotating_minio.write_keys(tmp_path / "keys")
    process = processes.start(
        "sft",
        tmp_path / "recipe.yaml",
        URI,
        *("--set", "sft.checkpoint_every_steps=2"),
        environment={GIVE_UP_VARIABLE: "300"},
    )
    try:
        lines = rotate_during(process, rotating_minio, tmp_path / "keys")
    finally:
        process.kill()
    assert process.returncode == 0, "\n".join(lines)
    in_bucket = Store(URI)  # reads the new keys
    assert [(file.path, file.sha256) for file in published(in_bucket).files] == [
        (file.path, file.sha256) for file in published(undisturbed).files
    ]
    assert not list(in_bucket.entries("checkpoints/")), "checkpoints are left after their training"
    notices = [line for line in lines if "refuses these credentials (InvalidAccessKeyId)" in line]
    assert len(notices) == 1, "\n".join(lines)
    assert notices[0].endswith("retrying for up to 300 s")
    assert any("continues after an outage" in line for line in lines)
    assert not any(rotating_minio.secret in line for line in lines)


def rotate_during(process: "subprocess.Popen[str]", server: s3_server.RotatingMinio, keys: Path) -> list[str]:
    """Replace the server's keys while the training stands still, and the files once it has met the refusal."""
    lines = []
    assert process.stdout
    for line in process.stdout:
        lines.append(line.rstrip())
        if processes.step(line) == STOPPED_AT_STEP:
            process.send_signal(signal.SIGSTOP)
            os.waitid(os.P_PID, process.pid, os.WSTOPPED)
            server.rotate()
            process.send_signal(signal.SIGCONT)
        if "refuses these credentials" in line:
            server.write_keys(keys)
    process.wait(timeout=60)
    return lines
