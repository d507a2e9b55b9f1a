"""The best adapter so far, as a checkpoint brings it along: checked before it is taken for what a training made."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamarefine_jobs.contract.errors import IntegrityError
from llamarefine_jobs.models.lora import ADAPTER_WEIGHTS


def read_best(folder: Path, where: str) -> tuple[float, int]:
    """Validation loss and step of the best adapter; IntegrityError, naming `where`, if they are none."""
    try:
        best = json.loads((folder / "best.json").read_bytes())
        loss, step = best["loss"], best["step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(where, f"its best.json cannot be read ({type(error).__name__})") from None
    if type(loss) not in (float, int) or not math.isfinite(loss):
        raise damaged(where, f"its best.json names {loss!r:.40} as a loss, expected a finite number")
    if type(step) is not int or step < 1:
        raise damaged(where, f"its best.json names {step!r:.40} as a step, expected a whole number from 1 on")
    return float(loss), step


def check_best(folder: Path, adapter: Mapping[str, Any], where: str) -> None:
    """Refuse a best adapter that is missing, is of another shape than `adapter`, or holds what is no number."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        best = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, SafetensorError):
        raise damaged(where, "it was validated, but the best adapter is missing or cannot be read") from None
    if {name: tensor.shape for name, tensor in best.items()} != {name: t.shape for name, t in adapter.items()}:
        raise damaged(where, "its best adapter is of another shape than the one that is trained")
    if not all(bool(tensor.isfinite().all()) for tensor in best.values()):
        raise damaged(where, "its best adapter holds weights that are no numbers")


def damaged(where: str, what: str) -> IntegrityError:
    """The error that says what is wrong with a checkpoint under `where`."""
    return IntegrityError(f"the checkpoint under {where} is damaged: {what}; remove it, and the training begins again")
