"""The forward of a training, compared with the model's own before it is used."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from llamarefine_jobs.contract.errors import first_line
from llamarefine_jobs.models.backends import Backend
from llamarefine_jobs.models.encoding import Encoded
from llamarefine_jobs.models.forward import Forward, PackedForward, PaddedForward, can_pack
from llamarefine_jobs.models.scoring import score
from llamarefine_jobs.process.out_of_memory import is_out_of_memory

_COMPARED_ROWS = 4
# Nats per token by which the same row may differ when other kernels compute it.
_TOLERANCE_FP32, _TOLERANCE_16_BITS = 1e-4, 3e-2


def checked_forward(
    backend: Backend, model: Any, pad_id: int, rows: Sequence[Encoded], note: Callable[[str], None]
) -> Forward:
    """Return the packed forward if the backend packs and its scores of the first rows equal the model's own.

    Otherwise return the padded forward, and say why in one line.
    """
    padded = PaddedForward(model, pad_id)
    if backend.name != "packed":
        return padded
    if not can_pack(model):
        reason = "the weights or the card do not suit torch's packed attention"
    else:
        packed = PackedForward(model)
        reason = _difference(packed, padded, rows[:_COMPARED_ROWS])
        if not reason:
            return packed
    note(f"pads its rows instead of packing them, which is slower: {reason}")
    return padded


def _difference(packed: Forward, padded: Forward, rows: Sequence[Encoded]) -> str:
    """Return why the packed forward cannot be used, or an empty text."""
    try:
        found = score(packed, rows)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {first_line(error)}"
    expected = [score(padded, [row])[0] for row in rows]
    apart = [abs(one.logprob - other.logprob) / one.tokens for one, other in zip(found, expected, strict=True)]
    is_fp32 = padded.model.get_output_embeddings().weight.dtype == torch.float32
    tolerance = _TOLERANCE_FP32 if is_fp32 else _TOLERANCE_16_BITS
    if max(apart) <= tolerance:  # false for NaN
        return ""
    return f"it scores a row {max(apart):.1e} nats a token off (tolerance {tolerance:g})"
