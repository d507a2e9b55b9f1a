"""How rows go through a model: packed into one sequence, or padded to equal length.

Both ways give the negative log-likelihood of each target token, from which every loss and score is computed.
Tensor axes: T positions, all rows' together (with padding); B rows of a padded batch.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from llamarefine_jobs.models.backends import BF16_CAPABILITY
from llamarefine_jobs.models.encoding import Encoded
from llamarefine_jobs.models.packed_attention import using_packed_attention
from llamarefine_jobs.models.packing import Packed, Size, exact_size, split
from llamarefine_jobs.models.token_loss import NO_TARGET, token_nats


class Batch(Protocol):
    """The tensors of one forward pass."""

    targets: Any  # (T,) the next token where it counts in the loss, else NO_TARGET
    row_of: Any  # (T,) the row that a position belongs to
    rows: int


class Forward(Protocol):
    """A way to compute the log-likelihoods of rows' answers with one model."""

    model: Any
    causal_model: Any  # the language model within `model`

    def batch(self, rows: Sequence[Encoded]) -> Any:
        """Return the tensors of `rows` on the model's device."""

    def nats(self, batch: Any) -> Any:
        """Return -log p of each target in nats, fp32 (T,); 0 where there is no target."""

    def attention(self) -> contextlib.AbstractContextManager[None]:
        """Let the model's layers use this forward's attention within the block.

        A backward pass must run in such a block: with gradient checkpointing it computes the layers once more.
        """

    def passes(
        self, lengths: Sequence[Sequence[int]], most_tokens: int | None, most_items: int | None = None
    ) -> list[list[int]]:
        """Split items, each of one or several rows of `lengths` tokens, into passes; return their indices.

        A pass computes at most `most_tokens` tokens, padding included, unless one item alone has more.
        """


class PackedForward:
    """Rows packed into one sequence, with attention within each row. No token is computed for padding."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.causal_model = causal_model_of(model)

    def batch(self, rows: Sequence[Encoded], size: Size | None = None) -> Packed:
        """Return the tensors of `rows`: of exactly their size, or padded to `size`."""
        return Packed(size or exact_size(rows), device_of(self.model)).fill(rows)

    def attention(self) -> contextlib.AbstractContextManager[None]:
        return using_packed_attention(self.causal_model)

    def nats(self, batch: Packed) -> Any:
        with self.attention(), mixed_precision(self.model):
            hidden_TH = self.causal_model.get_decoder()(
                input_ids=batch.ids[None],
                position_ids=batch.positions[None],
                use_cache=False,
                packed_ends=batch.ends.int(),
                packed_longest=batch.size.longest,
            ).last_hidden_state[0]
            return token_nats(hidden_TH, head_of(self.causal_model), batch.targets)

    def passes(
        self, lengths: Sequence[Sequence[int]], most_tokens: int | None, most_items: int | None = None
    ) -> list[list[int]]:
        return split([sum(rows) for rows in lengths], most_tokens, most_items)


class PaddedBatch:
    """The tensors of rows that are padded on the right to the longest one."""

    def __init__(self, rows: Sequence[Encoded], pad_id: int, device: Any) -> None:
        longest = max(len(row) for row in rows)
        ids_BT = torch.full((len(rows), longest), pad_id)
        mask_BT = torch.zeros((len(rows), longest), dtype=torch.long)
        targets_BT = torch.full((len(rows), longest), NO_TARGET)
        for place, row in enumerate(rows):
            ids_BT[place, : len(row)] = torch.tensor(row.prompt_ids + row.answer_ids)
            mask_BT[place, : len(row)] = 1
            targets_BT[place, len(row.prompt_ids) - 1 : len(row) - 1] = torch.tensor(row.answer_ids)
        self.rows = len(rows)
        self.ids_BT, self.mask_BT = ids_BT.to(device), mask_BT.to(device)
        self.targets = targets_BT.flatten().to(device)
        self.row_of = torch.arange(len(rows), device=device).repeat_interleave(longest)


class PaddedForward:
    """Rows padded to equal length, with the model's own attention: for Unsloth, and for what cannot be packed."""

    def __init__(self, model: Any, pad_id: int) -> None:
        self.model = model
        self.causal_model = causal_model_of(model)
        self._pad_id = pad_id

    def batch(self, rows: Sequence[Encoded]) -> PaddedBatch:
        return PaddedBatch(rows, self._pad_id, device_of(self.model))

    def attention(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def nats(self, batch: PaddedBatch) -> Any:
        with mixed_precision(self.model):
            output = self.causal_model.get_decoder()(
                input_ids=batch.ids_BT, attention_mask=batch.mask_BT, use_cache=False
            )
            return token_nats(output.last_hidden_state.flatten(0, 1), head_of(self.causal_model), batch.targets)

    def passes(
        self, lengths: Sequence[Sequence[int]], most_tokens: int | None, most_items: int | None = None
    ) -> list[list[int]]:
        """Split as `Forward` says. Items of similar length share a pass, so that rows need little padding."""
        longest = [max(rows) for rows in lengths]
        passes: list[list[int]] = []
        for index in sorted(range(len(lengths)), key=lambda index: (-longest[index], index)):
            computed = len(lengths[index]) * (len(passes[-1]) + 1) * longest[passes[-1][0]] if passes else 0
            is_full = not passes or (most_tokens is not None and computed > most_tokens)
            if is_full or (most_items is not None and len(passes[-1]) >= most_items):
                passes.append([])
            passes[-1].append(index)
        return passes


def forward_for(model: Any, pad_id: int) -> Forward:
    """Return the packed forward where the model's device and dtype allow it, else the padded one."""
    return PackedForward(model) if can_pack(model) else PaddedForward(model, pad_id)


def can_pack(model: Any) -> bool:
    """Return whether packed attention runs on the model's device, in the dtype of its weights.

    torch's kernel needs weights in 16 bits, and a card of compute capability 8.0 (Ampere) or newer.
    """
    if device_of(model).type == "cpu":
        return True
    is_new_enough = torch.cuda.get_device_capability(device_of(model)) >= BF16_CAPABILITY
    return is_new_enough and head_of(causal_model_of(model)).dtype in (torch.bfloat16, torch.float16)


def row_sums(values_T: Any, batch: Batch) -> Any:
    """Return the sum of the values at each row's positions, (rows,), in fp64.

    A row has hundreds of nats, of which fp32 rounds away 1e-4, and a margin is the small difference of such sums.
    """
    values_T = values_T.double()
    return values_T.new_zeros(batch.rows).index_add(0, batch.row_of, values_T)


@contextlib.contextmanager
def measuring(model: Any) -> Iterator[None]:
    """Compute in evaluation mode within the block, without gradients and without a training's compiled layers."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(was_training)


def causal_model_of(model: Any) -> Any:
    """Return the causal language model inside PEFT's wrapper, or `model` itself; adapter layers stay in place."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def head_of(causal_model: Any) -> Any:
    """Return the weight (V, H) of the language model's head."""
    return causal_model.get_output_embeddings().weight


def device_of(model: Any) -> Any:
    """Return the torch device of the model's weights."""
    return next(model.parameters()).device


@contextlib.contextmanager
def mixed_precision(model: Any) -> Iterator[None]:
    """Use autocast in the dtype of the model's weights if that has 16 bits; the adapter's weights are fp32."""
    dtype = head_of(causal_model_of(model)).dtype
    with torch.autocast(device_of(model).type, dtype, enabled=dtype.itemsize == 2):
        yield
