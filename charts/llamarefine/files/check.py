"""What `helm test` runs: the bucket does what the store needs, the API server grants what the Role lists."""

import json
import os
import secrets
import sys

from kubernetes import client, config

from llamarefine_jobs.contract.errors import LlamaRefineError
from llamarefine_jobs.objects import open_objects
from llamarefine_k8s.settings import load


def check_bucket(uri: str) -> None:
    """Put, put only if nothing is there, get, delete."""
    objects, path, data = open_objects(uri), f"check/{secrets.token_hex(8)}", secrets.token_bytes(1024)
    assert objects.create(path, data), "a conditional put of a new object was refused"
    try:
        assert not objects.create(path, b"other"), "a conditional put replaced an object: If-None-Match is not honoured"
        assert objects.read(path) == data, "an object came back with other bytes"
    finally:
        objects.delete(path)
    assert objects.read(path) is None, "an object is still there after it was deleted"
    print(f"bucket {uri}: put, conditional put, get and delete work")


def check_permissions(namespace: str, rules: list[dict[str, list[str]]]) -> None:
    """Ask the API server about every verb that the Role lists."""
    config.load_incluster_config()
    reviews = client.AuthorizationV1Api()
    asked, refused = 0, []
    for rule in rules:
        for verb, group, resource in (
            (v, g, r) for v in rule["verbs"] for g in rule["apiGroups"] for r in rule["resources"]
        ):
            name, _, part = resource.partition("/")
            attributes = {"namespace": namespace, "verb": verb, "group": group, "resource": name, "subresource": part}
            review = {"spec": {"resourceAttributes": attributes}}
            asked += 1
            if not reviews.create_self_subject_access_review(review).status.allowed:
                refused.append(f"{verb} {resource}")
    assert not refused, f"the driver's service account may not {', '.join(refused)} in namespace {namespace}"
    print(f"API server: all {asked} permissions are granted in namespace {namespace}")


try:
    settings = load()
    check_bucket(settings.store)
    check_permissions(str(settings.namespace), json.loads(os.environ["RULES"]))
except (AssertionError, LlamaRefineError) as error:
    sys.exit(f"error: {error}")
