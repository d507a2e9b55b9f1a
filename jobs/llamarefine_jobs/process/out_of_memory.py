"""Memory that runs out: how it is recognised, what to change, and how a training goes on with less."""

import contextlib
import errno
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence

from llamarefine_jobs.contract.errors import OutOfMemoryError
from llamarefine_jobs.contract.recipe import Dpo, Recipe, Sft
from llamarefine_jobs.contract.stages import STAGES
from llamarefine_jobs.process import sigterm
from llamarefine_jobs.store import Store

# What torch raises as a RuntimeError: for the GPU outside its own allocator, and for a CPU.
_GPU = re.compile(
    r"CUDA out of memory|CUDA (driver )?error: out of memory|CU(BLAS|DNN|SOLVER|SPARSE)_STATUS_ALLOC_FAILED"
    r"|cudaErrorMemoryAllocation|Cuda failure.*out of memory"  # the last is NCCL's
)
_CPU = re.compile(r"DefaultCPUAllocator: (can't allocate|not enough) memory|std::bad_alloc|Cannot allocate memory")
OOM_METRIC = "ran_out_of_memory_at_micro_batch_rows"  # in the metrics of checkpoints and artifact
OOM_VARIABLE = "LLAMAREFINE_RAN_OUT_AT_ROWS"  # the same as a JSON list, from whoever starts a stage anew


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says, in whatever library's words, that memory ran out."""
    return (
        isinstance(error, MemoryError | OutOfMemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or type(error).__name__ == "OutOfMemoryError"  # torch's own is named so as not to import torch here
        or any(words.search(str(error)) for words in (_GPU, _CPU))
    )


def out_of_memory_error(stage_name: str, error: BaseException) -> OutOfMemoryError:
    """The one line for such an error: which memory, and the setting to change."""
    if isinstance(error, OutOfMemoryError):
        return error
    said = next(iter(str(error).splitlines()), "")
    on_gpu = _GPU.search(str(error)) or type(error).__name__ == "OutOfMemoryError"
    whose = "the GPU's memory is too small" if on_gpu else f"{stage_name} needs more memory than it gets here"
    return OutOfMemoryError(f"{whose}{': ' if said else ''}{said}; {_smaller(stage_name)}")


@contextlib.contextmanager
def halving_micro_batches(stage_name: str, recipe: Recipe) -> Iterator[None]:
    """Where `on_out_of_memory: halve_micro_batch` says so, answer memory that runs out by starting anew with less.

    The process replaces itself: nothing else frees all of a GPU's memory for certain. It goes on from
    the newest checkpoint. The rows of an optimizer step stay the same, and with them the artifact's key.
    """
    try:
        yield
    except Exception as error:
        section = section_that_halves(stage_name, recipe)
        if section is None or not is_out_of_memory(error):
            raise
        if section.micro_batch_rows == 1:
            raise OutOfMemoryError(
                f"memory is too small for {stage_name} even with micro_batch_rows 1: lower max_length_tokens, set "
                f"{stage_name}.gradient_checkpointing to true, or give it more memory"
            ) from None
        _start_anew(stage_name, section)


def with_remembered_micro_batch(stage_name: str, recipe: Recipe, store: Store, key: str) -> Recipe:
    """`recipe`, with smaller micro-batches where an earlier pod found its own too large and a checkpoint says so."""
    section = section_that_halves(stage_name, recipe)
    if section is None:
        return recipe
    too_large = sorted({*oom_micro_batch_rows(), *_remembered(stage_name, store, key)}, reverse=True)
    fitting = with_micro_batch_below(section, too_large)
    if fitting is section:
        return recipe
    os.environ[OOM_VARIABLE] = json.dumps(too_large)
    print(
        f"{stage_name}: micro-batches of {fitting.micro_batch_rows} rows: with {too_large[-1]} memory ran out before; "
        f"the {section.batch_rows} rows of a step stay",
        flush=True,
    )
    return recipe.model_copy(update={stage_name: fitting})


def _remembered(stage_name: str, store: Store, key: str) -> list[int]:
    """What the newest complete checkpoint says of micro-batches that were too large."""
    for step in reversed(store.checkpoint_steps(stage_name, key)):
        if manifest := store.checkpoint_manifest(stage_name, key, step):
            found = manifest.metrics.get(OOM_METRIC)
            return [rows for rows in found if type(rows) is int and rows > 1] if isinstance(found, list) else []
    return []


def oom_micro_batch_rows() -> list[int]:
    """The micro-batches, in rows, that were too large for this training so far."""
    found: list[int] = json.loads(os.environ.get(OOM_VARIABLE, "[]"))
    return found


def section_that_halves(stage_name: str, recipe: Recipe) -> Sft | Dpo | None:
    """A stage's section, where it says that a training out of memory goes on with smaller micro-batches."""
    section = recipe.section(stage_name)
    if isinstance(section, Sft | Dpo) and section.on_out_of_memory == "halve_micro_batch":
        return section
    return None


def with_micro_batch_below(section: Sft | Dpo, too_large: Sequence[int]) -> Sft | Dpo:
    """`section` with micro-batches under all that were too large, or of one row."""
    while too_large and 1 < section.micro_batch_rows >= min(too_large):
        section = section.model_copy(update={"micro_batch_rows": halved_micro_batch_rows(section)})
    return section


def halved_micro_batch_rows(section: Sft | Dpo) -> int:
    """Half of `micro_batch_rows`, or the next smaller number that `batch_rows` is a multiple of."""
    processes = section.gpus * section.nodes
    halves = range(section.micro_batch_rows // 2, 0, -1)
    return next(rows for rows in halves if section.batch_rows % (rows * processes) == 0)


def _start_anew(stage_name: str, section: Sft | Dpo) -> None:
    rows = halved_micro_batch_rows(section)
    print(
        f"{stage_name}: memory ran out with micro-batches of {section.micro_batch_rows} rows: starts anew with {rows}, "
        f"from the newest checkpoint; the {section.batch_rows} rows of a step stay",
        flush=True,
    )
    sys.stderr.flush()
    os.environ[OOM_VARIABLE] = json.dumps([*oom_micro_batch_rows(), section.micro_batch_rows])
    again = ["-m", STAGES[stage_name].module, *sys.argv[1:], "--set", f"{stage_name}.micro_batch_rows={rows}"]
    sigterm.keep_pending_across_exec()
    os.execv(sys.executable, [sys.executable, *again])  # noqa: S606 - this very program


def _smaller(stage_name: str) -> str:
    if STAGES[stage_name].has_checkpoints:
        return (
            f"lower {stage_name}.micro_batch_rows (the result stays that of batch_rows) or max_length_tokens, "
            f"or set {stage_name}.on_out_of_memory to halve_micro_batch"
        )
    return f"lower {stage_name}.batch_rows" if stage_name in ("evaluate", "infer") else "use a larger machine"
