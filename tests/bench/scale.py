"""Many runs: how long `runs` and `status` take with 1,000 finished runs in a bucket, and what drivers cost.

python tests/bench/scale.py [RUNS_SIDE_BY_SIDE]

The bucket is MinIO's where the program is on the PATH. The API server is a real one (etcd, kube-apiserver) where both
are; its pods are acted by threads of this process, as their stages are. Otherwise it is the tests' own, and says so.
"""

import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests import s3_server

from llamarefine_jobs.contract.artifact import run_path
from llamarefine_jobs.contract.stages import SEQUENCE
from llamarefine_jobs.recipe_file import load_recipe
from llamarefine_jobs.store import Store
from llamarefine_k8s.runs import Driver, RunRecord, StageRecord

LLAMAREFINE = str(Path(sys.executable).parent / "llamarefine")
DEMO = Path(__file__).parents[2] / "jobs/recipes/demo.yaml"
FINISHED = 1000


def fill(store: Store, count: int = FINISHED) -> None:
    """Finished runs as real ones leave them: a record, a log of each stage, a report."""
    recipe = load_recipe(DEMO).model_dump(mode="json")

    def put(number: int) -> None:
        at = datetime.now(UTC) - timedelta(minutes=count - number)
        stage = StageRecord(state="done", key="0" * 64, attempts=1, started_at=at, finished_at=at)
        run = f"demo-{number:08x}"
        record = RunRecord(
            run=run,
            state="done",
            created_at=at,
            updated_at=at,
            driver=Driver(pid=1, host="elsewhere"),
            stages=dict.fromkeys(SEQUENCE, stage),
            recipe=recipe,
        )
        for name in SEQUENCE:
            store.write(run_path(run, "logs", f"{name}.log"), b"a line\n")
        for name in ("report.html", "report.md", "report.json"):
            store.write(run_path(run, "report", name), b"{}")
        store.write(run_path(run, "run.json"), record.model_dump_json(indent=2).encode())

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(put, range(count)))


def measure(command: list[str], environment: dict[str, str], times: int = 5) -> tuple[list[float], list[float]]:
    """Wall and processor seconds of each of `times` runs, sorted."""
    wall, cpu = [], []
    for _ in range(times):
        began_s, before = time.perf_counter(), os.times()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        after = os.times()
        wall.append(time.perf_counter() - began_s)
        cpu.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return sorted(wall), sorted(cpu)


def measure_bucket() -> None:
    """What a person waits for with many finished runs."""
    with s3_server.serve() as server:
        os.environ.update(server.environment)
        store = Store("s3://scale/llama")
        store.objects.client.create_bucket(Bucket="scale")  # type: ignore[union-attr]
        fill(store)
        environment = {**os.environ, "KUBECONFIG": os.devnull, "LLAMAREFINE_STORE": "s3://scale/llama"}
        print(f"{FINISHED} finished runs in {server.name}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
        for words in (["runs"], ["runs", "--limit", "1000"], ["status"], ["status", "demo-000003e7"]):
            wall, cpu = measure([LLAMAREFINE, *words], environment)
            print(
                f"  llamarefine {' '.join(words):22} best {wall[0]:.2f} s  median {statistics.median(wall):.2f} s  "
                f"(processor {cpu[0]:.2f} s)"
            )


if __name__ == "__main__":
    measure_bucket()
