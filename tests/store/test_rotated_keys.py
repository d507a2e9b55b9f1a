"""A bucket's keys are replaced while a client uses them: they are read again, and the refused request is retried.

The server is a MinIO whose keys really change. In between, the client still finds the former keys.
"""

import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from llamarefine_jobs.contract.environment import BUCKET_KEYS
from llamarefine_jobs.contract.errors import AccessError, StoreError
from llamarefine_jobs.contract.retry import RetryPolicy
from llamarefine_jobs.store import Store
from llamarefine_jobs.untrusted.log_redaction import redact

from .. import s3_server
from . import cutting_proxy, samples
from .conftest import Clock
from .samples import KEY, STAGE

URI = "s3://rotated/prefix"

PutKeys = Callable[[s3_server.RotatingMinio], None]


@pytest.fixture
def server(rotating_minio: s3_server.RotatingMinio, monkeypatch: pytest.MonkeyPatch) -> s3_server.RotatingMinio:
    """Return the server; the environment holds its address, but no keys."""
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    return rotating_minio


def in_mounted_secret(folder: Path, monkeypatch: pytest.MonkeyPatch) -> PutKeys:
    """Keys in files, as Kubernetes mounts a Secret; those in the environment are the ones that the pod started with."""
    monkeypatch.setenv(BUCKET_KEYS, str(folder))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.SECRET)

    return lambda server: server.write_keys(folder)


def in_credentials_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> PutKeys:
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "credentials"))

    def put(server: s3_server.RotatingMinio) -> None:
        text = f"[default]\naws_access_key_id = {server.key}\naws_secret_access_key = {server.secret}\n"
        (folder / "credentials").write_text(text)

    return put


class SecurityTokenService(http.server.BaseHTTPRequestHandler):
    """Gives the keys that belong to a web identity token, and refuses any other token."""

    server: "SecurityTokenServer"

    def do_POST(self) -> None:
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        keys = self.server.keys_of_token.get(form["WebIdentityToken"][0])
        if keys:
            body = (
                "<AssumeRoleWithWebIdentityResponse><AssumeRoleWithWebIdentityResult><Credentials>"
                f"<AccessKeyId>{keys[0]}</AccessKeyId><SecretAccessKey>{keys[1]}</SecretAccessKey><SessionToken/>"
                "<Expiration>2100-01-01T00:00:00Z</Expiration>"
                "</Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"
            )
        else:
            self.server.refused += 1
            body = "<ErrorResponse><Error><Code>InvalidIdentityToken</Code></Error></ErrorResponse>"
        self.send_response(200 if keys else 400)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *arguments: Any) -> None:
        pass


class SecurityTokenServer(http.server.ThreadingHTTPServer):
    keys_of_token: dict[str, tuple[str, str]]
    refused: int


@pytest.fixture
def sts() -> Iterator[SecurityTokenServer]:
    with SecurityTokenServer(("127.0.0.1", 0), SecurityTokenService) as server:
        server.keys_of_token, server.refused = {}, 0
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def assert_survives_rotation(server: s3_server.RotatingMinio, put_keys: PutKeys, folder: Path) -> None:
    """Rotate the keys of a store that is in use; what is published before and after must be there."""
    put_keys(server)
    notices: list[str] = []
    refused, is_published = threading.Event(), threading.Event()

    def notice(text: str) -> None:
        notices.append(text)
        refused.set()

    store = Store(URI, RetryPolicy(120, notice))
    store.write("runs/one/run.json", b"{}")
    server.rotate()
    with pytest.raises(StoreError, match="accepted before"):
        store.write("runs/one/run.json", b"{1}", retry=False)

    def publish() -> None:
        store.publish(folder, samples.draft())
        is_published.set()

    thread = threading.Thread(target=publish, daemon=True)
    thread.start()
    assert refused.wait(60), "no refusal was reported"
    assert not is_published.is_set()
    put_keys(server)
    thread.join(60)
    assert is_published.is_set()
    assert "refuses these credentials" in notices[0]
    assert notices[0].endswith("retrying for up to 120 s")
    assert notices[-1].startswith("continues after an outage")
    manifest = store.manifest(STAGE, KEY)
    assert manifest
    assert samples.content(store.fetch(manifest, folder.parent / "fetched")) == samples.content(folder)
    store.write("runs/one/run.json", b"{2}", retry=False)


@pytest.mark.parametrize("keep", [in_mounted_secret, in_credentials_file])
def test_replaced_keys_are_read_again_from_files(
    server: s3_server.RotatingMinio,
    keep: Callable[[Path, pytest.MonkeyPatch], PutKeys],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert_survives_rotation(server, keep(tmp_path, monkeypatch), folder)


def test_replaced_keys_of_a_web_identity_are_fetched_again(
    server: s3_server.RotatingMinio,
    sts: SecurityTokenServer,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The token in the file expires, too: STS refuses it until the file holds the next one."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", f"http://127.0.0.1:{sts.server_address[1]}")
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/llamarefine")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))

    def put(server: s3_server.RotatingMinio) -> None:
        token = f"token-for-{server.key}"
        sts.keys_of_token = {token: (server.key, server.secret)}
        (tmp_path / "token").write_text(token)

    rotate = server.rotate

    def rotate_and_expire() -> None:
        rotate()
        sts.keys_of_token = {}

    monkeypatch.setattr(server, "rotate", rotate_and_expire)
    assert_survives_rotation(server, put, folder)
    assert sts.refused


def test_keys_that_are_refused_at_first_are_an_error_at_once(
    server: s3_server.RotatingMinio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    in_mounted_secret(tmp_path, monkeypatch)(server)
    server.rotate()
    with pytest.raises(AccessError, match=r"refuses these credentials \(InvalidAccessKeyId\)") as caught:
        Store(URI, RetryPolicy(600)).read("something")
    assert "\n" not in str(caught.value)
    assert clock.pauses_s == []


def test_keys_that_vanish_for_a_moment_are_waited_for(
    server: s3_server.RotatingMinio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is being replaced may be absent, empty or cut short when it is read."""
    file, put = tmp_path / "credentials", in_credentials_file(tmp_path, monkeypatch)
    put(server)
    store = Store(URI, RetryPolicy(60))
    store.write("one", b"1")
    server.rotate()
    for damaged in ("", "[default]\naws_access_key_id = x\n", "no header\n"):
        file.write_text(damaged)
        with pytest.raises(StoreError):
            store.write("one", b"2", retry=False)
    put(server)
    assert store.read("one") == b"1"


def test_denied_access_is_retried_only_if_it_was_granted_before(
    s3: s3_server.S3Server, s3_uri: str, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    """Right keys may lack a permission for ever: that is no reason to wait."""
    with cutting_proxy.before(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        store = Store(s3_uri, RetryPolicy(600))
        assert store.read("one") is None
        proxy.denials_left = 1
        store.objects.client.close()  # type: ignore[union-attr]
        with pytest.raises(AccessError, match=r"refuses these credentials \(AccessDenied\)"):
            store.write("one", b"1")
        assert clock.pauses_s == []
        store.write("one", b"1")
        proxy.denials_left = 3
        store.objects.client.close()  # type: ignore[union-attr]
        store.write("one", b"2")
        assert proxy.denials_left == 0
        assert len(clock.pauses_s) == 3
        assert store.read("one") == b"2"


def test_mounted_keys_are_redacted_in_logs(
    server: s3_server.RotatingMinio, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_mounted_secret(tmp_path, monkeypatch)(server)
    Store(URI).read("something")
    assert server.secret not in redact(f"signing with {server.secret}")
