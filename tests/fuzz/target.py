"""What every fuzzed reader promises: a right result or an error of ours, in one piece, and soon."""

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

# `make fuzz` asks for many; `make test` takes what seconds allow. The same count gives the same inputs.
INPUTS = int(os.environ.get("LLAMAREFINE_FUZZ", "0"))
SHORT = 60
_HANG_S = 60  # far past what any of these inputs takes on a busy machine: a bound on hanging, not a measure

_COUNTS = st.integers(0, 6)
_PLACES = st.integers(0, 1 << 16)
_BYTES = st.integers(0, 255)
_KINDS = st.sampled_from(["cut", "copy", "byte", "piece"])


def fuzzed(share: float = 1.0) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test on so many inputs; `share` is less than 1 for a reader that is slow to start."""
    count = max(20, round((INPUTS or SHORT) * share))
    return settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


@contextmanager
def held(reader: str) -> Iterator[None]:
    """Let errors of ours pass; any other error, and a reader that does not come back, fails the test."""

    def on_alarm(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"{reader} did not come back within {_HANG_S} s")

    assert threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.alarm(_HANG_S)
    try:
        yield
    except LlamaRefineError as error:
        said = str(error).strip()
        if not said:
            raise AssertionError(f"{reader} refused without a word") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def mutated(draw: Any, text: bytes, pieces: list[bytes]) -> bytes:
    """`text` with a few cuts, copies, changed bytes and hostile pieces in it: near enough to right to get far."""
    data = bytearray(text)
    for _ in range(draw(_COUNTS)):
        at = draw(_PLACES) % (len(data) + 1)
        match draw(_KINDS):
            case "cut":
                del data[at : at + 1 + draw(_PLACES) % 24]
            case "copy":
                data[at:at] = data[at : at + 1 + draw(_PLACES) % 64]
            case "byte":
                data[at : at + 1] = bytes([draw(_BYTES)])
            case _:
                data[at:at] = pieces[draw(_PLACES) % len(pieces)]
    return bytes(data)
