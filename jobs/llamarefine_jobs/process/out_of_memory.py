"""Out-of-memory errors: how they are recognised, which setting to change, how a training resumes with less memory."""

import contextlib
import errno
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence

from llamarefine_jobs.contract.environment import OOM_VARIABLE
from llamarefine_jobs.contract.errors import OutOfMemoryError
from llamarefine_jobs.contract.recipe import Dpo, Recipe, Sft
from llamarefine_jobs.contract.stages import STAGES
from llamarefine_jobs.process import sigterm
from llamarefine_jobs.store import Store

# Messages of RuntimeErrors of torch: for a GPU outside of torch's own allocator, and for a CPU.
_GPU = re.compile(
    r"CUDA out of memory|CUDA (driver )?error: out of memory|CU(BLAS|DNN|SOLVER|SPARSE)_STATUS_ALLOC_FAILED"
    r"|cudaErrorMemoryAllocation|Cuda failure.*out of memory"  # the last is NCCL's
)
_CPU = re.compile(r"DefaultCPUAllocator: (can't allocate|not enough) memory|std::bad_alloc|Cannot allocate memory")
OOM_METRIC = "ran_out_of_memory_at_micro_batch_rows"  # in manifests' metrics: rows in a pass that were too many


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` is an out-of-memory error of Python, the operating system, torch or a CUDA library."""
    return (
        isinstance(error, MemoryError | OutOfMemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or type(error).__name__ == "OutOfMemoryError"  # torch's class, by name: torch is not imported here
        or any(words.search(str(error)) for words in (_GPU, _CPU))
    )


def out_of_memory_error(stage_name: str, error: BaseException) -> OutOfMemoryError:
    """Return a one-line error that says which memory was too small and which setting to change."""
    if isinstance(error, OutOfMemoryError):
        return error
    message = next(iter(str(error).splitlines()), "")
    on_gpu = _GPU.search(str(error)) or type(error).__name__ == "OutOfMemoryError"
    what = "the GPU's memory is too small" if on_gpu else f"{stage_name} needs more memory than it gets here"
    return OutOfMemoryError(f"{what}{': ' if message else ''}{message}; {_advice(stage_name)}")


@contextlib.contextmanager
def halving_micro_batches(stage_name: str, recipe: Recipe) -> Iterator[None]:
    """With `on_out_of_memory: halve_micro_batch`, restart the stage with smaller micro-batches if memory runs out.

    The process replaces itself by exec, because nothing else reliably frees all of a GPU's memory. The training resumes
    from the newest checkpoint. The rows of an optimizer step stay the same, and with them the artifact's key. Without
    `micro_batch_rows` in the recipe, the first restart sets it to half of the rows of a process's part of a batch.
    """
    try:
        yield
    except Exception as error:
        section = section_that_halves(stage_name, recipe)
        if section is None or not is_out_of_memory(error):
            raise
        if section.pass_rows == 1:
            raise OutOfMemoryError(
                f"memory is too small for {stage_name} even with one row in a pass: lower max_length_tokens, set "
                f"{stage_name}.gradient_checkpointing to true, or give it more memory"
            ) from None
        _restart(stage_name, section)


def with_remembered_micro_batch(stage_name: str, recipe: Recipe, store: Store, key: str) -> Recipe:
    """Return `recipe`, with smaller micro-batches if earlier attempts ran out of memory.

    The environment and the newest checkpoint record the micro-batches of earlier attempts that were too large.
    """
    section = section_that_halves(stage_name, recipe)
    if section is None:
        return recipe
    too_large = sorted({*oom_micro_batch_rows(), *_rows_in_checkpoint(stage_name, store, key)}, reverse=True)
    fitting = with_micro_batch_below(section, too_large)
    if fitting is section:
        return recipe
    os.environ[OOM_VARIABLE] = json.dumps(too_large)
    print(
        f"{stage_name}: micro-batches of up to {fitting.pass_rows} rows, because memory ran out with {too_large[-1]} "
        f"before; a step still has {section.batch_rows} rows",
        flush=True,
    )
    return recipe.model_copy(update={stage_name: fitting})


def _rows_in_checkpoint(stage_name: str, store: Store, key: str) -> list[int]:
    """Return the too large micro-batches, in rows, that the newest complete checkpoint records."""
    for step in reversed(store.checkpoint_steps(stage_name, key)):
        if manifest := store.checkpoint_manifest(stage_name, key, step):
            found = manifest.metrics.get(OOM_METRIC)
            return [rows for rows in found if type(rows) is int and rows > 1] if isinstance(found, list) else []
    return []


def oom_micro_batch_rows() -> list[int]:
    """Return the micro-batches, in rows, that were too large for this training so far, read from the environment."""
    found: list[int] = json.loads(os.environ.get(OOM_VARIABLE, "[]"))
    return found


def section_that_halves(stage_name: str, recipe: Recipe) -> Sft | Dpo | None:
    """Return a stage's section if it sets `on_out_of_memory: halve_micro_batch`, otherwise None."""
    section = recipe.section(stage_name)
    if isinstance(section, Sft | Dpo) and section.on_out_of_memory == "halve_micro_batch":
        return section
    return None


def with_micro_batch_below(section: Sft | Dpo, too_large: Sequence[int]) -> Sft | Dpo:
    """Return `section` with `micro_batch_rows` lowered below every number in `too_large`, but not below 1."""
    while too_large and 1 < section.pass_rows >= min(too_large):
        section = section.model_copy(update={"micro_batch_rows": halved_micro_batch_rows(section)})
    return section


def halved_micro_batch_rows(section: Sft | Dpo) -> int:
    """Return half of the rows in a pass, or the next smaller number that divides a process's part of `batch_rows`."""
    halves = range(section.pass_rows // 2, 0, -1)
    return next(rows for rows in halves if section.batch_rows % (rows * section.processes) == 0)


def _restart(stage_name: str, section: Sft | Dpo) -> None:
    rows = halved_micro_batch_rows(section)
    print(
        f"{stage_name}: memory ran out with micro-batches of up to {section.pass_rows} rows: restarts with {rows} "
        f"from the newest checkpoint; a step still has {section.batch_rows} rows",
        flush=True,
    )
    sys.stderr.flush()
    os.environ[OOM_VARIABLE] = json.dumps([*oom_micro_batch_rows(), section.pass_rows])
    arguments = ["-m", STAGES[stage_name].module, *sys.argv[1:], "--set", f"{stage_name}.micro_batch_rows={rows}"]
    sigterm.keep_pending_across_exec()
    os.execv(sys.executable, [sys.executable, *arguments])  # noqa: S606 the same program


def _advice(stage_name: str) -> str:
    """Return what to change after `stage_name` ran out of memory, as a clause of a message."""
    if STAGES[stage_name].has_checkpoints:
        return (
            f"lower {stage_name}.micro_batch_rows if it is set (the result stays the same) or max_length_tokens, set "
            f"{stage_name}.gradient_checkpointing to true, or {stage_name}.on_out_of_memory to halve_micro_batch"
        )
    return f"lower {stage_name}.batch_rows" if stage_name in ("evaluate", "infer") else "use a larger machine"
