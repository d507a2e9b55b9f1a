"""The adapter of the lowest validation loss so far, which becomes the artifact of the training.

It is part of each checkpoint, so a training that was killed and continues ends with the same best adapter.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamarefine_jobs.contract.errors import IntegrityError
from llamarefine_jobs.models import adapters
from llamarefine_jobs.models.lora import ADAPTER_WEIGHTS
from llamarefine_jobs.process.world import World

_FOLDER = "best"
_RECORD = "best.json"


class BestAdapter:
    """The best adapter of one training, with its validation loss and step; infinity and 0 before the first validation.

    `checkpoints_address` is the address of the training's checkpoints, for error messages.
    """

    def __init__(self, work_folder: Path, checkpoints_address: str) -> None:
        self._folder = work_folder / _FOLDER
        self._address = checkpoints_address
        self.loss = math.inf
        self.step = 0

    def restore(self, checkpoint: Path, world: World) -> None:
        """Move the best adapter's two files from `checkpoint` to the work folder; other files are left there.

        Raises IntegrityError if the adapter's record is damaged. Every process must call this.
        """
        in_checkpoint = (checkpoint / _FOLDER).exists()
        if in_checkpoint:
            self.loss, self.step = read_best(checkpoint / _FOLDER, self._address)
        world.barrier()
        if in_checkpoint and world.is_first_on_node:
            self._folder.mkdir()
            for name in (_RECORD, ADAPTER_WEIGHTS):
                with contextlib.suppress(FileNotFoundError):  # `check` reports an adapter that is missing
                    shutil.move(checkpoint / _FOLDER / name, self._folder)
        world.barrier()

    def check(self, model: Any) -> None:
        """Raise IntegrityError unless the restored adapter fits the adapter of `model`."""
        check_best(self._folder, adapters.adapter_state(model), self._address)

    def replace(self, model: Any, loss: float, step: int, *, write: bool) -> None:
        """Make the adapter of `model` the best one. Exactly one process must set `write`; it writes the files."""
        self.loss, self.step = loss, step
        if write:
            from safetensors.torch import save_file

            self._folder.mkdir(exist_ok=True)
            save_file(adapters.adapter_state(model), self._folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
            (self._folder / _RECORD).write_text(json.dumps({"loss": loss, "step": step}))

    def copy_to_checkpoint(self, checkpoint: Path) -> None:
        """Copy the best adapter, if there is one, into the folder of a checkpoint."""
        if self._folder.exists():
            shutil.copytree(self._folder, checkpoint / _FOLDER)

    def weights(self) -> dict[str, Any]:
        """Return the tensors of the best adapter by name."""
        from safetensors.torch import load_file

        tensors: dict[str, Any] = load_file(self._folder / ADAPTER_WEIGHTS)
        return tensors


def read_best(folder: Path, where: str) -> tuple[float, int]:
    """Return the validation loss and step of the best adapter. Raises IntegrityError if their record is damaged.

    `where` is the address of the checkpoint, for the error message.
    """
    try:
        best = json.loads((folder / _RECORD).read_bytes())
        loss, step = best["loss"], best["step"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise damaged(where, f"its best.json cannot be read ({type(error).__name__})") from None
    if type(loss) not in (float, int) or not math.isfinite(loss):
        raise damaged(where, f"its best.json names {loss!r:.40} as a loss, expected a finite number")
    if type(step) is not int or step < 1:
        raise damaged(where, f"its best.json names {step!r:.40} as a step, expected a whole number from 1 on")
    return float(loss), step


def check_best(folder: Path, adapter: Mapping[str, Any], where: str) -> None:
    """Raise IntegrityError if the best adapter is missing, differs in shape from `adapter`, or is not finite."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        best = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, SafetensorError):
        raise damaged(where, "it was validated, but the best adapter is missing or cannot be read") from None
    if {name: tensor.shape for name, tensor in best.items()} != {name: t.shape for name, t in adapter.items()}:
        raise damaged(where, "the shapes of its best adapter differ from those of the adapter in training")
    if not all(bool(tensor.isfinite().all()) for tensor in best.values()):
        raise damaged(where, "its best adapter contains NaN or infinity")


def damaged(where: str, what: str) -> IntegrityError:
    """Return the error for a damaged checkpoint at `where`."""
    return IntegrityError(
        f"the checkpoint under {where} is damaged: {what}; remove it, and the training starts from the beginning"
    )
