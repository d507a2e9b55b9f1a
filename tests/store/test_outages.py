"""Temporary failures of a bucket are retried, and nothing half-written is left.

Each test counts the failures that the proxy caused, so that no test passes without an outage.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llamarefine_jobs.contract.artifact import Manifest
from llamarefine_jobs.contract.errors import AccessError, StoreError
from llamarefine_jobs.contract.retry import RetryPolicy
from llamarefine_jobs.sources.s3 import download_s3
from llamarefine_jobs.store import Store

from .. import s3_server
from . import cutting_proxy, samples, tls
from .conftest import Clock
from .cutting_proxy import CuttingProxy
from .samples import KEY, STAGE

LARGE_BYTES = 3_000_000
ATTEMPTS = 4  # boto3's attempts for one request; only after these the retry policy counts a failure

pytestmark = pytest.mark.usefixtures("clock")


@pytest.fixture
def proxy(s3: s3_server.S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[CuttingProxy]:
    with cutting_proxy.before(s3.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        yield proxy


@pytest.fixture
def store(proxy: CuttingProxy, s3_uri: str) -> Store:
    """Return a store behind the proxy, whose retry policy gives up after 30 s."""
    return Store(s3_uri, RetryPolicy(30))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return samples.make_folder(tmp_path / "made", size_bytes=LARGE_BYTES)


def write_record(store: Store, folder: Path) -> None:
    store.write("runs/one/run.json", b"{}")
    assert store.read("runs/one/run.json") == b"{}"


def publish(store: Store, folder: Path) -> None:
    samples.assert_only(store, store.publish(folder, samples.draft()))


def save_checkpoint(store: Store, folder: Path) -> None:
    store.publish_checkpoint(40, folder, samples.draft())
    into = folder.parent / "resumed"
    assert store.fetch_checkpoint(STAGE, KEY, into) == 40
    assert samples.content(into) == samples.content(folder)


def fetch(store: Store, folder: Path) -> None:
    fetched = store.fetch(_published(store), folder.parent / "fetched")
    assert samples.content(fetched) == samples.content(folder)


def _published(store: Store) -> Manifest:
    manifest = store.manifest(STAGE, KEY)
    assert manifest
    return manifest


WORK: list[Callable[[Store, Path], None]] = [write_record, publish, save_checkpoint, fetch]


def prepare(work: Callable[[Store, Path], None], store: Store, folder: Path) -> None:
    """Publish what `work` reads, then close the connections, so that the first request of `work` opens a new one."""
    if work is fetch:
        store.publish(folder, samples.draft())
    store.objects.client.close()  # type: ignore[union-attr]


@pytest.mark.parametrize("work", WORK)
def test_refused_connections_are_retried(
    store: Store, proxy: CuttingProxy, folder: Path, work: Callable[[Store, Path], None], clock: Clock
) -> None:
    prepare(work, store, folder)
    proxy.refusals_left = 3 * ATTEMPTS
    work(store, folder)
    assert proxy.refusals_left == 0
    assert proxy.refused == 3 * ATTEMPTS
    assert len(clock.pauses_s) == 3


@pytest.mark.parametrize("work", WORK)
def test_an_outage_in_the_middle_of_the_work_is_retried(
    store: Store, proxy: CuttingProxy, folder: Path, work: Callable[[Store, Path], None]
) -> None:
    prepare(work, store, folder)
    proxy.outage_at_byte = proxy.forwarded_bytes + (1 if work is write_record else LARGE_BYTES // 2)
    work(store, folder)
    assert proxy.outage_at_byte is None
    assert proxy.refusals_left == 0
    assert proxy.refused >= 3 * ATTEMPTS


@pytest.mark.parametrize("work", WORK)
def test_repeatedly_cut_connections_leave_no_partial_object(
    store: Store, proxy: CuttingProxy, folder: Path, work: Callable[[Store, Path], None]
) -> None:
    prepare(work, store, folder)
    proxy.cut_after_bytes = 1 if work is write_record else 400_000  # less than the large file has
    proxy.cuts_left = 6
    work(store, folder)
    assert proxy.cuts_left == 0


@pytest.mark.parametrize("work", WORK)
def test_503_slow_down_is_retried(
    store: Store, proxy: CuttingProxy, folder: Path, work: Callable[[Store, Path], None]
) -> None:
    prepare(work, store, folder)
    proxy.slow_downs_left = 3 * ATTEMPTS
    work(store, folder)
    assert proxy.slow_downs_left == 0


@pytest.mark.parametrize("status", [b"404 Not Found", b"403 Forbidden"])
@pytest.mark.parametrize("work", WORK)
def test_another_server_at_the_address_of_a_known_bucket_is_retried(
    store: Store, proxy: CuttingProxy, folder: Path, work: Callable[[Store, Path], None], status: bytes
) -> None:
    """Another pod has the bucket's address for a while, or a proxy's backend is gone."""
    store.read("something")  # the endpoint has answered as S3, so it is right
    prepare(work, store, folder)
    proxy.wrong_servers_left, proxy.wrong_server_status = 4, status
    work(store, folder)
    assert proxy.wrong_servers_left == 0


def test_another_server_at_the_first_request_is_a_wrong_endpoint(store: Store, proxy: CuttingProxy) -> None:
    proxy.wrong_servers_left = 1
    with pytest.raises(AccessError, match="does not answer as S3"):
        store.read("something")
    assert proxy.wrong_servers_left == 0


def test_a_silent_bucket_is_retried_after_the_read_timeout(
    store: Store, proxy: CuttingProxy, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamarefine_jobs.store.bucket._READ_TIMEOUT_S", 1)
    proxy.stalls_left = ATTEMPTS + 1
    publish(store, folder)
    assert proxy.stalls_left == 0


@pytest.mark.parametrize("lost", [1, 4, 6], ids=lambda lost: f"{lost} answers")
def test_create_recognizes_its_own_object_after_a_lost_answer(store: Store, proxy: CuttingProxy, lost: int) -> None:
    proxy.lost_answers_left = lost
    assert store.objects.create("one", b"ours") is True
    assert proxy.lost_answers_left == 0
    assert store.read("one") == b"ours"
    proxy.lost_answers_left = lost
    assert store.objects.create("one", b"another's") is False
    assert proxy.lost_answers_left == 0


def test_a_lasting_outage_ends_with_one_error_and_leaves_nothing_half_written(
    proxy: CuttingProxy, s3_uri: str, folder: Path, clock: Clock
) -> None:
    notices: list[str] = []
    store = Store(s3_uri, RetryPolicy(12, notices.append))
    store.manifest(STAGE, KEY)
    proxy.refuses = True
    with pytest.raises(StoreError, match=r"is the endpoint right and reachable\?; gave up after 12 s") as caught:
        store.publish(folder, samples.draft())
    assert clock.now_s == pytest.approx(12)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 20
    assert len(notices) == 1
    assert notices[0].endswith("retrying for up to 12 s")
    assert ATTEMPTS < proxy.refused <= 10 * ATTEMPTS, "the pauses grow"

    refused = proxy.refused
    with pytest.raises(StoreError):
        store.write("runs/one/run.json", b"{}")
    assert proxy.refused == refused + ATTEMPTS, "an outage that was given up is not retried again"

    proxy.refuses = False
    assert store.manifest(STAGE, KEY) is None
    publish(store, folder)


def test_before_the_first_success_retries_end_sooner(proxy: CuttingProxy, s3_uri: str, clock: Clock) -> None:
    """A wrong endpoint is reported soon."""
    proxy.refuses = True
    with pytest.raises(StoreError, match="gave up after 1 s"):
        Store(s3_uri, RetryPolicy(600, first_limit_s=1)).manifest(STAGE, KEY)
    assert clock.now_s == pytest.approx(1)
    assert proxy.refused


def test_an_error_that_would_repeat_is_not_retried(store: Store) -> None:
    error = StoreError("the same again")
    error.retry_after_s = None
    attempts = []

    def fail() -> None:
        attempts.append(1)
        raise error

    with pytest.raises(StoreError, match="the same again"):
        store.objects.retry_policy.call(fail)  # type: ignore[union-attr]
    assert len(attempts) == 1


@pytest.fixture
def tls_proxy(s3: s3_server.S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CuttingProxy]:
    """Yield a proxy with TLS, whose certificate the store trusts."""
    file, context = tls.certificate(tmp_path, "bucket")
    with cutting_proxy.before(s3.endpoint, tls=context) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", proxy.endpoint)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(file))
        yield proxy


def test_refused_tls_connections_are_retried(tls_proxy: CuttingProxy, s3_uri: str, folder: Path) -> None:
    """A connection that ends during the TLS handshake says nothing about the certificate."""
    tls_proxy.refusals_left = 3 * ATTEMPTS
    publish(Store(s3_uri, RetryPolicy(30)), folder)
    assert tls_proxy.refused == 3 * ATTEMPTS


@pytest.mark.parametrize("shown", ["another certificate", "no TLS"])
def test_another_server_at_the_address_of_a_known_tls_bucket_is_retried(
    tls_proxy: CuttingProxy, s3_uri: str, tmp_path: Path, shown: str
) -> None:
    """A restarting ingress shows a default certificate, or none, until it has read its settings."""
    store = Store(s3_uri, RetryPolicy(30))
    store.write("runs/one/run.json", b"{}")
    store.objects.client.close()  # type: ignore[union-attr]
    wrong = tls.certificate(tmp_path, "stranger")[1] if shown == "another certificate" else None
    tls_proxy.wrong_certificates = [wrong] * 6
    assert store.read("runs/one/run.json") == b"{}"
    assert tls_proxy.wrong_certificates == []


def test_an_untrusted_certificate_at_the_first_request_is_an_error(
    tls_proxy: CuttingProxy, s3_uri: str, tmp_path: Path, clock: Clock
) -> None:
    tls_proxy.wrong_certificates = [tls.certificate(tmp_path, "stranger")[1]] * ATTEMPTS
    with pytest.raises(AccessError, match=r"is not trusted .* set AWS_CA_BUNDLE to its CA's file"):
        Store(s3_uri, RetryPolicy(30)).read("something")
    assert clock.pauses_s == []


def test_retry_after_lengthens_the_pause(store: Store, proxy: CuttingProxy, clock: Clock) -> None:
    proxy.slow_downs_left, proxy.retry_after_s = ATTEMPTS, 3
    with pytest.raises(StoreError, match="SlowDown") as caught:
        store.write("runs/one/run.json", b"{}", retry=False)
    assert caught.value.retry_after_s == 3
    assert clock.pauses_s == []
    proxy.slow_downs_left = ATTEMPTS
    store.write("runs/one/run.json", b"{}")
    assert clock.pauses_s == [3]


def test_a_stage_retries_its_sources_for_longer_than_a_command_does(
    store: Store, proxy: CuttingProxy, s3_uri: str, tmp_path: Path, clock: Clock
) -> None:
    store.write("inputs/one/rows.csv", b"q,a")
    proxy.refusals_left = 7 * ATTEMPTS  # seven pauses are longer than the 10 s of a command
    assert download_s3(f"{s3_uri}/inputs/one/rows.csv", tmp_path).read_bytes() == b"q,a"
    assert proxy.refused == 7 * ATTEMPTS
    assert clock.now_s > 10
