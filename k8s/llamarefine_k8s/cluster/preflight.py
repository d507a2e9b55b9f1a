"""Prove a run before a GPU is held: each part looked at once, one line each, on after whatever is wrong.

What the asker may not look at is said, not failed: the stages' own events tell it later, in `llamarefine status`.
"""

import contextlib
import shutil
import subprocess
from collections.abc import Callable, Generator, Iterator

from llamarefine_jobs.contract.artifact import artifact_path, short
from llamarefine_jobs.contract.errors import AccessError, DataError, LlamaRefineError, StoreError
from llamarefine_jobs.contract.prompt import TEMPLATE_SHA256
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.data.columns import columns_of, missing_columns_error
from llamarefine_jobs.sources import locations, pinning
from llamarefine_jobs.sources.locations import Kind
from llamarefine_jobs.store import Store
from llamarefine_k8s.cluster import access, placement, submission
from llamarefine_k8s.cluster.api import Cluster
from llamarefine_k8s.cluster.manifests import SETTINGS_MAP
from llamarefine_k8s.runs import gpu_memory, local_executor
from llamarefine_k8s.runs.bucket_probe import check_store
from llamarefine_k8s.runs.checks import Check, fail, ok, warning
from llamarefine_k8s.runs.plan import plan
from llamarefine_k8s.settings import Settings


def check_local(recipe: Recipe | None, given: Settings) -> Iterator[Check]:
    """What `run` needs on this machine."""
    missing = local_executor.missing_libraries()
    if missing:
        yield fail("libraries", f"{', '.join(missing)} not installed, so no stage can run here", local_executor.INSTALL)
    else:
        yield ok("libraries", "what stages stand on is installed")
    yield from check_store(given.store)
    if recipe:
        yield from check_sources(recipe)
        pinned = yield from _pinned(lambda: pinning.pin(recipe))
        if pinned:
            yield from _standing(pinned, given.store)
            yield from _own_card(pinned, given.store)


def check_cluster(
    recipe: Recipe | None, connect: Callable[[], Cluster], find: Callable[[Cluster], Settings], store: str | None = None
) -> Iterator[Check]:
    """What `submit` needs. `connect` reaches the cluster, `find` reads the settings that hold there.

    `store` is the bucket, where it is known without them.
    """
    given, cluster, pinned = None, None, None
    try:
        cluster = connect()
        yield from access.check_access(cluster)
        namespace = _namespace(cluster)
        yield namespace
        given = find(cluster) if namespace.state != "FAIL" else None
    except LlamaRefineError as error:
        yield fail("cluster", str(error))
    if cluster and given:
        yield from _accounts(cluster, given)
    if recipe:
        yield from check_sources(recipe)
    uri = given.store if given else store
    if uri:
        yield from check_store(uri)
    if recipe and given:
        pinned = yield from _pinned(lambda: submission.bring_sources(recipe, given, lambda text: None, upload=False))
    if pinned and given:
        yield from _standing(pinned, given.store)
    if cluster and given:
        needed = gpu_memory.estimates(recipe, given.store) if recipe else {}
        yield from _guarded("objects", placement.check_placement(cluster, given, pinned, needed))


def check_sources(recipe: Recipe) -> Iterator[Check]:
    """The head of each table, where it can be read from here: are the columns that the recipe names in it?"""
    for name, rows in (("questions", recipe.prepare.questions), ("preferences", recipe.prepare.preferences)):
        key = f"prepare.{name}"
        named = {field: value for field, value in rows if field.endswith("_column")}
        try:
            there = columns_of(rows, key)
        except LlamaRefineError as error:
            yield fail(name, str(error))
            continue
        missing = [value for value in named.values() if there is not None and value not in there]
        if there is None:
            where = locations.kind(rows.source)
            said = "made on the spot" if where is Kind.BUILT_IN else "not looked at from here; prepare checks it first"
            yield (ok if where is Kind.BUILT_IN else warning)(name, f"{rows.source}: {said}")
        elif missing == [named.get("prompt_column")]:
            text = f"{rows.source} has no column `{missing[0]}`"
            yield warning(name, text, "right where the other two hold whole dialogues")
        elif missing:
            yield fail(name, str(missing_columns_error(key, rows.source, missing, there)))
        else:
            yield ok(name, f"{rows.source} has the columns {', '.join(named.values())}")
    yield from _base(recipe)


def _pinned(pin: Callable[[], Recipe]) -> Generator[Check, None, Recipe | None]:
    """The pinned recipe, or the check that says why it cannot be pinned: what is missing was told before."""
    try:
        return pin()
    except (DataError, AccessError):
        return None
    except LlamaRefineError as error:
        yield fail("plan", str(error))
        return None


def _standing(recipe: Recipe, uri: str) -> Iterator[Check]:
    """What the store has of the run already, rendered with this version's chat template."""
    try:
        store = Store(uri)
        planned = plan(recipe, store)
        found = [store.manifest(stage.stage, stage.key) for stage in planned if stage.key]
    except LlamaRefineError as error:
        yield fail("plan", str(error))
        return
    for manifest in found:
        if manifest and manifest.prompt_template_sha256 != TEMPLATE_SHA256:
            yield fail(
                "chat template",
                f"{manifest.stage} {short(manifest.key)} was made with the template "
                f"{short(manifest.prompt_template_sha256)}, this version uses {short(TEMPLATE_SHA256)}",
                f"remove {uri}/{artifact_path(manifest.stage, manifest.key)}: it is made anew",
            )
    there = ", ".join(stage.stage for stage in planned if stage.state == "there")
    due = ", ".join(stage.stage for stage in planned if stage.state != "there")
    told = f"{there} in the store already" if there else "nothing in the store yet"
    yield ok("plan", f"{told}; {f'{due} will run' if due else 'nothing to run'}")


def _base(recipe: Recipe) -> Iterator[Check]:
    """The base's config, where it can be read from here."""
    base = recipe.prepare.base
    try:
        config = gpu_memory.base_config(base)
    except (StoreError, AccessError) as error:  # a gated model, or no way out of here: prepare has its own
        yield warning("base", str(error), "not looked at from here; prepare checks it first")
        return
    except LlamaRefineError as error:
        yield fail("base", str(error))
        return
    if config is None:
        yield ok("base", f"{base.source}: made on the spot")
    elif "model_type" not in config:
        yield fail("base", f"{base.source}: its config.json names no model_type", "give a model's folder or Hub id")
    else:
        yield ok("base", f"{base.source}: a {config['model_type']} model")


def _guarded(name: str, checks: Iterator[Check]) -> Iterator[Check]:
    """The checks, and one that says what ended them."""
    try:
        yield from checks
    except LlamaRefineError as error:
        yield fail(name, str(error))


def _namespace(cluster: Cluster) -> Check:
    """The namespace is there, and what the chart brings is in it."""
    with contextlib.suppress(AccessError):  # not ours to look at: what follows tells
        if cluster.get("Namespace", cluster.namespace) is None:
            return fail("namespace", f"there is no namespace {cluster.namespace}", "create it, or name another by -n")
    if cluster.get("ConfigMap", SETTINGS_MAP):
        return ok("chart", f"its ConfigMap {SETTINGS_MAP} is in namespace {cluster.namespace}")
    return warning("chart", f"namespace {cluster.namespace} has no ConfigMap {SETTINGS_MAP}", submission.INSTALL)


def _accounts(cluster: Cluster, given: Settings) -> Iterator[Check]:
    """The service accounts of driver and stages, and what the driver may do."""
    names = [name for name in (given.service_account, given.stage_service_account) if name]
    try:
        missing = [name for name in names if cluster.get("ServiceAccount", name) is None]
    except LlamaRefineError as error:
        yield fail("service accounts", str(error))
        return
    if missing:
        text = f"namespace {cluster.namespace} has no service account {', '.join(missing)}"
        yield fail("service accounts", text, submission.INSTALL)
        return
    yield ok("service accounts", f"{' and '.join(names)} there")
    yield from _guarded("driver's permissions", access.check_driver(cluster, given.service_account))


def _own_card(recipe: Recipe, uri: str) -> Iterator[Check]:
    """The estimates beside this machine's smallest GPU, where it has one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return
    asked = [program, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return  # a driver in trouble: the stage says so
    sizes = [int(line) << 20 for line in done.stdout.split() if line.isdecimal()]
    for stage, needed in gpu_memory.estimates(recipe, uri).items() if sizes else ():
        yield gpu_memory.check_card(stage, needed, min(sizes), "of this machine's GPU")
