"""Measure many runs: `runs` and `status` with 1,000 finished runs in a bucket, and the requests of waiting drivers.

    python tests/bench/scale.py [WAITING_RUNS]

The bucket is MinIO's if the program is on the PATH. The waiting runs (200 by default) use a real API server, if etcd
and kube-apiserver are installed; their drivers are threads of this process.
"""

import contextlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests import s3_server
from tests.k8s import control_plane

from llamarefine_jobs.contract.artifact import run_path
from llamarefine_jobs.contract.errors import LlamaRefineError
from llamarefine_jobs.contract.retry import RetryPolicy
from llamarefine_jobs.contract.stages import SEQUENCE
from llamarefine_jobs.recipe_file import load_recipe
from llamarefine_jobs.store import Store
from llamarefine_k8s.cluster import run_status
from llamarefine_k8s.cluster.api import Cluster
from llamarefine_k8s.cluster.executor import ClusterExecutor
from llamarefine_k8s.cluster.manifests import RUN
from llamarefine_k8s.runs.pipeline import Task
from llamarefine_k8s.runs.records import Driver, RunRecord, StageRecord
from llamarefine_k8s.settings import Settings

LLAMAREFINE = str(Path(sys.executable).parent / "llamarefine")
DEMO = Path(__file__).parents[2] / "jobs/recipes/demo.yaml"
FINISHED, QUIET_S = 1000, 60


def fill(store: Store, count: int = FINISHED) -> None:
    """Write finished runs: the record, the log of each stage and the report that a real run leaves."""
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
    """Return the wall and CPU seconds of `times` runs, each list sorted, after one run that compiles its imports."""
    wall, cpu = [], []
    for _ in range(times + 1):
        began_s, before = time.perf_counter(), os.times()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        after = os.times()
        wall.append(time.perf_counter() - began_s)
        cpu.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return sorted(wall[1:]), sorted(cpu[1:])


def measure_bucket() -> None:
    """Print how long `runs` and `status` take with many finished runs."""
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
                f"(CPU {cpu[0]:.2f} s)"
            )


def measure_drivers(count: int) -> None:
    """Print the requests per second of `count` stages that wait at the same time, and how long `status` takes then."""
    missing = [program for program in control_plane.PROGRAMS if not control_plane.find(program)]
    if missing:
        print(f"waiting runs were not measured: {', '.join(missing)} not found")
        return
    with control_plane.serve() as kubeconfig, tempfile.TemporaryDirectory() as folder:
        os.environ["KUBECONFIG"] = str(kubeconfig)
        os.environ.pop("KUBERNETES_SERVICE_HOST", None)
        cluster, recipe = Cluster(retry_policy=RetryPolicy(120)), load_recipe(DEMO)
        tasks = [Task(f"demo-{n:08x}", "sft", f"{n:064x}", recipe, folder) for n in range(count)]

        def wait_for(task: Task) -> None:
            executor = ClusterExecutor(Cluster(retry_policy=RetryPolicy(120)), Settings(gpu_resource=None))
            with contextlib.suppress(LlamaRefineError):  # raised when its Job and the Job's owner are deleted below
                executor.execute(task, lambda line: None)

        threads = [threading.Thread(target=wait_for, args=(task,), daemon=True) for task in tasks]
        for thread in threads:
            thread.start()
        while len(cluster.objects("Job", labels=RUN)) < count:
            time.sleep(1)
        time.sleep(QUIET_S)  # so that the requests of the start are not counted
        before, began_s = requests(cluster), time.monotonic()
        time.sleep(QUIET_S)  # the time of the measurement
        sent, seconds = requests(cluster) - before, time.monotonic() - began_s
        print(f"{count} stages wait: {sent / seconds:.1f} requests/s, load {os.getloadavg()[0]:.1f}")
        wall, cpu = look_s(cluster, tasks[-1].run)
        print(f"  status of one run: median {wall:.2f} s (CPU {cpu:.2f} s)")
        for task in tasks:
            cluster.delete("ConfigMap", task.run)  # the Job's owner: without it the Job is not created again
            cluster.delete("Job", f"{task.run}-sft")
        for thread in threads:
            thread.join(60)


def look_s(cluster: Cluster, run: str, times: int = 5) -> tuple[float, float]:
    """Return the median wall and CPU seconds of finding a run and its state, as `status` does."""
    wall, cpu = [], []
    for _ in range(times):
        began_s, before_s = time.perf_counter(), time.thread_time()
        run_status.stage_statuses(cluster, run_status.find_run(cluster, run))
        wall.append(time.perf_counter() - began_s)
        cpu.append(time.thread_time() - before_s)
    return statistics.median(wall), statistics.median(cpu)


def requests(cluster: Cluster) -> float:
    """Return how many requests for the launcher's kinds of objects the API server has answered."""
    text = cluster._requests.call("GET", "/metrics").data.decode()
    counter = r'^apiserver_request_total{[^}]*resource="(?:jobs|pods|events|configmaps)"[^}]*} (\S+)$'
    return sum(float(found) for found in re.findall(counter, text, re.MULTILINE))


if __name__ == "__main__":
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # with it, each process would compile 500 modules in 0.7 s
    measure_bucket()
    measure_drivers(int(sys.argv[1]) if len(sys.argv) > 1 else 200)
