"""One tree of errors, and the exit code each means.

A stage's exit code is its word to whoever runs it: the local executor prints the reason, and the
Job's podFailurePolicy is generated from `Disposition`. The codes stay clear of the shell's own
(1, 2, 126 to 165).
"""

import errno
from enum import Enum
from typing import ClassVar


class Disposition(Enum):
    """What an executor does with a stage that ended this way."""

    FAIL = "fail"  # the same input fails the same way: stop at once, say why
    RETRY = "retry"  # may pass by itself: try again, count the tries
    RESUME = "resume"  # nobody's fault: try again from the checkpoint, do not count


class LlamaRefineError(Exception):
    """A failure with a reason a person can act on: one line, no traceback."""

    exit_code: ClassVar[int] = 1
    reason: ClassVar[str] = "failed"
    disposition: ClassVar[Disposition] = Disposition.FAIL


class RecipeError(LlamaRefineError):
    """The recipe, or an option on top of it, is wrong."""

    exit_code = 10
    reason = "recipe"


class DataError(LlamaRefineError):
    """The data, the base model or the tokenizer cannot be used as given."""

    exit_code = 11
    reason = "data"


class AccessError(LlamaRefineError):
    """Something may not be read or written: a folder, a bucket, the API server."""

    exit_code = 12
    reason = "permission"


class DiskFullError(LlamaRefineError):
    """No space is left where the stage works or publishes."""

    exit_code = 13
    reason = "disk full"


class OutOfMemoryError(LlamaRefineError):
    """The accelerator or the machine has too little memory for the recipe."""

    exit_code = 14
    reason = "out of memory"


class DivergedError(LlamaRefineError):
    """The loss became NaN or infinite."""

    exit_code = 15
    reason = "diverged"


class IntegrityError(LlamaRefineError):
    """Bytes are not those that the manifest promises."""

    exit_code = 16
    reason = "integrity"


class ProofError(LlamaRefineError):
    """A check of the training or of the merge itself failed: the result would be wrong."""

    exit_code = 17
    reason = "proof"


class GateError(LlamaRefineError):
    """A quality gate of the recipe does not hold; model and report are kept."""

    exit_code = 18
    reason = "quality gate"


class StoreError(LlamaRefineError):
    """The bucket or the network failed after the client's own retries."""

    exit_code = 20
    reason = "store"
    disposition = Disposition.RETRY
    retry_after_s: float | None = 0.0  # what the server asked for; None: the same request fails again


class PeerLostError(LlamaRefineError):
    """A process of a training on several is gone, and the others cannot go on without it."""

    exit_code = 21
    reason = "process lost"
    disposition = Disposition.RETRY


class PreemptedError(LlamaRefineError):
    """SIGTERM came; a checkpoint was saved where the stage has one."""

    exit_code = 30
    reason = "preempted"
    disposition = Disposition.RESUME


def all_errors() -> list[type[LlamaRefineError]]:
    """Every kind of error that has an exit code of its own, by exit code."""
    return sorted(LlamaRefineError.__subclasses__(), key=lambda kind: kind.exit_code)


def by_exit_code(exit_code: int) -> type[LlamaRefineError]:
    """The kind of error that a stage's exit code means; the root for a code of no kind."""
    kinds = {kind.exit_code: kind for kind in all_errors()}
    return kinds.get(exit_code, LlamaRefineError)


def from_os_error(error: OSError) -> LlamaRefineError:
    """The error of the tree that an operating system's error means, with the path it names."""
    where = f" {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskFullError(f"no space is left to write{where}: free some, then run the same command again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return AccessError(f"no permission for{where}: {error.strerror}; choose another folder or change its owner")
    if "No usable temporary directory" in str(error):  # tempfile's word where it can write to none, as on a full disk
        return DiskFullError("no temporary folder takes a file: free some space, or name another one by TMPDIR")
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return DataError(f"cannot read{where}: {error.strerror}")
    return LlamaRefineError(f"the operating system refused{where}: {error.strerror or error}")


def first_line(error: BaseException) -> str:
    """The first line of what `error` says; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
