"""Retry policy: how long an outage is retried, what is reported, and where the limit comes from."""

from collections.abc import Callable

import pytest

from llamarefine_jobs.contract import retry
from llamarefine_jobs.contract.environment import GIVE_UP_VARIABLE
from llamarefine_jobs.contract.errors import RecipeError, StoreError
from llamarefine_jobs.contract.retry import GIVE_UP_AFTER_S, RetryPolicy, give_up_after_s


class Clock:
    """Replaces the module `time`: only `sleep` and the test move this clock."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.pauses_s: list[float] = []

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.pauses_s.append(seconds)
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(retry, "time", clock)
    return clock


def failing(times: int | None, retry_after_s: float | None = 0.0) -> Callable[[], str]:
    """Return a request that fails `times` times and then succeeds; None: it always fails."""
    attempts = 0

    def request() -> str:
        nonlocal attempts
        attempts += 1
        if times is None or attempts <= times:
            error = StoreError("the bucket is unreachable")
            error.retry_after_s = retry_after_s
            raise error
        return f"attempt {attempts}"

    return request


def test_the_limit_is_read_from_the_environment() -> None:
    assert give_up_after_s({}) == GIVE_UP_AFTER_S
    assert give_up_after_s({GIVE_UP_VARIABLE: "1800"}) == 1800.0


@pytest.mark.parametrize("text", ["", "soon", "nan", "inf", "-1"])
def test_a_limit_that_is_no_number_of_seconds_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=f"^{GIVE_UP_VARIABLE}: expected a number of seconds, found {text}$"):
        give_up_after_s({GIVE_UP_VARIABLE: text})


def test_a_stage_retries_for_as_long_as_its_environment_says(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(GIVE_UP_VARIABLE, "90")
    policy = retry.stage_retry_policy("sft")
    with pytest.raises(StoreError, match=r"^the bucket is unreachable; gave up after 90 s$"):
        policy.call(failing(None))
    assert clock.now_s == pytest.approx(90)
    assert capsys.readouterr().out == "sft: the bucket is unreachable; retrying for up to 90 s\n"


def test_pauses_grow_up_to_ten_seconds(clock: Clock) -> None:
    assert RetryPolicy(600).call(failing(12)) == "attempt 13"
    assert clock.pauses_s[0] <= 0.25
    assert 5 <= clock.pauses_s[-1] <= 10


def test_the_pause_that_a_server_asks_for_is_kept(clock: Clock) -> None:
    RetryPolicy(600).call(failing(3, retry_after_s=30))
    assert clock.pauses_s == [30, 30, 30]


def test_an_error_that_a_retry_cannot_help_is_raised_at_once(clock: Clock) -> None:
    with pytest.raises(StoreError, match=r"^the bucket is unreachable$"):
        RetryPolicy(600).call(failing(None, retry_after_s=None))
    assert clock.pauses_s == []


def test_an_outage_is_reported_once_when_it_lasts_and_once_when_it_is_over(clock: Clock) -> None:
    lines: list[str] = []
    policy = RetryPolicy(600, lines.append)
    policy.call(failing(1))
    assert lines == [], "a short outage is not reported"
    before_s = clock.now_s
    policy.call(failing(9))
    outage_s = clock.now_s - before_s
    assert lines == [
        "the bucket is unreachable; retrying for up to 600 s",
        f"continues after an outage of {outage_s:.0f} s",
    ]


def test_before_the_first_success_the_limit_is_shorter(clock: Clock) -> None:
    policy = RetryPolicy(600, first_limit_s=5)
    with pytest.raises(StoreError, match="gave up after 5 s"):
        policy.call(failing(None))
    policy.call(failing(0))
    assert policy.limit_s == 600


def test_a_request_that_starts_late_in_an_outage_does_not_extend_it(clock: Clock) -> None:
    policy = RetryPolicy(60)
    policy.record_failure()
    clock.now_s = 61
    with pytest.raises(StoreError, match="gave up after 61 s"):
        policy.call(failing(None))
    assert clock.pauses_s == []
