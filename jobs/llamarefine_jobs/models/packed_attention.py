"""Causal attention within each row of a packed sequence, as an attention function of transformers.

A packed sequence holds several rows one after the other, without padding between them. `ends` are the rows' cumulative
lengths: row i has the positions from ends[i] to ends[i + 1]. No row sees another row's tokens.
Tensor axes: A attention heads, K key-value heads, T positions, D dimensions of a head.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

NAME = "llamarefine_packed"  # the name under which transformers finds the function


def packed_attention(
    module: Any,
    query_1ATD: Any,
    key_1KTD: Any,
    value_1KTD: Any,
    attention_mask: Any = None,
    *,
    packed_ends: Any,
    packed_longest: int,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Any, None]:
    """Return the attention's output (1, T, A, D), and None in place of the weights.

    `packed_ends` is int32 on the device of the tensors; no row is longer than `packed_longest` tokens.
    """
    window = sliding_window if sliding_window and sliding_window < packed_longest else None
    if query_1ATD.is_cuda:
        query, key, value = (tensor[0].transpose(0, 1) for tensor in (query_1ATD, key_1KTD, value_1KTD))
        # torch's own flash attention kernel. It takes fewer key-value heads than query heads.
        output_TAD, *_ = torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            packed_ends,
            packed_ends,
            packed_longest,
            packed_longest,
            dropout,
            True,  # causal
            False,  # no debug mask
            scale=scaling,
            window_size_left=None if window is None else window - 1,
            window_size_right=None if window is None else 0,
        )
        return output_TAD[None], None
    return _row_by_row(query_1ATD, key_1KTD, value_1KTD, packed_ends, scaling, dropout, window), None


@torch.compiler.disable  # type: ignore[untyped-decorator] # the number of rows is data, so a compiler could only follow one batch
def _row_by_row(
    query: Any, key: Any, value: Any, ends: Any, scaling: float | None, dropout: float, window: int | None
) -> Any:
    """Return the same on a CPU, with one call of torch's attention for each row."""
    lengths = [length for length in ends.diff().tolist() if length]
    outputs = []
    # `split`, not slices: the backward pass of a slice fills a tensor as long as the whole sequence with zeros.
    by_row = (tensor.split(lengths, dim=2) for tensor in (query, key, value))
    for tokens, query_row, key_row, value_row in zip(lengths, *by_row, strict=True):
        is_banded = window is not None and window < tokens
        outputs.append(
            scaled_dot_product_attention(
                query_row,
                key_row,
                value_row,
                attn_mask=_band(tokens, window) if is_banded else None,
                is_causal=not is_banded,
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=True,
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _band(tokens: int, window: int | None) -> Any:
    """Return the mask (T, T) of sliding-window attention: a position sees itself and the `window - 1` before it."""
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)[None]
    return (distance >= 0) & (distance < window)


@contextlib.contextmanager
def using_packed_attention(causal_model: Any) -> Iterator[None]:
    """Let the model's layers use `packed_attention` within the block. Generation needs the model's own attention."""
    config = causal_model.config
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


# Without a mask function of the same name, transformers makes no mask; `packed_ends` replaces it.
AttentionInterface.register(NAME, packed_attention)
