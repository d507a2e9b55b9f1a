"""Submit a run to the cluster: upload its files, pin its recipe, create its driver Job and follow it."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llamarefine_jobs.contract.artifact import artifact_key
from llamarefine_jobs.contract.errors import AccessError, LlamaRefineError, PreemptedError, RecipeError
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.stages import SEQUENCE
from llamarefine_jobs.sources import fingerprints, locations, pinning
from llamarefine_jobs.sources.fingerprints import IMAGE_PREFIX
from llamarefine_jobs.sources.locations import DOCSTRINGS, Kind
from llamarefine_jobs.store import Store
from llamarefine_k8s import settings
from llamarefine_k8s.cluster import KubeObject, run_status
from llamarefine_k8s.cluster.api import Cluster
from llamarefine_k8s.cluster.executor import ClusterExecutor
from llamarefine_k8s.cluster.job_feed import JobFeed
from llamarefine_k8s.cluster.manifests import (
    SETTINGS_MAP,
    driver_job,
    gpus_of,
    owner_reference,
    run_config_map,
    stage_job,
    stage_service,
)
from llamarefine_k8s.cluster.reasons import how_it_ended
from llamarefine_k8s.cluster.run_objects import is_active, put_run_config_map, release_owner, require_own
from llamarefine_k8s.cluster.watchdog import StartWatchdog, abandon_lost_pods
from llamarefine_k8s.runs.garbage import INPUT_GRACE
from llamarefine_k8s.runs.pipeline import Pipeline, RunObserver, Task
from llamarefine_k8s.runs.records import DRIVER_RUN, RunRecord, run_id
from llamarefine_k8s.settings import DRIVER, Settings

Report = Callable[[str], None]
_POLL_S = 0.2
_CONFIG_MAP_S = 5.0  # a `submit` that created a driver Job creates its ConfigMap within this time
INSTALL = "install the chart (`helm install llamarefine charts/llamarefine`), or name its namespace by --namespace"


def load_settings(cluster: Cluster, given_file: Path | None, **given: Any) -> Settings:
    """Return the settings for a cluster: the chart's, overridden by the file's, overridden by `given`.

    If `given_file` is not None, the chart's settings are ignored. Raises AccessError or RecipeError if the settings
    name no bucket.
    """
    file = given_file or settings.default_file()
    values = settings.read_file(file)
    origin = str(file)
    if given_file is None:
        config_map = cluster.get("ConfigMap", SETTINGS_MAP)
        text = (config_map or {}).get("data", {}).get("llamarefine.yaml", "")
        origin = f"{file}, or the ConfigMap {SETTINGS_MAP}"
        values = settings.read_text(text, f"ConfigMap {SETTINGS_MAP}") | values
        if not config_map and not (given.get("store") or values.get("store")):
            raise AccessError(
                f"namespace {cluster.namespace} has no ConfigMap {SETTINGS_MAP}, so no bucket is known: {INSTALL}, "
                "or give --store"
            )
    found = settings.parse(values, origin, **given)
    if not found.store.startswith("s3://"):
        raise RecipeError(
            f"store {found.store}: pods cannot reach a folder on this machine; expected s3://bucket/prefix"
        )
    return found


def is_in_cluster() -> bool:
    """Whether this process runs in a pod: the chart's test, or a driver whose run a person already submitted."""
    return "KUBERNETES_SERVICE_HOST" in os.environ


def pin_for_cluster(recipe: Recipe, given: Settings, report: Report, *, upload: bool = True) -> Recipe:
    """Upload the recipe's local files to the bucket, under their sha256, and return the pinned recipe.

    The pinned recipe names the uploaded files. They keep their local fingerprint, so their artifacts keep their
    keys. `python-docstrings` is pinned to the prepare image, because the Python in it may differ from the one here.
    With `upload=False` only the pinned recipe is computed. Each upload is reported.
    """
    pinned = {}
    for name, source in recipe.sources().items():
        kind = locations.kind(source.source, hub_id_allowed=name == "base")
        changes: dict[str, str] = {}
        if kind is Kind.PATH:
            fingerprint = pinning.fingerprint(source.source, kind, f"prepare.{name}.source") or ""
            path = locations.local_path(source.source)
            target = f"inputs/{fingerprint.rpartition(':')[2]}/{path.name}"
            if upload:
                _upload(Store(given.store), path, target, report)
            changes = {"source": f"{given.store.rstrip('/')}/{target}", "fingerprint": fingerprint}
        elif source.source == DOCSTRINGS:
            changes = {"fingerprint": IMAGE_PREFIX + given.image("prepare")}
        pinned[name] = type(source).model_validate(source.model_dump() | changes)
    return pinning.pin(recipe.with_sources(pinned))


def _upload(store: Store, path: Path, target: str, report: Report) -> None:
    """Upload a file, or a folder's files, unless they are in the bucket already; `target` contains their sha256.

    Files that gc will soon consider old are uploaded again: gc does not know a run that has not begun.
    """
    fresh_since = store.now() - INPUT_GRACE / 2
    uploaded = {
        entry.path: entry.size_bytes
        for entry in store.entries(target)
        if entry.modified_at is None or entry.modified_at > fresh_since
    }
    for file in sorted(fingerprints.files_below(path)) if path.is_dir() else [path]:
        file_target = target if file == path else f"{target}/{file.relative_to(path).as_posix()}"
        size_bytes = file.stat().st_size
        if uploaded.get(file_target) != size_bytes:
            report(f"uploads {file.name}, {size_bytes / 1e6:.1f} MB")
            store.objects.upload(file_target, file, lambda chunk: None)


def objects_of(recipe: Recipe, given: Settings, *, foreground: bool = False) -> list[KubeObject]:
    """Return every object that a run would create, for a dry run.

    The artifact keys after the first stage are zeros: a stage's key is known only once its parents are made.
    """
    run = run_id(recipe)
    keys = dict.fromkeys(SEQUENCE, "0" * 64) | {SEQUENCE[0]: artifact_key(SEQUENCE[0], recipe, {})}
    tasks = [Task(run, stage, keys[stage], recipe, given.store) for stage in SEQUENCE]
    stages = [each for task in tasks for each in (stage_service(task), stage_job(task, given)) if each]
    return [run_config_map(run, recipe, given), *([] if foreground else [driver_job(run, given)]), *stages]


def start(
    cluster: Cluster, recipe: Recipe, given: Settings, report: Report, *, cancel: str = "llamarefine cancel"
) -> KubeObject:
    """Return the driver Job of a run: the active one, or a new one in place of what an earlier one left.

    Of several submits, the one that creates the Job decides the settings; the others attach to it. What is removed was
    listed before there was an active Job, and a driver's objects are all created after its Job: so no submit removes
    what another one made. `cancel` is the command that cancels the run, for the advice in reported lines.
    """
    check_gpus(recipe, given)
    run = run_id(recipe)
    left = run_status.objects_of_run(cluster, run)
    job = cluster.get("Job", run)
    if job is None or not is_active(job):
        run_status.remove(cluster, run, left)
        created = cluster.create(driver_job(run, given, release_owner(cluster)))
        if created:
            _create_config_map(cluster, created, recipe, given)
            return created
        job = cluster.get("Job", run)
        if job is None or not is_active(job):
            raise LlamaRefineError(f"the Job {run} ended or was deleted while this submit started; submit again")
    require_own(job, run)
    cluster.dry_run_create(run_config_map(run, recipe, given))  # refused in a namespace that is being deleted
    report("runs already; this attaches to it")
    if _submitted_data(cluster, job, recipe, given) != run_config_map(run, recipe, given)["data"]:
        report(f"it keeps the settings it was submitted with; to change them, `{cancel}` first")
    return job


def _create_config_map(cluster: Cluster, job: KubeObject, recipe: Recipe, given: Settings) -> KubeObject:
    """Create the ConfigMap that a new driver Job mounts, and return it. If it is refused, the Job is deleted again."""
    name, uid = job["metadata"]["name"], job["metadata"]["uid"]
    try:
        return put_run_config_map(cluster, run_config_map(name, recipe, given, owner_reference("Job", name, uid)))
    except LlamaRefineError:
        cluster.delete("Job", name, uid=uid)
        raise


def _submitted_data(cluster: Cluster, job: KubeObject, recipe: Recipe, given: Settings) -> dict[str, str]:
    """Return the recipe and the settings with which an active driver was submitted.

    Creates its ConfigMap if the `submit` that created the Job did not live long enough to do so.
    """
    until_s = time.monotonic() + _CONFIG_MAP_S
    while (config_map := cluster.get("ConfigMap", job["metadata"]["name"])) is None and time.monotonic() < until_s:
        time.sleep(_POLL_S)
    data: dict[str, str] = (config_map or _create_config_map(cluster, job, recipe, given))["data"]
    return data


def follow(cluster: Cluster, job: KubeObject, given: Settings, report: Report) -> None:
    """Report the driver's log lines until it ends; raises the error that ended the run.

    Only reads the log and abandons pods of lost nodes: Ctrl-C does not stop the run.
    """
    with JobFeed(cluster, job, DRIVER) as feed:
        watchdog = StartWatchdog(cluster, given.start_timeout_s, DRIVER)
        while not feed.is_over:
            for line in feed.lines(_POLL_S):
                if not line.startswith("error: "):  # it is raised below
                    report(line)
            if not feed.is_over:
                watchdog.check(feed, report)
                abandon_lost_pods(cluster, feed, report)
        if feed.has_failed:
            raise how_it_ended(DRIVER, feed.job, list(feed.pods.values()))
        if not feed.has_succeeded:
            raise LlamaRefineError(f"the run was removed from the cluster: there is no Job {job['metadata']['name']}")


def drive(cluster: Cluster, recipe: Recipe, given: Settings, observer: RunObserver) -> RunRecord:
    """Drive a run from this process, with a Job for each stage, and return its record.

    The Job of a failed stage stays in the cluster for inspection.
    """
    check_gpus(recipe, given)
    executor = ClusterExecutor(cluster, given)
    store = Store(given.store, given.retry_policy(lambda text: observer.note(DRIVER, text)))
    # The Job's controller has already retried every retryable error that arrives here.
    pipeline = Pipeline(recipe, store, executor, observer, retry_after_s=())
    try:
        record = pipeline.drive()
    except PreemptedError:
        executor.clear()
        raise
    executor.clear()
    return record


def check_gpus(recipe: Recipe, given: Settings) -> None:
    """Raise RecipeError if recipe and settings name different numbers of GPUs, before anything is created."""
    for stage in SEQUENCE:
        gpus_of(recipe, stage, given)


def require_driver_of(run: str) -> None:
    """Raise RecipeError in a driver's pod whose recipe is not that of the run for which the driver was created."""
    expected = os.environ.get(DRIVER_RUN, run)
    if run != expected:
        raise RecipeError(
            f"this driver was created for the run {expected}, but its recipe is that of {run}: was the ConfigMap "
            f"{expected} replaced, or does the launcher's image have another version than the launcher that submitted "
            "it? Cancel the run and submit it again"
        )


def require_account(cluster: Cluster, name: str) -> None:
    """Raise AccessError if the driver's service account does not exist: its Job could not create a pod."""
    try:
        account = cluster.get("ServiceAccount", name)
    except AccessError:
        return  # the user may not read it; the Job's events report a missing account
    if account is None:
        raise AccessError(f"namespace {cluster.namespace} has no service account {name}: {INSTALL}")
