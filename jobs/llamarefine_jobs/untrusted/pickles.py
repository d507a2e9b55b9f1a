"""Refuse checkpoints whose pickles hold more than tensors, before the trainer reads them.

This is not part of remote_code.py because it needs torch, and the launcher, which imports that module, has none.
"""

from pathlib import Path

from llamarefine_jobs.contract.errors import IntegrityError
from llamarefine_jobs.untrusted.remote_code import INERT

_TENSORS = (".pt", ".pth")  # torch's pickles of the optimizer's, scheduler's and random generators' states


def refuse_pickled_code(checkpoint: Path) -> None:
    """Raise IntegrityError if a checkpoint holds more than tensors and plain values. Runs no code from the checkpoint.

    torch stores the states of the optimizer, the scheduler and the random generators as pickles. This function reads
    them as the trainer does, with an unpickler that accepts tensors, numbers and texts, and refuses every other call.
    """
    import torch
    from transformers.trainer_pt_utils import safe_globals

    for file in sorted(path for path in checkpoint.rglob("*") if not path.is_dir()):
        name = file.relative_to(checkpoint).as_posix()
        if file.suffix not in (*INERT, *_TENSORS):
            raise IntegrityError(f"the checkpoint holds {name}, a type of file that no checkpoint has; {_REMEDY}")
        if file.suffix in _TENSORS:
            try:
                with safe_globals():
                    torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except MemoryError:
                raise
            except Exception as error:
                reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
                raise IntegrityError(
                    f"the checkpoint's {name} is more than tensors and plain values ({reason}); {_REMEDY}"
                ) from None


_REMEDY = "nothing of it was run: find out who wrote it, then remove the checkpoint and run again"
