"""Wrong credentials, no bucket, a dead or flaky endpoint: one line, the right kind, within seconds."""

import http.server
import socket
import threading
import time
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


def test_wrong_credentials_are_refused(s3_uri: str, s3: s3_server.S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    if s3.name == "moto":
        pytest.skip("moto takes any credentials")
    for name, value in {"AWS_SECRET_ACCESS_KEY": "wrong", "AWS_ACCESS_KEY_ID": "nobody"}.items():
        monkeypatch.setenv(name, value)
        error = error_of(lambda: Store(s3_uri).manifest(STAGE, KEY))
        assert isinstance(error, AccessError)
        assert "refuses these credentials" in str(error)
        assert "wrong" not in str(error), "a secret is never shown"


def test_missing_credentials_are_said_at_once(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    error = error_of(lambda: Store(s3_uri).manifest(STAGE, KEY))
    assert isinstance(error, AccessError)
    assert "set AWS_ACCESS_KEY_ID" in str(error)


def test_a_profile_that_is_not_there_is_said(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    error = error_of(lambda: Store(s3_uri).manifest(STAGE, KEY))
    assert isinstance(error, AccessError)
    assert "nobody" in str(error)


def test_an_endpoint_that_is_no_url_is_said(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "minio:9000")
    error = error_of(lambda: Store(s3_uri).manifest(STAGE, KEY))
    assert isinstance(error, AccessError)
    assert "minio:9000" in str(error)


def test_a_name_that_no_bucket_can_have_is_a_recipe_error(s3: s3_server.S3Server) -> None:
    assert isinstance(error_of(lambda: Store("s3://Not A Bucket/x").manifest(STAGE, KEY)), RecipeError)


def test_a_dead_endpoint_is_a_store_error_within_seconds(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # bound, not listening: connections are refused
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{unused.getsockname()[1]}")
        began = time.monotonic()
        error = error_of(lambda: Store(s3_uri).manifest(STAGE, KEY))
        assert time.monotonic() - began < 60
    assert isinstance(error, StoreError)
    assert "is the endpoint right and reachable?" in str(error)


class Flaky(http.server.BaseHTTPRequestHandler):
    """Passes requests on to the real server, but of the first bodies only a share."""

    server: "FlakyServer"

    def do_GET(self) -> None:
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0))) or None
        headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
        request = urllib.request.Request(self.server.behind + self.path, sent, headers, method=self.command)
        try:
            with urllib.request.urlopen(request) as answer:
                body, status, headers = answer.read(), answer.status, answer.headers
        except urllib.error.HTTPError as error:
            body, status, headers = error.read(), error.code, error.headers
        if self.server.knows_no_ranges:
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
    behind: str
    breaks_left: int
    breaks_from_bytes: int
    share: float
    ranges: list[str | None]
    knows_no_ranges: bool
    first_answers: dict[str, Any]


@pytest.fixture
def flaky(s3: s3_server.S3Server) -> Iterator[FlakyServer]:
    with FlakyServer(("127.0.0.1", 0), Flaky) as server:
        server.behind, server.breaks_left, server.breaks_from_bytes, server.ranges = s3.endpoint, 0, 100_000, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        server.share, server.knows_no_ranges, server.first_answers = 0.5, False, {}
        yield server
        server.shutdown()


def behind(
    flaky: FlakyServer, uri: str, monkeypatch: pytest.MonkeyPatch, retry_policy: RetryPolicy | None = None
) -> Store:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{flaky.server_address[1]}")
    return Store(uri, retry_policy)


def test_a_download_that_breaks_goes_on_where_it_broke(
    flaky: FlakyServer, s3_uri: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = Store(s3_uri).publish(samples.make_folder(tmp_path / "large", size_bytes=5_000_000), samples.draft())
    store = behind(flaky, s3_uri, monkeypatch)
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
    store = behind(flaky, s3_uri, monkeypatch, RetryPolicy(0.5))
    flaky.breaks_left, flaky.breaks_from_bytes, flaky.share = 1000, 1, 0.0
    error = error_of(lambda: store.fetch(published, tmp_path / "target" / "fetched"))
    assert isinstance(error, StoreError)
    assert "the connection broke" in str(error) or "endpoint" in str(error)
    assert list((tmp_path / "target").iterdir()) == []


def test_a_download_goes_on_though_the_server_knows_no_ranges(
    flaky: FlakyServer, s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It answers 200 and the whole object to whoever asks for the rest."""
    published = Store(s3_uri).publish(samples.make_folder(tmp_path / "large", size_bytes=5_000_000), samples.draft())
    store = behind(flaky, s3_uri, monkeypatch)
    flaky.breaks_left, flaky.knows_no_ranges = 2, True
    store.fetch(published, tmp_path / "fetched", "adapter/")
    assert samples.content(tmp_path / "fetched/adapter") == samples.content(tmp_path / "large/adapter")
    assert flaky.breaks_left == 0


def test_a_download_that_breaks_at_the_same_place_for_ever_is_given_up(
    flaky: FlakyServer, s3_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = Store(s3_uri).publish(samples.make_folder(tmp_path / "large", size_bytes=5_000_000), samples.draft())
    store = behind(flaky, s3_uri, monkeypatch, RetryPolicy(0.5))
    flaky.breaks_left, flaky.knows_no_ranges = 1000, True
    with pytest.raises(StoreError, match="gave up after"):
        store.fetch(published, tmp_path / "fetched", "adapter/adapter_model.safetensors")


def test_a_small_object_that_comes_by_half_is_asked_for_again(
    flaky: FlakyServer, s3_uri: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record or a manifest cut off on its way is no damaged one."""
    published = Store(s3_uri).publish(folder, samples.draft())
    store = behind(flaky, s3_uri, monkeypatch)
    flaky.breaks_left, flaky.breaks_from_bytes = 2, 1
    assert store.manifest(STAGE, KEY) == published
    assert flaky.breaks_left == 0


def test_an_object_that_is_there_is_known_as_ours_though_it_comes_by_half(
    flaky: FlakyServer, s3_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Taken for another writer's, our own manifest would lose its files."""
    Store(s3_uri).objects.create("manifest.json", b"ours, written by a try whose answer was lost")
    store = behind(flaky, s3_uri, monkeypatch)
    flaky.breaks_left, flaky.breaks_from_bytes = 1, 1
    assert store.objects.create("manifest.json", b"ours, written by a try whose answer was lost") is True
    assert flaky.breaks_left == 0
