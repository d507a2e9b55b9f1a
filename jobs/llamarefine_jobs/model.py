"""Load a base, put adapters on it: two backends behind one interface.

Unsloth on CUDA (with bitsandbytes for 4 bits), transformers + peft elsewhere. `choose_backend`
says in one line which runs and why. On CUDA it must be called before trl, transformers or peft are
imported, because Unsloth patches them as it is imported.
"""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llamarefine_jobs.contract.errors import DataError, RecipeError
from llamarefine_jobs.contract.recipe import Lora


class Backend(Protocol):
    """How models are loaded and adapted."""

    name: str
    reason: str
    accelerator: str
    packs: bool  # rows packed into one sequence stay apart, bit for bit of the mathematics

    def load(self, folder: Path, *, quantization: str = "none") -> Any:
        """The model of a folder, frozen, ready for an adapter or for inference."""

    def add_adapter(self, model: Any, lora: Lora, seed: int) -> Any:
        """`model` with a fresh, trainable LoRA adapter (B = 0: it changes nothing yet)."""
