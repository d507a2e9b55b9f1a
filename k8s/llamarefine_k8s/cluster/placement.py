"""Checks whether the cluster would accept a run's objects: Secrets, images, admission, quota, nodes, GPU memory."""

import re
from collections.abc import Callable, Iterator, Mapping

from llamarefine_jobs.contract.errors import AccessError, LlamaRefineError, OutOfMemoryError
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.stages import SEQUENCE
from llamarefine_jobs.store import Store
from llamarefine_k8s.cluster import KubeObject, nodes
from llamarefine_k8s.cluster.api import Cluster
from llamarefine_k8s.cluster.manifests import STAGE, run_config_map
from llamarefine_k8s.cluster.reasons import why_refused
from llamarefine_k8s.cluster.submission import objects_of, pin_for_cluster
from llamarefine_k8s.runs import gpu_memory
from llamarefine_k8s.runs.checks import Check, fail, ok, warning
from llamarefine_k8s.runs.plan import plan
from llamarefine_k8s.runs.records import run_id
from llamarefine_k8s.settings import DRIVER, Settings

# An image name as registries accept it: host and port, path in lower case, tag, digest.
_IMAGE_NAME = re.compile(
    r"([a-zA-Z0-9.-]+(:[0-9]+)?/)?[a-z0-9]+([._/-]+[a-z0-9]+)*(:\w[\w.-]{0,127})?(@sha256:[0-9a-f]{64})?", re.ASCII
)
_LARGEST = "that the largest GPU it may get has"  # ends a sentence of gpu_memory.check_card
_PLAIN_RECIPE = Recipe.model_validate(
    {"name": "preflight", "prepare": {"questions": {"source": "x"}, "preferences": {"source": "y"}}}
)


def check_placement(
    cluster: Cluster, given: Settings, recipe: Recipe | None, needed: Mapping[str, int]
) -> Iterator[Check]:
    """Check everything that the Jobs of a run need from the cluster; without a recipe, the Jobs of any run.

    `recipe` is pinned; `needed` is the estimated GPU memory of its trainings, in bytes by stage.
    """
    jobs = _jobs(recipe or _PLAIN_RECIPE, given)
    all_nodes = _list_if_allowed(lambda: cluster.objects("Node"))
    yield from _check_secrets(cluster, jobs)
    yield from _check_images(jobs, all_nodes)
    yield from _check_admission(cluster, given, recipe or _PLAIN_RECIPE, jobs)
    yield from _check_nodes(cluster, given, jobs, all_nodes)
    for stage, size_bytes in needed.items():
        card = _largest_card_bytes(stage, given, jobs, all_nodes)
        if card:
            yield gpu_memory.check_card(recipe or _PLAIN_RECIPE, stage, size_bytes, card, _LARGEST)
        elif given.gpus_of(stage):
            needs = gpu_memory.describe(recipe or _PLAIN_RECIPE, stage, size_bytes)
            text = f"{needs}, {gpu_memory.UNMEASURED}; the memory of the nodes' GPUs is not known"
            yield warning(f"GPU memory for {stage}", text, "compare it with the GPU's memory yourself")


def require_memory(cluster: Cluster, given: Settings, recipe: Recipe, report: Callable[[str], None]) -> None:
    """Raise OutOfMemoryError if a due training needs far more memory than any GPU it may get has.

    A smaller excess is only reported. Nothing is checked if the user may not list nodes, or if the nodes do not show
    their GPUs' memory. `recipe` is not pinned.
    """
    jobs = _jobs(recipe, given)
    all_nodes = _list_if_allowed(lambda: cluster.objects("Node"))
    cards = {stage: card for stage in ("sft", "dpo") if (card := _largest_card_bytes(stage, given, jobs, all_nodes))}
    needed = gpu_memory.estimates(recipe, given.store) if cards else {}
    checks = [
        gpu_memory.check_card(recipe, stage, needed[stage], cards[stage], _LARGEST)
        for stage in cards
        if stage in needed
    ]
    excesses = [check for check in checks if check.state != "ok"]
    pinned = pin_for_cluster(recipe, given, report, upload=False) if excesses else recipe
    due = {stage.stage for stage in plan(pinned, Store(given.store)) if stage.state != "there"} if excesses else set()
    for check in excesses:
        if check.name.rpartition(" ")[2] not in due:
            continue
        if check.state == "FAIL":
            raise OutOfMemoryError(f"{check.name}: {check}; --no-memory-check submits it anyway")
        report(f"{check.name}: {check}")


def _largest_card_bytes(
    stage: str, given: Settings, jobs: dict[str, KubeObject], all_nodes: list[KubeObject] | None
) -> int | None:
    """Return the memory of the largest GPU that a stage may get; None if it gets no GPU or the memory is unknown."""
    if not (given.gpu_resource and given.gpus_of(stage)):
        return None
    fitting = nodes.candidates(pod_of(jobs[stage]), all_nodes or ())
    return max((card for node in fitting if (card := nodes.card_bytes(node, given.gpu_resource))), default=None)


def _jobs(recipe: Recipe, given: Settings) -> dict[str, KubeObject]:
    """Return the Jobs of a run, by stage or `driver`."""
    return {stage_of(job): job for job in objects_of(recipe, given) if job["kind"] == "Job"}


def stage_of(job: KubeObject) -> str:
    """Return the stage of a Job, or `driver`."""
    return str(job["metadata"]["labels"].get(STAGE, DRIVER))


def pod_of(job: KubeObject) -> KubeObject:
    """Return the spec of a Job's pods."""
    pod: KubeObject = job["spec"]["template"]["spec"]
    return pod


def _check_secrets(cluster: Cluster, jobs: dict[str, KubeObject]) -> Iterator[Check]:
    """Check that the Secrets that pods refer to exist and have the keys; never reads or prints a value."""
    keys_of: dict[str, set[str]] = {}
    for job in jobs.values():
        for name, key in _secrets_of(pod_of(job)):
            keys_of.setdefault(name, set()).update([key] if key else [])
    for name, keys in sorted(keys_of.items()):
        label = f"Secret {name}"
        try:
            secret = cluster.get("Secret", name)
        except AccessError:
            yield warning(label, "not checked: you may not read it", None)
            continue
        missing = sorted(keys - set((secret or {}).get("data") or {}))
        literals = " ".join(f"--from-literal={key}=…" for key in sorted(keys))
        to_do = f"kubectl -n {cluster.namespace} create secret generic {name} {literals}".rstrip()
        if secret is None:
            yield fail(label, f"is not in namespace {cluster.namespace}", to_do)
        elif missing:
            yield fail(label, f"has no {', '.join(missing)}", f"add it, or correct the settings ({to_do})")
        else:
            yield ok(label, f"exists, with {', '.join(sorted(keys))}" if keys else "exists")


def _secrets_of(pod: KubeObject) -> Iterator[tuple[str, str | None]]:
    """Yield name and key of each Secret that a pod needs to start; the key is None if any key will do."""
    for secret in pod.get("imagePullSecrets") or ():
        yield secret["name"], None
    for volume in pod.get("volumes") or ():
        source = volume.get("secret") or {}
        if source and not source.get("optional"):
            yield source["secretName"], None
    for container in pod["containers"]:
        for variable in container.get("env") or ():
            source = (variable.get("valueFrom") or {}).get("secretKeyRef")
            if source and not source.get("optional"):
                yield source["name"], source["key"]
        for variables in container.get("envFrom") or ():
            source = variables.get("secretRef")
            if source and not source.get("optional"):
                yield source["name"], None


def _check_images(jobs: dict[str, KubeObject], all_nodes: list[KubeObject] | None) -> Iterator[Check]:
    """Check the image names, and whether a node has each image already; only a pull shows if a registry has it."""
    containers = {name: pod_of(job)["containers"][0] for name, job in jobs.items()}
    invalid = [each["image"] for each in containers.values() if not _IMAGE_NAME.fullmatch(each["image"])]
    if invalid:
        yield fail("images", f"`{invalid[0]}` is not an image name", "correct image_registry and image_tag")
        return
    absent = [each["image"] for each in containers.values() if not any(nodes.on_node(each["image"], all_nodes or ()))]
    names = ", ".join(absent)
    if not absent:
        yield ok("images", f"all {len(containers)} are on a node already")
    elif all_nodes is not None and next(iter(containers.values()))["imagePullPolicy"] == "Never":
        yield warning("images", f"no node lists {names}", "load them: image_pull_policy is Never")
    else:
        yield ok("images", f"will be pulled (not tried here): {names}")


def _check_admission(cluster: Cluster, given: Settings, recipe: Recipe, jobs: dict[str, KubeObject]) -> Iterator[Check]:
    """Let the API server validate each object: schema, Pod Security, limit ranges, quota, webhooks."""
    objects = {"ConfigMap": run_config_map(run_id(recipe), recipe, given)} | jobs
    findings = 0
    pods_validated = True
    for name, manifest in objects.items():
        try:
            warnings = cluster.dry_run_create(manifest)
            if manifest["kind"] == "Job" and pods_validated:
                pods_validated = _validate_pod(cluster, manifest)
        except AccessError as error:
            findings += 1
            reason = why_refused(name, str(error))
            yield fail(f"admission: {name}", reason.text, None if " may not " in str(error) else reason.hint)
            continue
        except LlamaRefineError as error:
            findings += 1
            yield fail(f"admission: {name}", str(error))
            continue
        for text in warnings:
            findings += 1
            check = fail if "violate PodSecurity" in text else warning
            yield check(f"admission: {name}", text)
    if not findings:
        what = "Jobs and their pods" if pods_validated else "Jobs"
        yield ok("admission", f"the API server would accept the run's ConfigMap and all {len(jobs)} {what}")
    if not pods_validated:
        yield from _check_quota(cluster, jobs)


def _validate_pod(cluster: Cluster, job: KubeObject) -> bool:
    """Let the server validate a Job's pod; False if the user may not create pods, which submitting does not need."""
    template = job["spec"]["template"]
    metadata = {"name": f"{job['metadata']['name']}-preflight"[:63], "labels": template["metadata"]["labels"]}
    try:
        cluster.dry_run_create({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]})
    except AccessError as error:
        if " may not create pods " in str(error):
            return False
        raise
    return True


def _check_quota(cluster: Cluster, jobs: dict[str, KubeObject]) -> Iterator[Check]:
    """Compare each stage's pod with the namespace's quotas; for users whose pods the server does not validate."""
    try:
        quotas = cluster.objects("ResourceQuota")
    except AccessError:
        text = "not checked: you may not read it"
        yield warning("quota", text, "if a stage waits for it, `llamarefine status` says so")
        return
    exceeded = [
        f"{name}: quota {quota['metadata']['name']} {shortage}"
        for name, job in jobs.items()
        for quota in quotas
        if (shortage := nodes.over_quota(pod_of(job), quota))
    ]
    if exceeded:
        yield fail("quota", "; ".join(exceeded), "ask for less (resources), wait for others to end, or have it raised")
    else:
        yield ok("quota", f"{len(quotas)} in namespace {cluster.namespace}, none exceeded")


def _check_nodes(
    cluster: Cluster, given: Settings, jobs: dict[str, KubeObject], all_nodes: list[KubeObject] | None
) -> Iterator[Check]:
    """Check for each stage that it fits on a node, and whether such a node has room now."""
    if all_nodes is None:
        text = "not checked: you may not list nodes"
        yield warning("nodes", text, "if a stage finds none, `llamarefine status` says why")
        return
    pods = _list_if_allowed(lambda: cluster.objects("PodAnywhere"))
    for name in (DRIVER, *SEQUENCE):
        pod = pod_of(jobs[name])
        label = f"node for {name}"
        fitting = nodes.candidates(pod, all_nodes)
        if not fitting:
            why = "; ".join(f"{node['metadata']['name']} {nodes.why_not(pod, node)}" for node in all_nodes[:3])
            to_do = f"lower resources.{name}, correct node_selector or tolerations, or add a node"
            text = f"it fits on none of {len(all_nodes)}: {why}"
            if nodes.may_grow(all_nodes) or given.queue:
                yield warning(label, text, f"unless an autoscaler adds one: {to_do}")
            else:
                yield fail(label, text, to_do)
            continue
        free = [each for each in fitting if pods is None or not nodes.lacks(pod, nodes.free_of(each, pods))]
        if free:
            yield ok(label, f"{free[0]['metadata']['name']} has room{_and_more(len(free) - 1)}")
        else:
            text = f"it fits on {fitting[0]['metadata']['name']}, which has no room now{_and_more(len(fitting) - 1)}"
            yield warning(label, text, "it starts when other pods end")


def _list_if_allowed(list_objects: Callable[[], list[KubeObject]]) -> list[KubeObject] | None:
    """Return the listed objects; None if the user may not list them."""
    try:
        return list_objects()
    except AccessError:
        return None


def _and_more(number: int) -> str:
    return f", as on {number} more" if number else ""
