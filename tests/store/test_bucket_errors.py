"""Wrong credentials, no bucket, a dead endpoint, broken downloads: a one-line error of the right class, or a retry."""

import http.server
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llamarefine_jobs.contract.errors import AccessError, LlamaRefineError, RecipeError, StoreError
from llamarefine_jobs.contract.retry import RetryPolicy
from llamarefine_jobs.store import Store

from .. import s3_server
from . import samples
from .conftest import Clock
from .samples import KEY, STAGE


def error_of(act: Callable[[], object]) -> LlamaRefineError:
    with pytest.raises(LlamaRefineError) as error:
        act()
    assert "\n" not in str(error.value)
    return error.value


def test_a_missing_bucket_is_named(s3: s3_server.S3Server, folder: Path) -> None:
    store = Store("s3://no-such-bucket-here/prefix")
    for act in (
        lambda: store.manifest(STAGE, KEY),
        lambda: store.publish(folder, samples.draft()),
        lambda: list(store.entries("runs/")),
        lambda: store.write("runs/x", b"x"),
        lambda: store.objects.upload("x", folder / "one.byte", lambda chunk: None),
    ):
        error = error_of(act)
        assert isinstance(error, AccessError)
        assert "there is no bucket `no-such-bucket-here`" in str(error)


def test_wrong_credentials_are_an_access_error(
    s3_uri: str, s3: s3_server.S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    if s3.name == "moto":
        pytest.skip("moto accepts any credentials")
    for name, value in {"AWS_SECRET_ACCESS_KEY": "wrong", "AWS_ACCESS_KEY_ID": "nobody"}.items():
        monkeypatch.setenv(name, value)
        error = error_of(lambda: Store(s3_uri).manifest(STAGE, KEY))
        assert isinstance(error, AccessError)
        assert "refuses these credentials" in str(error)
        assert "wrong" not in str(error), "a secret is never shown"


def test_missing_credentials_are_an_access_error(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    error = error_of(lambda: Store(s3_uri).manifest(STAGE, KEY))
    assert isinstance(error, AccessError)
    assert "set AWS_ACCESS_KEY_ID" in str(error)


def test_a_missing_profile_is_named(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    error = error_of(lambda: Store(s3_uri).manifest(STAGE, KEY))
    assert isinstance(error, AccessError)
    assert "nobody" in str(error)


def test_an_invalid_endpoint_is_named(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "minio:9000")
    error = error_of(lambda: Store(s3_uri).manifest(STAGE, KEY))
    assert isinstance(error, AccessError)
    assert "minio:9000" in str(error)


def test_an_invalid_bucket_name_is_a_recipe_error(s3: s3_server.S3Server) -> None:
    assert isinstance(error_of(lambda: Store("s3://Not A Bucket/x").manifest(STAGE, KEY)), RecipeError)


def test_a_dead_endpoint_is_a_store_error_after_ten_seconds(
    s3_uri: str, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{unused.getsockname()[1]}")
        error = error_of(lambda: Store(s3_uri).manifest(STAGE, KEY))
    assert clock.now_s == pytest.approx(10)
    assert isinstance(error, StoreError)
    assert "is the endpoint right and reachable?" in str(error)


class Flaky(http.server.BaseHTTPRequestHandler):
    """Forwards requests to the real server, but breaks off the first `breaks_left` large response bodies."""

    server: "FlakyServer"

    def do_GET(self) -> None:
        request_body = self.rfile.read(int(self.headers.get("Content-Length", 0))) or None
        headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
        request = urllib.request.Request(
            self.server.real_endpoint + self.path, request_body, headers, method=self.command
        )
        try:
            with urllib.request.urlopen(request) as response:
                body, status, headers = response.read(), response.status, response.headers
        except urllib.error.HTTPError as error:
            body, status, headers = error.read(), error.code, error.headers
        if self.server.ignores_ranges:
            body, status, headers = self.server.first_answers.setdefault(self.path, (body, status, headers))
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("connection", "transfer-encoding"):
                self.send_header(name, value)
        self.end_headers()
        breaks = self.command == "GET" and len(body) >= self.server.breaks_from_bytes and self.server.breaks_left > 0
        self.server.breaks_left -= breaks
        self.server.ranges.append(self.headers.get("Range"))
        self.wfile.write(body[: int(len(body) * self.server.share)] if breaks else body)
        self.close_connection = True

    do_PUT = do_GET  # noqa: N815

    def log_message(self, *arguments: Any) -> None:
        pass


class FlakyServer(http.server.ThreadingHTTPServer):
    real_endpoint: str
    breaks_left: int
    breaks_from_bytes: int
    share: float
    ranges: list[str | None]
    ignores_ranges: bool
    first_answers: dict[str, Any]


@pytest.fixture
def flaky(s3: s3_server.S3Server) -> Iterator[FlakyServer]:
    with FlakyServer(("127.0.0.1", 0), Flaky) as server:
        server.real_endpoint, server.breaks_left, server.ranges = s3.endpoint, 0, []
        server.breaks_from_bytes = 100_000
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.share, server.ignores_ranges, server.first_answers = 0.5, False, {}
        yield server
        server.shutdown()


def open_store(
    flaky: FlakyServer, uri: str, monkeypatch: pytest.MonkeyPatch, retry_policy: RetryPolicy | None = None
) -> Store:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{flaky.server_address[1]}")
    return Store(uri, retry_policy)


def test_a_broken_download_continues_from_the_last_byte(
    flaky: FlakyServer, s3_uri: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = Store(s3_uri).publish(samples.make_folder(tmp_path / "large", size_bytes=5_000_000), samples.draft())
    store = open_store(flaky, s3_uri, monkeypatch)
    flaky.breaks_left = 2
    store.fetch(published, tmp_path / "fetched", "adapter/")
    assert len((tmp_path / "fetched/adapter/adapter_model.safetensors").read_bytes()) == 5_000_000
    assert flaky.breaks_left == 0
    resumed = [requested for requested in flaky.ranges if requested and requested != "bytes=0-"]
    assert len(resumed) == 2


def test_a_download_that_always_breaks_is_a_store_error_and_leaves_nothing(
    flaky: FlakyServer, s3_uri: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = Store(s3_uri).publish(folder, samples.draft())
    store = open_store(flaky, s3_uri, monkeypatch, RetryPolicy(0.5))
    flaky.breaks_left, flaky.breaks_from_bytes, flaky.share = 1000, 1, 0.0
    error = error_of(lambda: store.fetch(published, tmp_path / "target" / "fetched"))
    assert isinstance(error, StoreError)
    assert "the connection broke" in str(error) or "endpoint" in str(error)
    assert list((tmp_path / "target").iterdir()) == []


def test_a_broken_download_continues_if_the_server_ignores_ranges(
    flaky: FlakyServer, s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a server answers a range request with 200 and the whole object."""
    published = Store(s3_uri).publish(samples.make_folder(tmp_path / "large", size_bytes=5_000_000), samples.draft())
    store = open_store(flaky, s3_uri, monkeypatch)
    flaky.breaks_left, flaky.ignores_ranges = 2, True
    store.fetch(published, tmp_path / "fetched", "adapter/")
    assert samples.content(tmp_path / "fetched/adapter") == samples.content(tmp_path / "large/adapter")
    assert flaky.breaks_left == 0


def test_a_download_that_always_breaks_at_the_same_byte_is_given_up(
    flaky: FlakyServer, s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = Store(s3_uri).publish(samples.make_folder(tmp_path / "large", size_bytes=5_000_000), samples.draft())
    store = open_store(flaky, s3_uri, monkeypatch, RetryPolicy(0.5))
    flaky.breaks_left, flaky.ignores_ranges = 1000, True
    with pytest.raises(StoreError, match="gave up after"):
        store.fetch(published, tmp_path / "fetched", "adapter/adapter_model.safetensors")


def test_a_small_object_that_is_cut_short_is_read_again(
    flaky: FlakyServer, s3_uri: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record or a manifest that was cut short in transit is not reported as damaged."""
    published = Store(s3_uri).publish(folder, samples.draft())
    store = open_store(flaky, s3_uri, monkeypatch)
    flaky.breaks_left, flaky.breaks_from_bytes = 2, 1
    assert store.manifest(STAGE, KEY) == published
    assert flaky.breaks_left == 0


def test_create_recognizes_its_own_object_though_reading_it_is_cut_short(
    flaky: FlakyServer, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If its own manifest were mistaken for another writer's, the writer would delete the manifest's files."""
    Store(s3_uri).objects.create("manifest.json", b"ours, written by an attempt whose answer was lost")
    store = open_store(flaky, s3_uri, monkeypatch)
    flaky.breaks_left, flaky.breaks_from_bytes = 1, 1
    assert store.objects.create("manifest.json", b"ours, written by an attempt whose answer was lost") is True
    assert flaky.breaks_left == 0
