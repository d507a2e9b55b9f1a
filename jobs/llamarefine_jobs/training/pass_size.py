"""The number of tokens of one forward and backward pass, chosen from the memory that is free."""

from typing import Any

from llamarefine_jobs.contract.recipe import Dpo, Sft
from llamarefine_jobs.models.forward import device_of

_CPU_TOKENS = 4096  # always the same, so that on a CPU the same recipe gives the same bytes


def most_pass_tokens(model: Any, section: Sft | Dpo) -> int:
    """Return how many tokens a pass may compute on the model's device, where model and optimizer are loaded already."""
    return _CPU_TOKENS
