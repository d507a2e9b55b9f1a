"""Measure how long a checkpoint interrupts a training: published in the callback, or uploaded in the background.

    PYTHONPATH=. python tests/bench/checkpoints.py

The checkpoint has the size of TinyLlama's with rank 16 on all linear layers (adapter, best adapter, optimizer). Prints
the median and the longest of 5 measurements, for a store in a folder and for one in a bucket of the tests' S3 server,
and how an upload slows the training down: matrix products per second, alone and during an upload.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests import s3_server
from tests.store import samples

from llamarefine_jobs.store import Store
from llamarefine_jobs.training.checkpoints import Checkpoint, CheckpointUploader

ADAPTER_BYTES = 50_500_000  # 12.6 M parameters in fp32
FILES = {"adapter_model.safetensors": 1, "best/adapter_model.safetensors": 1, "optimizer.pt": 2}  # x ADAPTER_BYTES
TIMES = 5


def write_checkpoint(folder: Path, step: int) -> Checkpoint:
    """Write a checkpoint of random bytes."""
    for name, times in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(os.urandom(ADAPTER_BYTES * times))
    return Checkpoint(step, folder, samples.draft())


def measure(store: Store, folder: Path) -> None:
    """Print how long both ways interrupt the training, and how long the upload takes."""
    checkpoints = CheckpointUploader(store, print)
    published_s, handed_over_s, uploaded_s = [], [], []
    for step in range(1, 2 * TIMES, 2):
        first, second = write_checkpoint(folder / "first", step), write_checkpoint(folder / "second", step + 1)
        published_s.append(seconds(lambda made=first: checkpoints.upload_now(made)))
        handed_over_s.append(seconds(lambda made=second: checkpoints.upload_in_background(made)))
        uploaded_s.append(seconds(checkpoints.wait))
    results = {"published in the callback": published_s, "handed over": handed_over_s, "its upload": uploaded_s}
    for name, figures in results.items():
        print(f"  {name:27} median {statistics.median(figures):.4f} s  longest {max(figures):.4f} s")
    alone = products_per_s(lambda: True, limit_s=5)
    checkpoints.upload_in_background(write_checkpoint(folder / "busy", 2 * TIMES + 1))
    during = products_per_s(lambda: checkpoints.newest_step != 2 * TIMES + 1)
    checkpoints.wait()
    print(f"  matrix products per second: {alone:.1f} alone, {during:.1f} during an upload")


def seconds(act: Callable[[], object]) -> float:
    """Return the wall seconds that `act` takes."""
    began_s = time.perf_counter()
    act()
    return time.perf_counter() - began_s


def products_per_s(is_going_on: Callable[[], bool], limit_s: float = 600) -> float:
    """Return the matrix products computed per second while `is_going_on()` returns True."""
    import torch

    torch.set_num_threads(1)
    matrix, done, began_s = torch.rand(512, 512), 0, time.perf_counter()
    while is_going_on() and time.perf_counter() - began_s < limit_s:
        matrix @ matrix
        done += 1
    return done / (time.perf_counter() - began_s)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as here, s3_server.serve() as server:
        os.environ.update(server.environment)
        import boto3

        boto3.client("s3").create_bucket(Bucket="bench")
        size_mb = ADAPTER_BYTES * sum(FILES.values()) / 1e6
        for where in (f"{here}/store", "s3://bench/checkpoints"):
            print(f"{size_mb:.0f} MB to {server.name if where.startswith('s3') else 'a folder'}")
            measure(Store(where), Path(here))
