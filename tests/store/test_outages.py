"""A bucket that is away for some seconds, slow, or cut off again and again: waited out, and nothing torn."""

import threading
import time
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
from .cutting_proxy import CuttingProxy
from .samples import KEY, STAGE

LARGE_BYTES = 3_000_000


@pytest.fixture
def proxy(s3: s3_server.S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[CuttingProxy]:
    with cutting_proxy.before(s3.endpoint) as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", made.endpoint)
        yield made


@pytest.fixture
def store(proxy: CuttingProxy, s3_uri: str) -> Store:
    """A store behind the proxy, with a run's retry_policy, made short."""
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
    found = store.manifest(STAGE, KEY)
    assert found
    return found


WORK: list[Callable[[Store, Path], None]] = [write_record, publish, save_checkpoint, fetch]


def prepare(work: Callable[[Store, Path], None], store: Store, folder: Path) -> None:
    if work is fetch:
        store.publish(folder, samples.draft())


@pytest.mark.parametrize("work", WORK)
def test_a_bucket_that_is_away_for_seconds_is_waited_out(
    store: Store, proxy: CuttingProxy, folder: Path, work: Callable[[Store, Path], None]
) -> None:
    prepare(work, store, folder)
    with proxy.away(4):
        work(store, folder)


@pytest.mark.parametrize("work", WORK)
def test_a_bucket_that_goes_away_in_the_middle_is_waited_out(
    store: Store, proxy: CuttingProxy, folder: Path, work: Callable[[Store, Path], None]
) -> None:
    prepare(work, store, folder)
    timers = [threading.Timer(at_s, setattr, (proxy, "refuses", away)) for at_s, away in ((0.05, True), (2, False))]
    for timer in timers:
        timer.start()
    work(store, folder)
    timers[1].join()


@pytest.mark.parametrize("work", WORK)
def test_connections_cut_again_and_again_tear_nothing(
    store: Store, proxy: CuttingProxy, folder: Path, work: Callable[[Store, Path], None]
) -> None:
    prepare(work, store, folder)
    proxy.cut_after_bytes = 400_000  # no connection lives long enough for the large file
    stop = threading.Timer(4, setattr, (proxy, "cut_after_bytes", None))
    stop.start()
    work(store, folder)
    assert proxy.cuts or work is write_record
    stop.join()


@pytest.mark.parametrize("work", WORK)
def test_a_storm_of_503_is_waited_out(
    store: Store, proxy: CuttingProxy, folder: Path, work: Callable[[Store, Path], None]
) -> None:
    prepare(work, store, folder)
    store.objects.client.close()  # type: ignore[union-attr]  # each request comes by a new connection: a storm meets it
    proxy.slow_downs = 12
    work(store, folder)
    assert proxy.slow_downs < 12


@pytest.mark.parametrize("says", [b"404 Not Found", b"403 Forbidden"])
@pytest.mark.parametrize("work", WORK)
def test_a_stranger_at_the_buckets_address_is_waited_out(
    store: Store, proxy: CuttingProxy, folder: Path, work: Callable[[Store, Path], None], says: bytes
) -> None:
    """A pod's address that another one has now, or a proxy whose backend is gone."""
    prepare(work, store, folder)
    store.read("something")  # it answered as S3 before: the endpoint is right
    store.objects.client.close()  # type: ignore[union-attr]
    proxy.strangers, proxy.stranger_says = 4, says
    work(store, folder)
    assert proxy.strangers < 4


def test_a_stranger_from_the_beginning_is_a_wrong_endpoint(store: Store, proxy: CuttingProxy) -> None:
    proxy.strangers = 1
    with pytest.raises(AccessError, match="does not answer as S3"):
        store.read("something")
    assert proxy.strangers == 0


def test_a_bucket_that_falls_silent_is_waited_out(
    store: Store, proxy: CuttingProxy, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llamarefine_jobs.store.bucket._READ_TIMEOUT_S", 1)
    with proxy.away(4, "stalls"):
        publish(store, folder)


@pytest.mark.parametrize("lost", [1, 4, 6], ids=lambda lost: f"{lost} answers")
def test_a_manifest_whose_answer_was_lost_is_our_own_success(
    store: Store, proxy: CuttingProxy, folder: Path, lost: int
) -> None:
    proxy.lost_answers = lost
    assert store.objects.create("one", b"ours") is True
    assert proxy.lost_answers == 0
    assert store.read("one") == b"ours"
    proxy.lost_answers = lost
    assert store.objects.create("one", b"another's") is False


def test_an_outage_that_lasts_ends_with_one_clear_error_and_nothing_torn(
    proxy: CuttingProxy, s3_uri: str, folder: Path
) -> None:
    said: list[str] = []
    store = Store(s3_uri, RetryPolicy(12, said.append))
    store.manifest(STAGE, KEY)
    proxy.refuses = True
    began_s = time.monotonic()
    with pytest.raises(StoreError, match=r"is the endpoint right and reachable\?; gave up after 1\d s") as caught:
        store.publish(folder, samples.draft())
    assert time.monotonic() - began_s < 60
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 20
    assert len(said) == 1
    assert said[0].endswith("tries again for 12 s")
    assert proxy.connections < 8 * 4 * 12, "pauses grow"
    began_s = time.monotonic()
    with pytest.raises(StoreError):
        store.write("runs/one/run.json", b"{}")
    assert time.monotonic() - began_s < 10, "an outage that was given up is not waited out again"
    proxy.refuses = False
    assert store.manifest(STAGE, KEY) is None
    publish(store, folder)


def test_a_wrong_address_is_told_before_patience_begins(proxy: CuttingProxy, s3_uri: str) -> None:
    proxy.refuses = True
    began_s = time.monotonic()
    with pytest.raises(StoreError, match="gave up after"):
        Store(s3_uri, RetryPolicy(600, first_s=1)).manifest(STAGE, KEY)
    assert time.monotonic() - began_s < 30


def test_a_refused_precondition_is_not_waited_out(store: Store) -> None:
    error = StoreError("the same again")
    error.retry_after_s = None
    tries = []

    def fail() -> None:
        tries.append(1)
        raise error

    with pytest.raises(StoreError, match="the same again"):
        store.objects.retry_policy.call(fail)  # type: ignore[union-attr]
    assert len(tries) == 1


@pytest.fixture
def by_tls(s3: s3_server.S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CuttingProxy]:
    """A proxy that speaks TLS, with a certificate that the store is told to trust."""
    file, context = tls.certificate(tmp_path, "bucket")
    with cutting_proxy.before(s3.endpoint, tls=context) as made:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", made.endpoint)
        monkeypatch.setenv("AWS_CA_BUNDLE", str(file))
        yield made


def test_a_bucket_behind_tls_that_is_away_is_waited_out(by_tls: CuttingProxy, s3_uri: str, folder: Path) -> None:
    """A connection that ends in the middle of the greeting says nothing of certificates."""
    store = Store(s3_uri, RetryPolicy(30))
    with by_tls.away(4):
        publish(store, folder)
    assert by_tls.connections > 4


@pytest.mark.parametrize("greeting", ["another certificate", "no TLS"])
def test_who_has_the_address_of_a_bucket_behind_tls_for_a_while_is_waited_out(
    by_tls: CuttingProxy, s3_uri: str, tmp_path: Path, greeting: str
) -> None:
    """An ingress that starts again shows a certificate of its own, or none, until it has read its settings."""
    store = Store(s3_uri, RetryPolicy(30))
    store.write("runs/one/run.json", b"{}")
    store.objects.client.close()  # type: ignore[union-attr]
    stranger = tls.certificate(tmp_path, "stranger")[1] if greeting == "another certificate" else None
    by_tls.impostors = [stranger] * 6
    assert store.read("runs/one/run.json") == b"{}"
    assert by_tls.impostors == []


def test_a_certificate_that_nobody_trusts_is_told_at_once(by_tls: CuttingProxy, s3_uri: str, tmp_path: Path) -> None:
    by_tls.impostors = [tls.certificate(tmp_path, "stranger")[1]] * 4
    with pytest.raises(AccessError, match=r"is not trusted .* set AWS_CA_BUNDLE to its CA's file"):
        Store(s3_uri, RetryPolicy(30)).read("something")


def test_a_server_that_says_when_to_come_again_is_not_asked_before(store: Store, proxy: CuttingProxy) -> None:
    proxy.slow_downs, proxy.retry_after_s = 4, 3
    with pytest.raises(StoreError, match="SlowDown") as caught:
        store.write("runs/one/run.json", b"{}", retry=False)
    assert caught.value.retry_after_s == 3


def test_a_source_in_a_bucket_that_is_away_is_waited_out_by_the_stage_that_reads_it(
    store: Store, proxy: CuttingProxy, s3_uri: str, tmp_path: Path
) -> None:
    """For longer than a person at a terminal waits."""
    store.write("inputs/one/rows.csv", b"q,a")
    with proxy.away(12):
        assert download_s3(f"{s3_uri}/inputs/one/rows.csv", tmp_path).read_bytes() == b"q,a"
