"""The number of tokens of one forward and backward pass, chosen from the memory that is free."""

from typing import Any

from llamarefine_jobs.contract.memory import PASS_TOKENS, Shape, pass_tokens_for
from llamarefine_jobs.contract.recipe import Dpo, Sft
from llamarefine_jobs.models.forward import device_of

_CPU_TOKENS = 4096  # always the same, so that on a CPU the same recipe gives the same bytes


def most_pass_tokens(model: Any, section: Sft | Dpo) -> int:
    """Return how many tokens a pass may compute on the model's device, where model and optimizer are loaded already."""
    import torch

    device = device_of(model)
    if device.type == "cpu":
        return _CPU_TOKENS
    try:
        shape = Shape.from_config(model.config.to_dict())
    except ValueError:  # not shaped like a Llama: passes start small, and are halved if memory runs out
        return PASS_TOKENS[0]
    free_bytes, _ = torch.cuda.mem_get_info(device)
    cached_bytes = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return pass_tokens_for(shape, section, free_bytes + cached_bytes)
