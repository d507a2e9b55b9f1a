"""How much memory of a GPU a training will need: an estimate from shapes alone, NOT calibrated on any measurement.

Of the worst batch, where every row has `max_length_tokens`. The benchmark on a GPU prints it beside what it measured.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from llamarefine_jobs.contract.recipe import Dpo, LinearLayer, Lora, Sft

_FP32, _HALF = 4, 2  # bytes a number
_NF4 = 0.5 + 1 / 64 + _FP32 / (64 * 256)  # with its scale a block of 64, itself in 8 bits (double quantisation)
_TRAINED = _FP32 * 4  # a weight, its gradient, Adam's two means
_LOGITS = _HALF + 2 * _FP32  # as the model gives them, and in fp32 with their gradient
_CUDA_CONTEXT_BYTES = 600 * 2**20
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


def training_bytes(shape: Shape, section: Sft | Dpo, max_length_tokens: int) -> int:
    """The estimate for one training; a DPO row is two sequences."""
    sequences = section.micro_batch_rows * (2 if isinstance(section, Dpo) else 1)
    tokens = sequences * max_length_tokens
    a_weight = _NF4 if section.quantization == "nf4" else _HALF
    weights = shape.linear_parameters() * a_weight + shape.other_parameters() * _HALF
    trained = shape.adapter_parameters(section.lora) * _TRAINED
    # What a block keeps for its backward pass: its input, two norms, queries, keys, values, attention's output and
    # the sum after it; inside, gate, up, their product and the product's input.
    a_block = tokens * _HALF * (4 * shape.hidden + 2 * shape.queries + 2 * shape.keys + 4 * shape.inside)
    if section.gradient_checkpointing:
        activations = shape.layers * tokens * _HALF * shape.hidden + a_block
    else:
        activations = shape.layers * a_block
    logits = tokens * shape.vocabulary * _LOGITS
    return round(weights + trained + activations + logits) + _CUDA_CONTEXT_BYTES
