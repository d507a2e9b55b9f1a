"""Estimate the GPU memory that a training needs, from the shapes of its tensors.

A step runs one or more passes (a forward and a backward computation), each over so many tokens. The tensors that a pass
keeps were counted one by one on a CPU: tests/contract/test_memory.py compares the estimate with what a pass of the
packed step allocates there. The estimate is for layers that are not compiled; compiled layers keep about half.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from llamarefine_jobs.contract.recipe import Dpo, LinearLayer, Lora, Sft

PASS_TOKENS = (1024, 2048, 4096, 8192, 16384, 32768)  # sizes of a packed pass, in tokens
LOSS_CHUNK_LOGITS = 1 << 26  # the loss is computed over so many logits at a time (models/token_loss.py)
CUDA_CONTEXT_BYTES = 600 * 2**20
_USABLE_FRACTION = 0.85  # of the free memory; the rest is for cuBLAS, fragmentation and the validation
_FP32, _HALF = 4, 2  # bytes per number
# Bytes per weight in nf4: 4 bits, and per block of 64 a scale in 8 bits (double quantisation).
_NF4 = 0.5 + 1 / 64 + _FP32 / (64 * 256)
_TRAINED = _FP32 * 4  # bytes per trained weight: the weight, its gradient, and Adam's two moments
# Bytes per logit of a chunk: logits in 16 bits and in fp32, beside the gradient of the chunk before in both.
_LOGIT = 2 * (_FP32 + _HALF)
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


def training_bytes(shape: Shape, section: Sft | Dpo, max_length_tokens: int) -> int:
    """Return the estimated bytes on the GPU of one process, with passes of `least_pass_tokens`."""
    tokens = least_pass_tokens(section, max_length_tokens)
    return CUDA_CONTEXT_BYTES + resident_bytes(shape, section) + pass_bytes(shape, section, tokens)


def least_pass_tokens(section: Sft | Dpo, max_length_tokens: int) -> int:
    """Return the tokens of the smallest pass that can hold every row: one row, or `micro_batch_rows` where it is set.

    Every row is assumed to have `max_length_tokens`. A DPO row is a pair: two sequences in the same pass.
    """
    return (section.micro_batch_rows or 1) * (2 if isinstance(section, Dpo) else 1) * max_length_tokens


def pass_tokens_for(shape: Shape, section: Sft | Dpo, free_bytes: int) -> int:
    """Return the largest of PASS_TOKENS whose pass fits into 85 % of `free_bytes`, or the smallest if none does.

    `free_bytes` is the GPU memory that is free while the model, the adapter with its gradients and the optimizer's
    state are allocated.
    """
    fitting = [size for size in PASS_TOKENS if pass_bytes(shape, section, size) <= _USABLE_FRACTION * free_bytes]
    return max(fitting, default=PASS_TOKENS[0])


def resident_bytes(shape: Shape, section: Sft | Dpo) -> int:
    """Return the bytes that are allocated during the whole training: weights, adapter, its gradients, Adam's state."""
    weight_bytes = _NF4 if section.quantization == "nf4" else _HALF
    weights = shape.linear_parameters() * weight_bytes + shape.other_parameters() * _HALF
    return round(weights + shape.adapter_parameters(section.lora) * _TRAINED)


def pass_bytes(shape: Shape, section: Sft | Dpo, tokens: int) -> int:
    """Return the peak memory in bytes of one pass over `tokens` tokens, on top of `resident_bytes`."""
    per_pass = shape.adapter_parameters(section.lora) * _HALF  # autocast's copy of the adapter
    if section.quantization == "nf4":
        per_pass += shape.intermediate * shape.hidden * _HALF  # one layer at a time is dequantised
    block = _kept_bytes_per_token(shape, section)
    # The MLP's last layer: its input in fp32 and in 16 bits. The final norm needs no more.
    computing = _HALF * (3 * shape.intermediate + 4 * shape.hidden)
    if section.gradient_checkpointing:
        kept, computing = shape.layers * _HALF * shape.hidden, block + computing
    else:
        kept = shape.layers * block
    kept += _HALF * 4 * shape.hidden  # the final norm's input in fp32 and output, and the loss's gradient of the output
    loss = min(tokens * shape.vocabulary, LOSS_CHUNK_LOGITS) * _LOGIT
    return per_pass + tokens * kept + max(loss, tokens * computing)


def _kept_bytes_per_token(shape: Shape, section: Sft | Dpo) -> int:
    """Return how many bytes per token a block keeps for its backward computation."""
    hidden, intermediate = shape.hidden, shape.intermediate
    query_width, key_width = shape.query_width, shape.key_width
    if section.backend == "unsloth":
        # The outputs and inputs of the two norms; Q; attention output and its copy; K, V; gate and up.
        return _HALF * (4 * hidden + 3 * query_width + 2 * key_width + 2 * intermediate)
    if section.backend == "transformers":
        key_width = query_width  # its attention with padding repeats K and V for each query head
    # fp32 inputs of the norms; Q; attention output; K, V; gate, its activation, up.
    block = 4 * hidden + 2 * query_width + 2 * key_width + 3 * intermediate
    layers = section.lora.target_layers
    between = section.lora.rank * len(layers)  # the outputs of the A matrices
    if section.quantization == "none" or section.lora.dropout:
        # PEFT copies the input of each layer with an adapter, and dropout keeps a mask of one byte per number.
        inputs = sum(shape.linear()[name][1] for name in layers)
        return _HALF * (block + between + inputs) + (inputs if section.lora.dropout else 0)
    # On a 4-bit layer, PEFT copies nothing: layers share their input. That of o_proj is the attention output.
    shared = {"q_proj": "attention", "k_proj": "attention", "v_proj": "attention", "gate_proj": "MLP", "up_proj": "MLP"}
    inputs = hidden * len({shared[name] for name in layers if name in shared})
    return _HALF * (block + between + inputs + (intermediate if "down_proj" in layers else 0))
