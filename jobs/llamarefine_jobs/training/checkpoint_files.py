"""The files of a checkpoint: adapter, optimizer state, step and history, as safetensors and JSON, without pickles."""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llamarefine_jobs.context import Context
from llamarefine_jobs.contract.artifact import checkpoint_path
from llamarefine_jobs.contract.errors import LlamaRefineError, first_line
from llamarefine_jobs.models import adapters
from llamarefine_jobs.models.lora import ADAPTER_WEIGHTS
from llamarefine_jobs.process.out_of_memory import is_out_of_memory
from llamarefine_jobs.process.world import means_lost_peer
from llamarefine_jobs.training.adapter_weights import AdapterWeights
from llamarefine_jobs.training.best_adapter import damaged
from llamarefine_jobs.untrusted.safe_json import read_object

_OPTIMIZER = "optimizer.safetensors"
_STATE = "training_state.json"


@dataclass
class TrainingState:
    """Where a training is: the steps done, the steps in all, and the logged figures with their steps."""

    step: int
    steps: int
    history: list[dict[str, float]]


def checkpoints_address(context: Context) -> str:
    """Return the address of a training's checkpoints in the store."""
    return f"{context.store.uri}/{checkpoint_path(context.stage.name, context.key)}"


@contextlib.contextmanager
def reporting_damage(context: Context) -> Iterator[None]:
    """Turn the errors of functions that read a checkpoint into an IntegrityError that says what to do about it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, LlamaRefineError) or is_out_of_memory(error) or means_lost_peer(error):
            raise
        what = f"a training cannot resume from it ({type(error).__name__}: {first_line(error)})"
        raise damaged(checkpoints_address(context), what) from None


def write_checkpoint(folder: Path, model: Any, weights: AdapterWeights, state: TrainingState) -> None:
    """Write the checkpoint's files into `folder`, which is made."""
    from safetensors.torch import save_file

    adapters.save_adapter(model.peft_config["default"], adapters.adapter_state(model), folder, None)
    save_file(weights.optimizer_state(), folder / _OPTIMIZER)
    text = json.dumps({"step": state.step, "steps": state.steps, "history": state.history})
    (folder / _STATE).write_text(text, encoding="utf-8")


def read_checkpoint(folder: Path, model: Any, weights: AdapterWeights, steps: int) -> TrainingState:
    """Load adapter and optimizer state into `model` and `weights`, and return the state.

    No other file is opened. Raises ValueError or OSError if a file is missing or damaged, or belongs to another
    training.
    """
    from peft import set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for name in (_STATE, ADAPTER_WEIGHTS, _OPTIMIZER):
        require_file(folder, name)
    state = _read_state(folder / _STATE, steps)
    try:
        adapter, optimizer = load_file(folder / ADAPTER_WEIGHTS), load_file(folder / _OPTIMIZER)
    except SafetensorError as error:
        raise ValueError(str(error)) from None
    expected = {name: tensor.shape for name, tensor in adapters.adapter_state(model).items()}
    if {name: tensor.shape for name, tensor in adapter.items()} != expected:
        raise ValueError("its adapter has other weights than the one in training")
    if not all(bool(tensor.isfinite().all()) for tensor in adapter.values()):
        raise ValueError("its adapter holds NaN or infinity")
    weights.load_optimizer_state(optimizer, state.step)
    set_peft_model_state_dict(model, adapter)
    return state


def require_file(folder: Path, name: str) -> None:
    """Raise ValueError if the checkpoint in `folder` has no file `name`."""
    if not (folder / name).is_file():
        raise ValueError(f"it has no {name}: an earlier version of LlamaRefine wrote it, or it is incomplete")


def _read_state(file: Path, steps: int) -> TrainingState:
    found = read_object(file)
    step, history = found.get("step"), found.get("history")
    if type(step) is not int or not 0 < step <= steps or found.get("steps") != steps:
        raise ValueError(f"it is of step {step!r:.40} of {found.get('steps')!r:.40}, expected one of {steps} steps")
    if not isinstance(history, list) or not all(map(_is_logged, history)):
        raise ValueError("its history is not a list of logged figures")
    return TrainingState(step, steps, history)


def _is_logged(entry: Any) -> bool:
    return (
        isinstance(entry, Mapping)
        and type(entry.get("step")) is int
        and all(type(value) in (int, float) and math.isfinite(value) for value in entry.values())
    )
