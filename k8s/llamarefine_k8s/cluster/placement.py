"""Whether the cluster would take a run's objects: what they refer to, their images, admission, a node with room."""

import re
from collections.abc import Callable, Iterator, Mapping

from llamarefine_jobs.contract.errors import AccessError, LlamaRefineError, OutOfMemoryError
from llamarefine_jobs.contract.recipe import Recipe
from llamarefine_jobs.contract.stages import SEQUENCE
from llamarefine_jobs.store import Store
from llamarefine_k8s.cluster import KubeObject, nodes
from llamarefine_k8s.cluster.api import Cluster
from llamarefine_k8s.cluster.manifests import run_config_map
from llamarefine_k8s.cluster.reasons import why_refused
from llamarefine_k8s.cluster.submission import bring_sources, objects_of
from llamarefine_k8s.runs import gpu_memory
from llamarefine_k8s.runs.checks import Check, fail, ok, warning
from llamarefine_k8s.runs.plan import plan
from llamarefine_k8s.runs.records import run_id
from llamarefine_k8s.settings import DRIVER, Settings

# As registries accept it: host and port, path in lower case, tag, digest.
_IMAGE = re.compile(
    r"([a-zA-Z0-9.-]+(:[0-9]+)?/)?[a-z0-9]+([._/-]+[a-z0-9]+)*(:\w[\w.-]{0,127})?(@sha256:[0-9a-f]{64})?", re.ASCII
)
_LARGEST = "that the largest GPU it may get has"
_PLAIN = Recipe.model_validate(
    {"name": "preflight", "prepare": {"questions": {"source": "x"}, "preferences": {"source": "y"}}}
)


def check_placement(
    cluster: Cluster, given: Settings, recipe: Recipe | None, needed: Mapping[str, int]
) -> Iterator[Check]:
    """Each thing that the Jobs of a run need of the cluster; of any run without a recipe.

    `recipe` is pinned; `needed` is what its trainings are estimated to need of a GPU's memory.
    """
    jobs = _jobs(recipe or _PLAIN, given)
    seen = _asked(lambda: cluster.objects("Node"))
    yield from _references(cluster, jobs)
    yield from _images(jobs, seen)
    yield from _admission(cluster, given, recipe or _PLAIN, jobs)
    yield from _room(cluster, given, jobs, seen)
    for stage, size_bytes in needed.items():
        card = _card(stage, given, jobs, seen)
        if card:
            yield gpu_memory.check_card(stage, size_bytes, card, _LARGEST)
        elif given.gpus_of(stage):
            text = f"{gpu_memory.gib(size_bytes)}, {gpu_memory.UNMEASURED}; how much a node's GPU has is not known"
            yield warning(f"GPU memory for {stage}", text, "compare it with the card yourself")


def require_memory(cluster: Cluster, given: Settings, recipe: Recipe, say: Callable[[str], None]) -> None:
    """Refuse a run whose due training is far over every card that it may be put on; say where it is over by less.

    Nothing happens where nodes may not be listed, or do not say what their GPUs have. `recipe` is as it was loaded.
    """
    jobs = _jobs(recipe, given)
    seen = _asked(lambda: cluster.objects("Node"))
    cards = {stage: card for stage in ("sft", "dpo") if (card := _card(stage, given, jobs, seen))}
    needed = gpu_memory.estimates(recipe, given.store) if cards else {}
    checks = [gpu_memory.check_card(stage, needed[stage], cards[stage], _LARGEST) for stage in cards if stage in needed]
    wrong = [check for check in checks if check.state != "ok"]
    pinned = bring_sources(recipe, given, say, upload=False) if wrong else recipe
    due = {stage.stage for stage in plan(pinned, Store(given.store)) if stage.state != "there"} if wrong else set()
    for check in wrong:
        if check.name.rpartition(" ")[2] not in due:
            continue
        if check.state == "FAIL":
            raise OutOfMemoryError(f"{check.name}: {check}; --no-memory-check submits all the same")
        say(f"{check.name}: {check}")


def _card(stage: str, given: Settings, jobs: dict[str, KubeObject], seen: list[KubeObject] | None) -> int | None:
    """Bytes of the largest GPU that a stage may be put on; None where it gets none, or nothing says."""
    if not (given.gpu_resource and given.gpus_of(stage)):
        return None
    fitting = nodes.candidates(pod_of(jobs[stage]), seen or ())
    return max((card for node in fitting if (card := nodes.card_bytes(node, given.gpu_resource))), default=None)


def _jobs(recipe: Recipe, given: Settings) -> dict[str, KubeObject]:
    """The Jobs of a run, by stage or `driver`."""
    return {name_of(job): job for job in objects_of(recipe, given) if job["kind"] == "Job"}


def name_of(job: KubeObject) -> str:
    """The stage that a Job is of, or `driver`."""
    return str(job["metadata"]["labels"].get("llamarefine/stage", DRIVER))


def pod_of(job: KubeObject) -> KubeObject:
    """The spec of a Job's pods."""
    pod: KubeObject = job["spec"]["template"]["spec"]
    return pod


def _references(cluster: Cluster, jobs: dict[str, KubeObject]) -> Iterator[Check]:
    """The Secrets that pods refer to, and the keys in them. No value is looked at, let alone shown."""
    wanted: dict[str, set[str]] = {}
    for job in jobs.values():
        for name, key in _secrets_of(pod_of(job)):
            wanted.setdefault(name, set()).update([key] if key else [])
    for name, keys in sorted(wanted.items()):
        label = f"Secret {name}"
        try:
            there = cluster.get("Secret", name)
        except AccessError:
            yield warning(label, "you may not read it, so whether it is there is not known", None)
            continue
        missing = sorted(keys - set((there or {}).get("data") or {}))
        literals = " ".join(f"--from-literal={key}=…" for key in sorted(keys))
        to_do = f"kubectl -n {cluster.namespace} create secret generic {name} {literals}".rstrip()
        if there is None:
            yield fail(label, f"is not in namespace {cluster.namespace}", to_do)
        elif missing:
            yield fail(label, f"has no {', '.join(missing)}", f"add it, or correct the settings ({to_do})")
        else:
            yield ok(label, f"is there, with {', '.join(sorted(keys))}" if keys else "is there")


def _secrets_of(pod: KubeObject) -> Iterator[tuple[str, str | None]]:
    """Name and key of each Secret that a pod cannot start without; no key where any will do."""
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


def _images(jobs: dict[str, KubeObject], seen: list[KubeObject] | None) -> Iterator[Check]:
    """Each image's name is one, and where a node has it already. Whether a registry has it only a pull tells."""
    containers = {name: pod_of(job)["containers"][0] for name, job in jobs.items()}
    wrong = [each["image"] for each in containers.values() if not _IMAGE.fullmatch(each["image"])]
    if wrong:
        yield fail("images", f"`{wrong[0]}` is no image's name", "correct image_registry and image_tag")
        return
    absent = [each["image"] for each in containers.values() if not any(nodes.on_node(each["image"], seen or ()))]
    names = ", ".join(absent)
    if not absent:
        yield ok("images", f"all {len(containers)} are on a node already")
    elif seen is not None and next(iter(containers.values()))["imagePullPolicy"] == "Never":
        yield warning("images", f"no node says that it has {names}", "load them: image_pull_policy is Never")
    else:
        yield ok("images", f"to be pulled, which is not tried: {names}")


def _admission(cluster: Cluster, given: Settings, recipe: Recipe, jobs: dict[str, KubeObject]) -> Iterator[Check]:
    """What the API server would say to each object: schema, Pod Security, limit ranges, quota, webhooks."""
    objects = {"ConfigMap": run_config_map(run_id(recipe), recipe, given)} | jobs
    refused = 0
    pods_tried = True
    for name, manifest in objects.items():
        try:
            warnings = cluster.dry_run_create(manifest)
            if manifest["kind"] == "Job" and pods_tried:
                pods_tried = _try_pod(cluster, manifest)
        except AccessError as error:
            refused += 1
            reason = why_refused(name, str(error))
            yield fail(f"admission: {name}", reason.text, None if " may not " in str(error) else reason.hint)
            continue
        except LlamaRefineError as error:
            refused += 1
            yield fail(f"admission: {name}", str(error))
            continue
        for text in warnings:
            refused += 1
            state = fail if "violate PodSecurity" in text else warning
            yield state(f"admission: {name}", text)
    if not refused:
        what = "Jobs and their pods" if pods_tried else "Jobs"
        yield ok("admission", f"the API server would take the run's ConfigMap and all {len(jobs)} {what}")
    if not pods_tried:
        yield from _quota(cluster, jobs)


def _try_pod(cluster: Cluster, job: KubeObject) -> bool:
    """Have the server check a Job's pod; False where the asker may make no pods, as a submitter need not."""
    template = job["spec"]["template"]
    metadata = {"name": f"{job['metadata']['name']}-preflight"[:63], "labels": template["metadata"]["labels"]}
    try:
        cluster.dry_run_create({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]})
    except AccessError as error:
        if " may not create pods " in str(error):
            return False
        raise
    return True


def _quota(cluster: Cluster, jobs: dict[str, KubeObject]) -> Iterator[Check]:
    """Room in the namespace's quotas for each stage's pod: where pods cannot be tried, they are added up."""
    try:
        quotas = cluster.objects("ResourceQuota")
    except AccessError:
        yield warning("quota", "you may not look at it", "if a stage waits for it, `llamarefine status` says so")
        return
    short = [
        f"{name}: quota {quota['metadata']['name']} {said}"
        for name, job in jobs.items()
        for quota in quotas
        if (said := nodes.over_quota(pod_of(job), quota))
    ]
    if short:
        yield fail("quota", "; ".join(short), "ask for less (resources), wait for others to end, or have it raised")
    else:
        yield ok("quota", f"{len(quotas)} in namespace {cluster.namespace}, none in the way")


def _room(
    cluster: Cluster, given: Settings, jobs: dict[str, KubeObject], seen: list[KubeObject] | None
) -> Iterator[Check]:
    """A node for each stage: one that could take it at all, and whether it has room now."""
    if seen is None:
        yield warning("nodes", "you may not list nodes", "if a stage finds none, `llamarefine status` says why")
        return
    pods = _asked(lambda: cluster.objects("PodAnywhere"))
    for name in (DRIVER, *SEQUENCE):
        pod = pod_of(jobs[name])
        label = f"node for {name}"
        could = nodes.candidates(pod, seen)
        if not could:
            why = "; ".join(f"{node['metadata']['name']} {nodes.why_not(pod, node)}" for node in seen[:3])
            to_do = f"lower resources.{name}, correct node_selector or tolerations, or add a node"
            grows = nodes.may_grow(seen) or given.queue
            text = f"none of {len(seen)} could take it: {why}"
            yield warning(label, text, f"unless one is added by itself: {to_do}") if grows else fail(label, text, to_do)
            continue
        free = [each for each in could if pods is None or not nodes.lacks(pod, nodes.free_of(each, pods))]
        if free:
            yield ok(label, f"{free[0]['metadata']['name']} has room{_more(len(free) - 1)}")
        else:
            text = f"{could[0]['metadata']['name']} could take it and has no room now{_more(len(could) - 1)}"
            yield warning(label, text, "it starts when others end")


def _asked(ask: Callable[[], list[KubeObject]]) -> list[KubeObject] | None:
    """What was asked for; None where the asker may not."""
    try:
        return ask()
    except AccessError:
        return None


def _more(number: int) -> str:
    return f", like {number} more" if number else ""
