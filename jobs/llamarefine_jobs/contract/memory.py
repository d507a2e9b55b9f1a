"""How much memory of a GPU a training will need: an estimate from shapes, NOT measured on a card.

Of the worst batch, where every row has `max_length_tokens`. What a step keeps was counted, tensor by tensor, in the
real trainers without a card; tests/gpu/test_memory.py holds the estimate to that count, and on a card to its peak.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from llamarefine_jobs.contract.recipe import Dpo, LinearLayer, Lora, Sft

_FP32, _HALF = 4, 2  # bytes a number
_NF4 = 0.5 + 1 / 64 + _FP32 / (64 * 256)  # with its scale a block of 64, itself in 8 bits (double quantisation)
_TRAINED = _FP32 * 4  # a weight, its gradient, Adam's two means
# At once of each logit: SFT's in fp32, their log-softmax and two gradients; DPO's in 16 bits, in fp32, two gradients.
_SFT_LOGIT, _DPO_LOGIT = 4 * _FP32, _HALF + 3 * _FP32
_FUSED_LOSS_BYTES = 4 * 2**30  # Unsloth cuts SFT's logits into parts of at most so much
CUDA_CONTEXT_BYTES = 600 * 2**20
_NO_SIZE = 1 << 31  # of anything in a model


@dataclass(frozen=True)
class Shape:
    """The sizes of a model built as Llama is."""

    layers: int
    hidden: int
    inside: int
    queries: int  # of all heads together
    keys: int  # of all key heads together
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """From the model's config.json, whoever wrote it: ValueError where a size is missing, or none."""

        def size(name: str, default: int | None = None) -> int:
            found = default if config.get(name) is None else config[name]
            if type(found) is not int or not 0 < found < _NO_SIZE:  # True is an int, too
                raise ValueError(f"config.json says no {name}")
            return found

        heads = size("num_attention_heads")
        width = size("head_dim", size("hidden_size") // heads or None)
        return cls(
            layers=size("num_hidden_layers"),
            hidden=size("hidden_size"),
            inside=size("intermediate_size"),
            queries=heads * width,
            keys=size("num_key_value_heads", heads) * width,
            vocabulary=size("vocab_size"),
            tied=bool(config.get("tie_word_embeddings")),
        )

    def linear(self) -> dict[LinearLayer, tuple[int, int]]:
        """Rows and columns of a block's linear layers."""
        return {
            "q_proj": (self.queries, self.hidden),
            "k_proj": (self.keys, self.hidden),
            "v_proj": (self.keys, self.hidden),
            "o_proj": (self.hidden, self.queries),
            "gate_proj": (self.inside, self.hidden),
            "up_proj": (self.inside, self.hidden),
            "down_proj": (self.hidden, self.inside),
        }

    def linear_parameters(self) -> int:
        """Of all blocks: what nf4 holds in 4 bits."""
        return self.layers * sum(rows * columns for rows, columns in self.linear().values())

    def other_parameters(self) -> int:
        """Embeddings, the head unless it is tied, norms."""
        tables = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return tables + self.hidden * (2 * self.layers + 1)

    def adapter_parameters(self, lora: Lora) -> int:
        """Of the adapter's A and B."""
        linear = self.linear()
        return self.layers * sum(lora.rank * sum(linear[name]) for name in lora.target_layers)


def training_bytes(shape: Shape, section: Sft | Dpo, max_length_tokens: int, *, with_unsloth: bool) -> int:
    """The estimate for the card of one process, on either backend; a DPO row is two sequences."""
    sequences = section.micro_batch_rows * (2 if isinstance(section, Dpo) else 1)
    tokens = sequences * max_length_tokens
    a_weight = _NF4 if section.quantization == "nf4" else _HALF
    weights = shape.linear_parameters() * a_weight + shape.other_parameters() * _HALF
    if section.quantization == "nf4":
        weights += shape.inside * shape.hidden * _HALF  # one layer's at a time, as it is computed with
    trained = shape.adapter_parameters(section.lora) * _TRAINED
    a_block = tokens * _kept(shape, section, with_unsloth)
    backward = tokens * _HALF * (3 * shape.inside + 5 * shape.hidden)  # of one block at a time
    logits = tokens * shape.vocabulary * (_DPO_LOGIT if isinstance(section, Dpo) else _SFT_LOGIT)
    if with_unsloth and isinstance(section, Sft):
        logits = min(logits, _FUSED_LOSS_BYTES)
    if section.gradient_checkpointing:
        kept, backward = shape.layers * tokens * _HALF * shape.hidden, a_block + backward
    else:
        kept = shape.layers * a_block
    return round(weights + trained + kept + max(logits, backward)) + CUDA_CONTEXT_BYTES


def _kept(shape: Shape, section: Sft | Dpo, with_unsloth: bool) -> int:
    """Bytes a token that a block keeps for its backward pass."""
    hidden, inside, queries, keys = shape.hidden, shape.inside, shape.queries, shape.keys
    if with_unsloth:
        # Two norms, what they are of; queries, attention's output and its copy; keys, values; gate and up.
        return _HALF * (4 * hidden + 3 * queries + 2 * keys + 2 * inside)
    # What the norms are of in fp32; queries, attention's output; keys, values; gate, its activation, up; and of each
    # layer with an adapter its input once more.
    columns = [shape.linear()[name][1] for name in section.lora.target_layers]
    return _HALF * (4 * hidden + 2 * queries + 2 * keys + 3 * inside + sum(columns))
