"""The negative log-likelihood of each target token, computed without keeping the logits of all positions.

Tensor axes: T positions, H hidden size, V tokens of the vocabulary.
"""

from typing import Any

import torch

NO_TARGET = -100  # at positions whose next token does not count in the loss
CHUNK_LOGITS = 1 << 26  # in memory at the same time; 256 MiB in fp32


def token_nats(hidden_TH: Any, head_VH: Any, targets_T: Any) -> Any:
    """Return -log p(target) in nats for each position, (T,), and 0 where the target is NO_TARGET.

    The numbers are fp32, or fp64 if the weights are. `head_VH` is the frozen weight of the language model's head.
    Gradients reach `hidden_TH` only. The values and the gradient equal those of cross entropy over logits of the same
    type (torch.nn.functional.cross_entropy, reduction="none").
    """
    nats_T: Any = _TokenNats.apply(hidden_TH, head_VH, targets_T)
    return nats_T


class _TokenNats(torch.autograd.Function):  # type: ignore[misc] # torch is untyped here
    """Computes the gradient in the forward pass too, because both need the same logits, one chunk at a time.

    This is possible because the loss of a position depends on the hidden state of this position only. The backward
    pass then multiplies each position's gradient with the weight that the rest of the loss gives to that position.
    """

    @staticmethod
    def forward(ctx: Any, hidden_TH: Any, head_VH: Any, targets_T: Any) -> Any:
        exact = torch.promote_types(head_VH.dtype, torch.float32)
        nats_T = hidden_TH.new_empty(hidden_TH.shape[0], dtype=exact)
        needs_gradient = ctx.needs_input_grad[0]
        gradient_TH = torch.empty_like(hidden_TH) if needs_gradient else None
        positions = max(1, CHUNK_LOGITS // head_VH.shape[0])
        for start in range(0, hidden_TH.shape[0], positions):
            part = slice(start, start + positions)
            has_target = targets_T[part] != NO_TARGET
            target = targets_T[part].clamp_min(0)[:, None]
            logits = (hidden_TH[part] @ head_VH.T).to(exact)
            log_total = logits.logsumexp(-1, keepdim=True)
            # `where`, not a product with the mask: a position without a target may hold NaN, and NaN · 0 is NaN.
            nats_T[part] = torch.where(has_target, (log_total - logits.gather(-1, target))[:, 0], 0.0)
            if gradient_TH is not None:
                slope = logits.sub_(log_total).exp_()  # the softmax
                slope.scatter_add_(-1, target, torch.full_like(log_total, -1.0))
                slope = torch.where(has_target[:, None], slope, 0.0).to(head_VH.dtype)
                gradient_TH[part] = slope @ head_VH
        if gradient_TH is not None:
            ctx.save_for_backward(gradient_TH)
        return nats_T

    @staticmethod
    def backward(ctx: Any, weight_T: Any) -> Any:
        (gradient_TH,) = ctx.saved_tensors
        return (gradient_TH * weight_T[:, None]).to(gradient_TH.dtype), None, None
