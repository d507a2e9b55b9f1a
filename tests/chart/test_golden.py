"""Every object of a release equals its golden file. `LLAMAREFINE_WRITE_GOLDEN=1` rewrites the files; review them."""

import os
from pathlib import Path

import pytest
import yaml

from llamarefine_jobs.contract.version import __version__

from .rendering import BUCKET, MINIO, Values, needs_helm, render

GOLDEN = Path(__file__).parent / "golden"

RECIPE = """name: docs
prepare:
  questions: {source: s3://data/faq.csv}
  preferences: {source: s3://data/pairs.jsonl}
"""

EVERYTHING: Values = {
    "recipe": RECIPE,
    "settings": {
        "store": "s3://models/llama",
        "s3_endpoint": "http://ceph.storage:7480",
        "s3_region": "eu-west-1",
        "secret_name": "ceph-user",
        "image_registry": "registry.example.com/team/",
        "image_tag": "test",
        "image_pull_policy": "Always",
        "image_pull_secrets": ["registry"],
        "service_account": "runner",
        "stage_service_account": "worker",
        "priority_class": "batch",
        "queue": "gpus",
        "resources": {"sft": {"gpus": 4, "limits": {"memory": "64Gi"}, "requests": {"cpu": 8}}},
        "node_selector": {"gpu": "h200"},
        "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        "start_timeout_s": 3600,
        "deadline_s": None,
        "patches": {"all": {"spec": {"template": {"metadata": {"annotations": {"cost-centre": "ml"}}}}}},
    },
    "secret": {"accessKeyId": "key", "secretAccessKey": "secret-key"},
    "serviceAccounts": {
        "driverAnnotations": {"iam.example.com/role": "driver"},
        "stageAnnotations": {"iam.example.com/role": "stage"},
    },
    "networkPolicy": {
        "bucket": [{"ipBlock": {"cidr": "10.2.0.0/16"}}],
        "apiServer": {"cidrs": ["10.0.0.1/32"], "ports": [6443]},
        "extraEgress": [{"ports": [{"protocol": "TCP", "port": 3128}], "to": [{"ipBlock": {"cidr": "10.3.0.9/32"}}]}],
    },
    "launcher": {
        "nodeSelector": {"pool": "small"},
        "tolerations": [{"key": "small", "operator": "Exists"}],
        "env": [{"name": "AWS_CA_BUNDLE", "value": "/ca/ca.crt"}],
        "volumes": [{"name": "ca", "configMap": {"name": "corporate-ca"}}],
        "volumeMounts": [{"name": "ca", "mountPath": "/ca"}],
    },
}

CASES: dict[str, Values] = {
    "bucket": BUCKET,
    "minio": MINIO | {"recipe": RECIPE, "settings": {"image_tag": "test"}},
    "everything": EVERYTHING,
}


class Readable(yaml.SafeDumper):
    """A YAML writer that writes a text of several lines as a block."""


Readable.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


@needs_helm
@pytest.mark.parametrize("case", CASES)
def test_a_release_equals_its_golden_file(case: str) -> None:
    objects = sorted(render(CASES[case]), key=lambda each: (each["kind"], each["metadata"]["name"]))
    text = yaml.dump_all(objects, Dumper=Readable, width=120).replace(__version__, "VERSION")
    file = GOLDEN / f"{case}.yaml"
    if os.environ.get("LLAMAREFINE_WRITE_GOLDEN"):
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


def test_every_golden_file_belongs_to_a_case() -> None:
    assert {file.stem for file in GOLDEN.iterdir()} == set(CASES)
