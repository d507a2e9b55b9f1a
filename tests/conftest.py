"""Fixtures for all tests: stores in a folder and in a bucket. Also sets an environment for tests."""

import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from . import s3_server

if TYPE_CHECKING:
    from .chart.kind_cluster import KindCluster

# One thread is as fast as many on models this small, and many times faster if the cores are busy.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


def pytest_report_header() -> str:
    return f"llamarefine: {s3_server.describe()}"


@pytest.fixture
def file_uri(tmp_path: Path) -> str:
    """URI of a store in a folder that does not exist yet."""
    return (tmp_path / "store").as_uri()


@pytest.fixture(scope="session")
def the_s3_server() -> Iterator[s3_server.S3Server]:
    """The S3 server that all tests share, without changes to the environment."""
    with s3_server.serve() as server:
        yield server


@pytest.fixture
def s3(the_s3_server: s3_server.S3Server, monkeypatch: pytest.MonkeyPatch) -> s3_server.S3Server:
    """The S3 server, with its endpoint and credentials in the environment."""
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    for name, value in the_s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return the_s3_server


@pytest.fixture(scope="session")
def the_bucket(the_s3_server: s3_server.S3Server) -> str:
    """The name of the bucket that all tests share."""
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=the_s3_server.endpoint,
        aws_access_key_id=s3_server.KEY,
        aws_secret_access_key=s3_server.SECRET,
        region_name="us-east-1",
    )
    client.create_bucket(Bucket="llamarefine-tests")
    return "llamarefine-tests"


@pytest.fixture
def s3_uri(s3: s3_server.S3Server, the_bucket: str) -> str:
    """URI of a store in the bucket, below a prefix that no other test uses."""
    return f"s3://{the_bucket}/{secrets.token_hex(8)}/llama"


@pytest.fixture
def rotating_minio(monkeypatch: pytest.MonkeyPatch) -> Iterator[s3_server.RotatingMinio]:
    """A server of this test alone, whose keys can be replaced, with the bucket `rotated`; it is in the environment."""
    import boto3

    minio = s3_server.find_minio()
    if not minio:
        pytest.skip("needs the program minio: moto's server accepts any key")
    with s3_server.RotatingMinio(minio) as server:
        monkeypatch.delenv("AWS_PROFILE", raising=False)
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        boto3.session.Session().client("s3", region_name="us-east-1").create_bucket(Bucket="rotated")
        yield server


@pytest.fixture(scope="session")
def kind_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator["KindCluster"]:
    """The kind cluster that all tests of `make e2e` share."""
    from .chart.kind_cluster import cluster

    with cluster(tmp_path_factory.mktemp("kind")) as made:
        yield made
