"""No credential reaches a recipe's copies, a ConfigMap, a message, or a log, not even at DEBUG."""

import io
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamarefine_jobs.contract.errors import LlamaRefineError, RecipeError
from llamarefine_jobs.recipe_file import parse_recipe
from llamarefine_jobs.store import Store
from llamarefine_jobs.store.uri import open_objects
from llamarefine_k8s import settings

from .. import s3_server

SECRET = "hunter2"
ADDRESSES = [
    f"https://someone:{SECRET}@example.com/rows.csv",
    f"https://{SECRET}@example.com/rows.csv",
    f"https://example.com/rows.csv?X-Amz-Signature={SECRET}&X-Amz-Expires=60",
    f"https://example.com/rows.csv?sv=2026&sig={SECRET}",
    f"https://example.com/rows.csv?token={SECRET}",
    f"https://example.com/rows.csv?a=b&api_key={SECRET}",
    f"s3://key:{SECRET}@bucket/rows.csv",
    f"hf://user:{SECRET}@datasets/owner/name",
]
RECIPE = "name: small\nprepare:\n  questions: {source: %s}\n  preferences: {source: pairs.jsonl}\n"


@pytest.mark.parametrize("address", ADDRESSES)
def test_a_source_with_credentials_is_refused_without_repeating_them(address: str) -> None:
    with pytest.raises(RecipeError, match=r"prepare\.questions\.source.*without credentials") as caught:
        parse_recipe(RECIPE % f'"{address}"', "recipe.yaml")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "address", ["https://example.com/rows.csv?page=2&tokenizer=a", "rows@home.csv", "hf://datasets/a/b"]
)
def test_an_address_without_credentials_is_accepted(address: str) -> None:
    assert parse_recipe(RECIPE % f'"{address}"', "recipe.yaml").prepare.questions.source == address


@pytest.mark.parametrize("name", ["store", "s3_endpoint"])
def test_settings_with_credentials_are_refused_without_repeating_them(name: str) -> None:
    with pytest.raises(RecipeError, match=f"`{name}`.*without credentials") as caught:
        settings.parse({name: f"https://someone:{SECRET}@example.com"}, "llamarefine.yaml")
    assert SECRET not in str(caught.value)


def test_a_store_with_credentials_is_refused_without_repeating_them() -> None:
    with pytest.raises(RecipeError, match="without credentials") as caught:
        open_objects(f"s3://key:{SECRET}@bucket/prefix")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("name", ["HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD"])
def test_a_patch_with_a_secret_in_plain_text_is_refused(name: str) -> None:
    """The secret would be readable in the run's ConfigMap and in every Job."""
    env = [{"name": name, "value": SECRET}]
    patches = {"prepare": {"spec": {"template": {"spec": {"containers": [{"name": "stage", "env": env}]}}}}}
    with pytest.raises(RecipeError, match=f"{name} as plain text") as caught:
        settings.parse({"patches": patches}, "llamarefine.yaml")
    assert SECRET not in str(caught.value)
    env[0] = {"name": name, "valueFrom": {"secretKeyRef": {"name": "hub", "key": "token"}}}
    settings.parse({"patches": patches}, "llamarefine.yaml")


@pytest.fixture
def everything_logged() -> Iterator[io.StringIO]:
    """A buffer with everything that any library logs, at DEBUG."""
    log = io.StringIO()
    handler = logging.StreamHandler(log)
    root, before = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield log
    root.removeHandler(handler)
    root.setLevel(before)


def test_no_log_at_debug_holds_a_key_a_secret_or_a_token(
    s3_uri: str, everything_logged: io.StringIO, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("bytes")
    store = Store(s3_uri)
    store.write("runs/a/run.json", b"{}")
    store.objects.upload("a/file", tmp_path / "file", lambda chunk: None)
    assert [entry.path for entry in store.entries("")] == ["a/file", "runs/a/run.json"]
    monkeypatch.setenv("AWS_SESSION_TOKEN", SECRET)
    missing_bucket = Store("s3://no-such-bucket-anywhere/prefix")  # MinIO refuses the token, moto the bucket
    with pytest.raises(LlamaRefineError) as caught:
        missing_bucket.read("runs/a/run.json")
    assert SECRET not in str(caught.value)
    log = everything_logged.getvalue()
    assert "GET" in log, "the libraries did log"
    assert "PUT" in log
    assert "no-such-bucket-anywhere" in log, "the request with the token was logged"
    assert s3_server.SECRET not in log
    assert SECRET not in log
    assert "Authorization" not in log
