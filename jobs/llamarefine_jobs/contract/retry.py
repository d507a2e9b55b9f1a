"""How long trouble that may pass by itself is waited out: the same for a bucket and for the API server."""

import os
import random
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from llamarefine_jobs.contract.errors import StoreError

GIVE_UP_AFTER_S = 600.0  # a run's: longer than an API server's upgrade or a bucket's restart
GIVE_UP_VARIABLE = "LLAMAREFINE_GIVE_UP_AFTER_S"
_AT_ONCE_S = 10.0  # a person's, who waits for an answer
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 10.0
_SAID_AFTER_S = 2.0  # a single dropped connection is nobody's business

Result = TypeVar("Result")


class RetryPolicy:
    """Of one client, whatever thread asks. An outage begins with a failure and ends with the next success.

    A request is tried again, after pauses that grow, until it, or the whole outage, has lasted `give_up_after_s`;
    before anything succeeded, `first_s`: a wrong address is told soon. `say` is given a line when an outage is
    waited out, and one when it is over.
    """

    def __init__(
        self,
        give_up_after_s: float = _AT_ONCE_S,
        say: Callable[[str], None] = lambda text: None,
        first_s: float | None = None,
    ) -> None:
        self.say = say
        self.has_succeeded = False  # anything, so far
        self._lasting_s = give_up_after_s
        self._limit_s = give_up_after_s if first_s is None else min(first_s, give_up_after_s)
        self._since_s: float | None = None
        self._said = False
        self._lock = threading.Lock()

    def call(self, work: Callable[[], Result]) -> Result:
        """What `work` returns; a StoreError of it is waited out, and raised when that took too long."""
        outage = self.new_state()
        while True:
            try:
                result = work()
            except StoreError as error:
                outage.wait(error)
            else:
                outage.end()
                return result

    def new_state(self) -> "RetryState":
        """The trouble of one request, which may not come."""
        return RetryState(self)

    def record_failure(self) -> float:
        """Take note of a failure; when the outage began."""
        with self._lock:
            if self._since_s is None:
                self._since_s = time.monotonic()
            return self._since_s

    def record_success(self) -> None:
        """Take note of a success."""
        with self._lock:
            self.has_succeeded, self._limit_s = True, self._lasting_s
            since_s, self._since_s = self._since_s, None
            said, self._said = self._said, False
        if since_s is not None and said:
            self.say(f"goes on after an outage of {time.monotonic() - since_s:.0f} s")

    def announce(self, error: StoreError) -> None:
        """Say once what is waited out."""
        with self._lock:
            said, self._said = self._said, True
        if not said and self._limit_s > _AT_ONCE_S:
            self.say(f"{error}; tries again for {self._limit_s:g} s")

    @property
    def limit_s(self) -> float:
        """How long an outage may last now."""
        return self._limit_s


def stage_retry_policy(name: str) -> RetryPolicy:
    """That of a stage, as its executor set it; it says what it waits for in the stage's log."""
    lasting_s = float(os.environ.get(GIVE_UP_VARIABLE, GIVE_UP_AFTER_S))
    return RetryPolicy(lasting_s, lambda text: print(f"{name}: {text}", flush=True))


class RetryState:
    """The trouble of one request."""

    def __init__(self, retry_policy: RetryPolicy) -> None:
        self._retry_policy = retry_policy
        self._since_s: float | None = None
        self._pause_s = _FIRST_PAUSE_S

    def wait(self, error: StoreError) -> None:
        """Pause before the next try; raises `error` where it lasts too long, or where waiting does not help."""
        began_s, now_s = self._retry_policy.record_failure(), time.monotonic()
        self._since_s = now_s if self._since_s is None else self._since_s
        lasted_s = now_s - min(began_s, self._since_s)
        left_s = self._retry_policy.limit_s - lasted_s
        if error.retry_after_s is None:
            raise error
        if left_s <= 0:
            raise StoreError(f"{error}; gave up after {lasted_s:.0f} s") from None
        if lasted_s > _SAID_AFTER_S:
            self._retry_policy.announce(error)
        pause_s = max(self._pause_s * random.uniform(0.5, 1), error.retry_after_s)  # noqa: S311 spreads, hides nothing
        self._pause_s = min(self._pause_s * 2, _LONGEST_PAUSE_S)
        time.sleep(min(pause_s, left_s))

    def end(self) -> None:
        """It works again: what comes next is another outage."""
        self._since_s, self._pause_s = None, _FIRST_PAUSE_S
        self._retry_policy.record_success()
