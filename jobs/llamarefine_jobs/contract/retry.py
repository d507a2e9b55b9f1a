"""Retries of requests to a bucket or the API server: how long a failure that may pass is retried, and how often."""

import math
import os
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from llamarefine_jobs.contract.environment import GIVE_UP_VARIABLE
from llamarefine_jobs.contract.errors import RecipeError, StoreError

GIVE_UP_AFTER_S = 600.0  # default of a run: longer than an API server's upgrade or a bucket's restart
_INTERACTIVE_LIMIT_S = 10.0  # default of a command that a person waits for
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 10.0
_ANNOUNCE_AFTER_S = 2.0  # a single dropped connection is not worth a log line

Result = TypeVar("Result")


def give_up_after_s(environment: Mapping[str, str]) -> float:
    """Return how many seconds one outage is retried, as `environment` sets it; GIVE_UP_AFTER_S by default.

    Raises RecipeError if the variable holds anything but a finite number of seconds.
    """
    text = environment.get(GIVE_UP_VARIABLE, str(GIVE_UP_AFTER_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise RecipeError(f"{GIVE_UP_VARIABLE}: expected a number of seconds, found {text}")
    return seconds


class RetryPolicy:
    """Retry policy shared by all threads of one client. An outage begins with a failure and ends with the next success.

    A failed request is retried, with growing pauses, until the request or the whole outage has lasted
    `give_up_after_s`. Before the first success of this client the limit is `first_limit_s`, because a wrong address
    should fail soon. `report` is called with one line when an outage is being retried, and with one when it is over.
    """

    def __init__(
        self,
        give_up_after_s: float = _INTERACTIVE_LIMIT_S,
        report: Callable[[str], None] = lambda text: None,
        first_limit_s: float | None = None,
    ) -> None:
        self.report = report
        self.has_succeeded = False  # whether any request of this client has succeeded so far
        self._limit_after_success_s = give_up_after_s
        self._limit_s = give_up_after_s if first_limit_s is None else min(first_limit_s, give_up_after_s)
        self._outage_began_s: float | None = None
        self._is_announced = False
        self._lock = threading.Lock()

    def call(self, work: Callable[[], Result]) -> Result:
        """Return what `work` returns. A StoreError is retried, and raised if the outage lasts too long."""
        state = self.new_state()
        while True:
            try:
                result = work()
            except StoreError as error:
                state.wait(error)
            else:
                state.end()
                return result

    def new_state(self) -> "RetryState":
        """Return the retry state for one request."""
        return RetryState(self)

    def record_failure(self) -> float:
        """Record a failed request; return when the current outage began."""
        with self._lock:
            if self._outage_began_s is None:
                self._outage_began_s = time.monotonic()
            return self._outage_began_s

    def record_success(self) -> None:
        """Record a successful request, which ends the outage."""
        with self._lock:
            self.has_succeeded, self._limit_s = True, self._limit_after_success_s
            began_s, self._outage_began_s = self._outage_began_s, None
            was_announced, self._is_announced = self._is_announced, False
        if began_s is not None and was_announced:
            self.report(f"continues after an outage of {time.monotonic() - began_s:.0f} s")

    def restart_outage(self) -> None:
        """Retry requests that begin now for the whole give-up time, even if the outage has already lasted that long."""
        with self._lock:
            if self._outage_began_s is not None:
                self._outage_began_s = time.monotonic()

    def announce(self, error: StoreError) -> None:
        """Report once per outage that the request is being retried, and for how long."""
        with self._lock:
            was_announced, self._is_announced = self._is_announced, True
        if not was_announced and self._limit_s > _INTERACTIVE_LIMIT_S:
            self.report(f"{error}; retrying for up to {self._limit_s:g} s")

    @property
    def limit_s(self) -> float:
        """How many seconds an outage may last now."""
        return self._limit_s


def stage_retry_policy(name: str) -> RetryPolicy:
    """Return a stage's retry policy, read from its environment; outages are reported in the stage's log."""
    return RetryPolicy(give_up_after_s(os.environ), lambda text: print(f"{name}: {text}", flush=True))


class RetryState:
    """Retry state of one request: when it first failed, and how long the next pause is."""

    def __init__(self, retry_policy: RetryPolicy) -> None:
        self._retry_policy = retry_policy
        self._first_failure_s: float | None = None
        self._pause_s = _FIRST_PAUSE_S

    def wait(self, error: StoreError) -> None:
        """Pause before the next attempt. Raises a StoreError if the outage lasts too long or a retry cannot help."""
        outage_began_s, now_s = self._retry_policy.record_failure(), time.monotonic()
        self._first_failure_s = now_s if self._first_failure_s is None else self._first_failure_s
        lasted_s = now_s - min(outage_began_s, self._first_failure_s)
        left_s = self._retry_policy.limit_s - lasted_s
        if error.retry_after_s is None:
            raise error
        if left_s <= 0:
            raise StoreError(f"{error}; gave up after {lasted_s:.0f} s") from None
        if lasted_s > _ANNOUNCE_AFTER_S:
            self._retry_policy.announce(error)
        pause_s = max(self._pause_s * random.uniform(0.5, 1), error.retry_after_s)  # noqa: S311 spreads load, no secret
        self._pause_s = min(self._pause_s * 2, _LONGEST_PAUSE_S)
        time.sleep(min(pause_s, left_s))

    def end(self) -> None:
        """Record that the request succeeded; a later failure begins a new outage."""
        self._first_failure_s, self._pause_s = None, _FIRST_PAUSE_S
        self._retry_policy.record_success()
