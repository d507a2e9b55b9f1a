"""Common parts of the fuzz tests: every reader must return a valid result or raise a LlamaRefineError, in time."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from llamarefine_jobs.contract.errors import LlamaRefineError

# `make fuzz` sets a large number; the default of `make test` takes seconds. The same number gives the same inputs.
INPUTS = int(os.environ.get("LLAMAREFINE_FUZZ", "0"))
SHORT = 60
_HANG_S = 60  # detects a hang; far longer than any of these inputs takes on a busy machine

_COUNTS = st.integers(0, 6)
_OFFSETS = st.integers(0, 1 << 16)
_BYTES = st.integers(0, 255)
_KINDS = st.sampled_from(["cut", "copy", "byte", "piece"])


def fuzzed(share: float = 1.0) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Return hypothesis settings for the number of inputs; `share` reduces it for a slow reader."""
    count = max(20, round((INPUTS or SHORT) * share))
    return settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def allow_refusal(reader: str) -> Iterator[None]:
    """Accept a LlamaRefineError with a message; fail on any other error and on a reader that hangs."""

    def on_alarm(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"{reader} was not read within {_HANG_S} s")

    assert threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.alarm(_HANG_S)
    try:
        yield
    except LlamaRefineError as error:
        if not str(error).strip():
            raise AssertionError(f"{reader}: an error without a message") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def mutated(draw: Any, text: bytes, pieces: list[bytes]) -> bytes:
    """Return `text` with a few cuts, copies, changed bytes and hostile pieces, so that it passes the first checks."""
    data = bytearray(text)
    for _ in range(draw(_COUNTS)):
        at = draw(_OFFSETS) % (len(data) + 1)
        match draw(_KINDS):
            case "cut":
                del data[at : at + 1 + draw(_OFFSETS) % 24]
            case "copy":
                data[at:at] = data[at : at + 1 + draw(_OFFSETS) % 64]
            case "byte":
                data[at : at + 1] = bytes([draw(_BYTES)])
            case _:
                data[at:at] = pieces[draw(_OFFSETS) % len(pieces)]
    return bytes(data)
