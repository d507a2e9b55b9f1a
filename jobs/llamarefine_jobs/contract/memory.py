"""Estimate the GPU memory that a training needs, from the shapes of its tensors.

The estimate is for the worst batch, where every row has `max_length_tokens`. The tensors that a step keeps were
counted one by one in the real trainers, without a GPU. tests/gpu/test_memory.py compares the estimate with that count,
and on a GPU with the peak of the allocator; on a GPU only a tiny model was compared so far.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from llamarefine_jobs.contract.recipe import Dpo, LinearLayer, Lora, Sft

_FP32, _HALF = 4, 2  # bytes per number
# Bytes per weight in nf4: 4 bits, and per block of 64 a scale in 8 bits (double quantisation).
_NF4 = 0.5 + 1 / 64 + _FP32 / (64 * 256)
_TRAINED = _FP32 * 4  # bytes per trained weight: the weight, its gradient, and Adam's two moments
# Bytes per logit at the peak. SFT: the logits in fp32, their log-softmax and two gradients. DPO: the logits in 16 bits
# and in fp32, and two gradients.
_SFT_LOGIT, _DPO_LOGIT = 4 * _FP32, _HALF + 3 * _FP32
_FUSED_LOSS_BYTES = 4 * 2**30  # Unsloth splits SFT's logits into parts of at most this size
CUDA_CONTEXT_BYTES = 600 * 2**20
_SIZE_LIMIT = 1 << 31  # every size in a model is smaller


@dataclass(frozen=True)
class Shape:
    """The sizes of a model with the Llama architecture."""

    layers: int
    hidden: int
    intermediate: int
    query_width: int  # of all attention heads together
    key_width: int  # of all key-value heads together
    vocabulary: int
    tied_embeddings: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read the sizes from a config.json, trusted or not. Raises ValueError if one is missing or not valid."""

        def size(name: str, default: int | None = None) -> int:
            found = default if config.get(name) is None else config[name]
            if type(found) is not int or not 0 < found < _SIZE_LIMIT:  # isinstance would accept True
                raise ValueError(f"config.json has no valid {name}")
            return found

        heads = size("num_attention_heads")
        width = size("head_dim", size("hidden_size") // heads or None)
        return cls(
            layers=size("num_hidden_layers"),
            hidden=size("hidden_size"),
            intermediate=size("intermediate_size"),
            query_width=heads * width,
            key_width=size("num_key_value_heads", heads) * width,
            vocabulary=size("vocab_size"),
            tied_embeddings=bool(config.get("tie_word_embeddings")),
        )

    def linear(self) -> dict[LinearLayer, tuple[int, int]]:
        """Return rows and columns of each linear layer of a block."""
        return {
            "q_proj": (self.query_width, self.hidden),
            "k_proj": (self.key_width, self.hidden),
            "v_proj": (self.key_width, self.hidden),
            "o_proj": (self.hidden, self.query_width),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }

    def linear_parameters(self) -> int:
        """Return the parameters in the linear layers of all blocks: those that nf4 stores in 4 bits."""
        return self.layers * sum(rows * columns for rows, columns in self.linear().values())

    def other_parameters(self) -> int:
        """Return the parameters of the embeddings, of the head unless it is tied, and of the norms."""
        tables = self.vocabulary * self.hidden * (1 if self.tied_embeddings else 2)
        return tables + self.hidden * (2 * self.layers + 1)

    def adapter_parameters(self, lora: Lora) -> int:
        """Return the parameters of the adapter's A and B matrices."""
        linear = self.linear()
        return self.layers * sum(lora.rank * sum(linear[name]) for name in lora.target_layers)


def training_bytes(shape: Shape, section: Sft | Dpo, max_length_tokens: int, *, with_unsloth: bool) -> int:
    """Return the estimated bytes on the GPU of one process, for either backend. A DPO row is two sequences."""
    sequences = section.micro_batch_rows * (2 if isinstance(section, Dpo) else 1)
    tokens = sequences * max_length_tokens
    weight_bytes = _NF4 if section.quantization == "nf4" else _HALF
    weights = shape.linear_parameters() * weight_bytes + shape.other_parameters() * _HALF
    if section.quantization == "nf4":
        weights += shape.intermediate * shape.hidden * _HALF  # one layer at a time is dequantised
    trained = shape.adapter_parameters(section.lora) * _TRAINED
    block_activations = tokens * _kept_bytes_per_token(shape, section, with_unsloth)
    backward = tokens * _HALF * (3 * shape.intermediate + 5 * shape.hidden)  # of one block at a time
    logits = tokens * shape.vocabulary * (_DPO_LOGIT if isinstance(section, Dpo) else _SFT_LOGIT)
    if with_unsloth and isinstance(section, Sft):
        logits = min(logits, _FUSED_LOSS_BYTES)
    if section.gradient_checkpointing:
        kept, backward = shape.layers * tokens * _HALF * shape.hidden, block_activations + backward
    else:
        kept = shape.layers * block_activations
    return round(weights + trained + kept + max(logits, backward)) + CUDA_CONTEXT_BYTES


def _kept_bytes_per_token(shape: Shape, section: Sft | Dpo, with_unsloth: bool) -> int:
    """Return how many bytes per token a block keeps for its backward pass."""
    hidden, intermediate = shape.hidden, shape.intermediate
    query_width, key_width = shape.query_width, shape.key_width
    if with_unsloth:
        # The outputs and inputs of the two norms; Q; attention output and its copy; K, V; gate and up.
        return _HALF * (4 * hidden + 3 * query_width + 2 * key_width + 2 * intermediate)
    # fp32 inputs of the norms; Q; attention output; K, V; gate, its activation, up; and a second copy of the input of
    # each layer with an adapter.
    columns = [shape.linear()[name][1] for name in section.lora.target_layers]
    return _HALF * (4 * hidden + 2 * query_width + 2 * key_width + 3 * intermediate + sum(columns))
