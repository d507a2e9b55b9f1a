"""All errors of the package, each with its exit code and what an executor does about it.

A stage's exit code tells its executor why it failed: the local executor prints the reason, and a
Job's podFailurePolicy is generated from `Disposition`. Exit codes that shells use themselves
(2, 126 to 165, and 1 except for the base class) are not used.
"""

import errno
from enum import Enum
from typing import ClassVar


class Disposition(Enum):
    """What an executor does with a stage that ended with an error."""

    FAIL = "fail"  # the same input fails the same way: stop at once and report why
    RETRY = "retry"  # the failure may pass: start the stage again, and count the attempts
    RESUME = "resume"  # not the stage's failure: start it again from its checkpoint, without counting the attempt


class LlamaRefineError(Exception):
    """Base class of all errors: a one-line message that a person can act on. Raised directly for any other failure."""

    exit_code: ClassVar[int] = 1
    reason: ClassVar[str] = "failed"
    disposition: ClassVar[Disposition] = Disposition.FAIL


class RecipeError(LlamaRefineError):
    """The recipe, a setting, an environment variable or a command's arguments are wrong."""

    exit_code = 10
    reason = "recipe"


class DataError(LlamaRefineError):
    """A file, a table, a model, an adapter or an artifact that is needed is missing or cannot be used as it is."""

    exit_code = 11
    reason = "data"


class AccessError(LlamaRefineError):
    """A folder, bucket, web server, cluster or key cannot be accessed with the permissions and addresses given."""

    exit_code = 12
    reason = "permission"


class DiskFullError(LlamaRefineError):
    """No space is left on the local disk or in the bucket."""

    exit_code = 13
    reason = "disk full"


class OutOfMemoryError(LlamaRefineError):
    """The GPU or the machine has, or by the estimate will have, too little memory for the recipe."""

    exit_code = 14
    reason = "out of memory"


class DivergedError(LlamaRefineError):
    """A training or a model became numerically unusable.

    Raised if the training loss is NaN, infinite or several nats above the first one, if a validation loss, a weight of
    the adapter or the tiny base's loss is not finite, and if a model gives a test answer no finite log-probability.
    """

    exit_code = 15
    reason = "diverged"


class IntegrityError(LlamaRefineError):
    """Stored bytes are damaged, unsafe, or not what they should be.

    Raised if bytes differ from their digest, if a document in the store cannot be read or belongs to something else,
    if artifacts do not belong together, if a signature is wrong, and if a file could execute code.
    """

    exit_code = 16
    reason = "integrity"


class ProofError(LlamaRefineError):
    """A self-check of a training or of the merge failed, so the result would be wrong."""

    exit_code = 17
    reason = "proof"


class GateError(LlamaRefineError):
    """The evaluation does not pass a quality gate of the recipe; model and report are kept."""

    exit_code = 18
    reason = "quality gate"


class StoreError(LlamaRefineError):
    """The bucket, the API server, the Hub or a web server failed in a way that may pass."""

    exit_code = 20
    reason = "store"
    disposition = Disposition.RETRY
    retry_after_s: float | None = 0.0  # pause that the server asked for; None: the same request would fail again


class PeerLostError(LlamaRefineError):
    """A training in several processes lost one of them, or they could not start together."""

    exit_code = 21
    reason = "process lost"
    disposition = Disposition.RETRY


class PreemptedError(LlamaRefineError):
    """The stage was stopped from outside: by SIGTERM, Ctrl-C, or the removal of its Job.

    A training has tried to save a checkpoint; the message says whether that succeeded.
    """

    exit_code = 30
    reason = "preempted"
    disposition = Disposition.RESUME


def all_errors() -> list[type[LlamaRefineError]]:
    """Return every error class that has its own exit code, sorted by exit code."""
    return sorted(LlamaRefineError.__subclasses__(), key=lambda kind: kind.exit_code)


def by_exit_code(exit_code: int) -> type[LlamaRefineError]:
    """Return the error class with this exit code; LlamaRefineError if there is none."""
    kinds = {kind.exit_code: kind for kind in all_errors()}
    return kinds.get(exit_code, LlamaRefineError)


def from_os_error(error: OSError) -> LlamaRefineError:
    """Return the error of this module that corresponds to an OSError, with the path that it names."""
    where = f" {error.filename}" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskFullError(f"no space is left to write{where}: free some, then run the same command again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return AccessError(f"no permission for{where}: {error.strerror}; choose another folder or change its owner")
    if "No usable temporary directory" in str(error):  # tempfile's message if it cannot write, such as on a full disk
        return DiskFullError("no temporary folder can be written to: free some space, or set TMPDIR to another folder")
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
        return DataError(f"cannot read{where}: {error.strerror}")
    return LlamaRefineError(f"operating system error{where and f' on{where}'}: {error.strerror or error}")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
