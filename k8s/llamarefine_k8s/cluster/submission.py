"""Bring a run to the cluster: its files into the bucket, its recipe pinned, its driver made and followed."""

import os
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
from llamarefine_k8s.cluster import run_status
from llamarefine_k8s.cluster.api import Cluster, Object
from llamarefine_k8s.cluster.executor import (
    ClusterExecutor,
    Start,
    abandon_lost_pods,
    is_at_work,
    put_run_config_map,
    release_of,
)
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
from llamarefine_k8s.commands.display import Display
from llamarefine_k8s.commands.terminal import command
from llamarefine_k8s.runs.garbage import INPUT_GRACE
from llamarefine_k8s.runs.pipeline import Pipeline, Task
from llamarefine_k8s.runs.records import RunRecord, run_id
from llamarefine_k8s.settings import DRIVER, Settings

Say = Callable[[str], None]
_GLANCE_S = 0.2
INSTALL = "install the chart (`helm install llamarefine charts/llamarefine`), or name its namespace by --namespace"


def load_settings(cluster: Cluster, given_file: Path | None, **given: Any) -> Settings:
    """The settings for a cluster: those that the chart brought, under the file's, under what is `given`.

    A file that was named stands alone. Raises where they name no bucket.
    """
    file = given_file or settings.default_file()
    values = settings.read_file(file)
    where = str(file)
    if given_file is None:
        brought = cluster.get("ConfigMap", SETTINGS_MAP)
        text = (brought or {}).get("data", {}).get("llamarefine.yaml", "")
        where = f"{file}, or the ConfigMap {SETTINGS_MAP}"
        values = settings.read_text(text, f"ConfigMap {SETTINGS_MAP}") | values
        if not brought and not (given.get("store") or values.get("store")):
            raise AccessError(
                f"namespace {cluster.namespace} has no ConfigMap {SETTINGS_MAP}, so no bucket is known: {INSTALL}, "
                "or give --store"
            )
    found = settings.parse(values, where, **given)
    if not found.store.startswith("s3://"):
        raise RecipeError(
            f"store {found.store}: pods cannot reach a folder of this machine; expected s3://bucket/prefix"
        )
    return found


def is_in_cluster() -> bool:
    """Whether this process is a pod: the chart's, or a driver, that does what a person has decided."""
    return "KUBERNETES_SERVICE_HOST" in os.environ


def bring_sources(recipe: Recipe, given: Settings, say: Say, *, upload: bool = True) -> Recipe:
    """`recipe` pinned for a cluster: local files are in the bucket, by their sha256.

    An uploaded file keeps the fingerprint it has here, so its artifacts keep their keys. The docstrings of
    `python-docstrings` are those of the image that reads them, whatever Python runs here.
    """
    pinned = {}
    for name, source in recipe.sources().items():
        where = locations.kind(source.source, hub_id_allowed=name == "base")
        changes: dict[str, str] = {}
        if where is Kind.PATH:
            found = pinning.fingerprint(source.source, where, f"prepare.{name}.source") or ""
            path = locations.local_path(source.source)
            place = f"inputs/{found.rpartition(':')[2]}/{path.name}"
            if upload:
                _upload(Store(given.store), path, place, say)
            changes = {"source": f"{given.store.rstrip('/')}/{place}", "fingerprint": found}
        elif source.source == DOCSTRINGS:
            changes = {"fingerprint": IMAGE_PREFIX + given.image("prepare")}
        pinned[name] = type(source).model_validate(source.model_dump() | changes)
    return pinning.pin(recipe.with_sources(pinned))


def _upload(store: Store, path: Path, place: str, say: Say) -> None:
    """Bring a file, or a folder's files, into the bucket, unless it is there: its name is its content.

    What will soon be old enough for gc, which cannot know of a run that has not begun, is brought again.
    """
    kept_since = store.now() - INPUT_GRACE / 2
    there = {
        entry.path: entry.size_bytes
        for entry in store.entries(place)
        if entry.modified_at is None or entry.modified_at > kept_since
    }
    for file in sorted(fingerprints.files_below(path)) if path.is_dir() else [path]:
        target = place if file == path else f"{place}/{file.relative_to(path).as_posix()}"
        size_bytes = file.stat().st_size
        if there.get(target) != size_bytes:
            say(f"uploads {file.name}, {size_bytes / 1e6:.1f} MB")
            store.objects.upload(target, file, lambda chunk: None)


def objects_of(recipe: Recipe, given: Settings, *, foreground: bool = False) -> list[Object]:
    """Everything that a run would bring into being. A stage's key is known only once its parents are made."""
    run = run_id(recipe)
    keys = dict.fromkeys(SEQUENCE, "0" * 64) | {SEQUENCE[0]: artifact_key(SEQUENCE[0], recipe, {})}
    tasks = [Task(run, stage, keys[stage], recipe, given.store) for stage in SEQUENCE]
    stages = [made for task in tasks for made in (stage_service(task), stage_job(task, given)) if made]
    return [run_config_map(run, recipe, given), *([] if foreground else [driver_job(run, given)]), *stages]


def start(cluster: Cluster, recipe: Recipe, given: Settings, say: Say) -> Object:
    """The driver Job of a run: the one that is at work, or a new one in place of what an earlier one left."""
    check_gpus(recipe, given)
    run = run_id(recipe)
    there, wanted = cluster.get("Job", run), run_config_map(run, recipe, given)
    if there and is_at_work(there):
        say("runs already; this attaches to it")
        known = cluster.get("ConfigMap", run)
        if known and known["data"] != wanted["data"]:
            say(f"it goes on with the settings it began with; for other ones, `{command()} cancel {run}` first")
        return there
    if run_status.of_run(cluster, run):
        run_status.remove(cluster, run)
    put_run_config_map(cluster, wanted)
    made = cluster.create(driver_job(run, given, release_of(cluster))) or cluster.get("Job", run)
    if made is None:
        raise LlamaRefineError(f"the Job {run} was removed while it started; submit again")
    owner = owner_reference("Job", run, made["metadata"]["uid"])
    cluster.patch("ConfigMap", run, {"metadata": {"ownerReferences": [owner]}})
    return made


def follow(cluster: Cluster, job: Object, given: Settings, say: Say) -> None:
    """Give the driver's lines to `say` until it ends; raises what ended the run. Only looks: a Ctrl-C stops nothing."""
    with JobFeed(cluster, job, DRIVER) as feed:
        watchdog = Start(cluster, given.start_timeout_s, DRIVER)
        while not feed.is_over:
            for line in feed.lines(_GLANCE_S):
                if not line.startswith("error: "):  # it is raised below
                    say(line)
            if not feed.is_over:
                watchdog.check(feed, say)
                abandon_lost_pods(cluster, feed, say)
        if feed.has_failed:
            raise how_it_ended(DRIVER, feed.job, list(feed.pods.values()))
        if not feed.has_succeeded:
            raise LlamaRefineError(f"the run was removed from the cluster: there is no Job {job['metadata']['name']}")


def drive(cluster: Cluster, recipe: Recipe, given: Settings, display: Display) -> RunRecord:
    """Drive a run from this process; its stages are Jobs. The cluster keeps what failed, to be looked at."""
    check_gpus(recipe, given)
    executor = ClusterExecutor(cluster, given)
    store = Store(given.store, given.retry_policy(lambda text: display.note(DRIVER, text)))
    # Whatever may pass by itself was tried again by the Job's controller before it comes here.
    pipeline = Pipeline(recipe, store, executor, display, retry_after_s=())
    try:
        record = pipeline.drive()
    except PreemptedError:
        executor.clear()
        raise
    executor.clear()
    return record


def check_gpus(recipe: Recipe, given: Settings) -> None:
    """Refuse a recipe and settings that name different numbers of GPUs, before anything is made."""
    for stage in SEQUENCE:
        gpus_of(recipe, stage, given)


def require_account(cluster: Cluster, name: str) -> None:
    """Refuse to start a driver that no pod could be made for."""
    try:
        there = cluster.get("ServiceAccount", name)
    except AccessError:
        return  # not ours to look at: the Job's own events tell
    if there is None:
        raise AccessError(f"namespace {cluster.namespace} has no service account {name}: {INSTALL}")
