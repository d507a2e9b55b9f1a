"""How long a training stands still for a checkpoint: published in its callback, or uploaded beside the training.

PYTHONPATH=. python tests/bench/checkpoints.py

The checkpoint has the size of one of TinyLlama with rank 16 on all linear layers (adapter, best adapter, optimizer).
Median and worst of 5, in a folder and in a bucket of the tests' S3 server, and what a busy training loses beside an
upload: products of matrices a second, alone and during one.
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
from llamarefine_jobs.training.checkpoints import Checkpoint, Checkpoints

ADAPTER_BYTES = 50_500_000  # 12.6 M parameters in fp32
FILES = {"adapter_model.safetensors": 1, "best/adapter_model.safetensors": 1, "optimizer.pt": 2}  # x ADAPTER_BYTES
TIMES = 5


def make(folder: Path, step: int) -> Checkpoint:
    """A checkpoint on the disk."""
    for name, times in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(os.urandom(ADAPTER_BYTES * times))
    return Checkpoint(step, folder, samples.draft())


def measure(store: Store, folder: Path) -> None:
    """Print the stalls of both ways, and how long the upload took."""
    checkpoints = Checkpoints(store, print)
    waited, stood, uploaded = [], [], []
    for step in range(1, 2 * TIMES, 2):
        first, second = make(folder / "first", step), make(folder / "second", step + 1)
        waited.append(seconds(lambda made=first: checkpoints.publish(made)))
        stood.append(seconds(lambda made=second: checkpoints.offer(made)))
        uploaded.append(seconds(checkpoints.settle))
    for name, figures in {"published in the callback": waited, "handed over": stood, "its upload": uploaded}.items():
        print(f"  {name:27} median {statistics.median(figures):.4f} s  worst {max(figures):.4f} s")
    alone = products_per_s(lambda: True, limit_s=5)
    checkpoints.offer(make(folder / "busy", 2 * TIMES + 1))
    beside = products_per_s(lambda: checkpoints.newest_step != 2 * TIMES + 1)
    checkpoints.settle()
    print(f"  products of matrices a second: {alone:.1f} alone, {beside:.1f} beside an upload")


def seconds(act: Callable[[], object]) -> float:
    """Wall seconds that `act` takes."""
    began_s = time.perf_counter()
    act()
    return time.perf_counter() - began_s


def products_per_s(goes_on: Callable[[], bool], limit_s: float = 600) -> float:
    """How often two matrices are multiplied a second while `goes_on`."""
    import torch

    torch.set_num_threads(1)
    matrix, done, began_s = torch.rand(512, 512), 0, time.perf_counter()
    while goes_on() and time.perf_counter() - began_s < limit_s:
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
