"""The memory estimate equals what a packed pass allocates on a CPU, and settings that need less memory lower it.

tests/gpu/test_memory.py compares the estimate with the allocator's peak on a GPU.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest

from llamarefine_jobs.contract import memory
from llamarefine_jobs.contract.memory import (
    PASS_TOKENS,
    Shape,
    least_pass_tokens,
    pass_bytes,
    pass_tokens_for,
    resident_bytes,
    training_bytes,
)
from llamarefine_jobs.contract.recipe import Dpo, Lora, Sft

TINYLLAMA = {
    "num_hidden_layers": 22,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32_000,
}
GIB = 2**30
COUNTED_TOKENS = 1024


@pytest.fixture
def shape() -> Shape:
    return Shape.from_config(TINYLLAMA)


def test_tinyllamas_parameters_are_counted_exactly(shape: Shape) -> None:
    assert shape.linear_parameters() + shape.other_parameters() == 1_100_048_384


@pytest.mark.parametrize("tied", [False, True])
def test_parameter_counts_equal_those_of_a_real_model_and_adapter(tied: bool) -> None:
    from peft import LoraConfig, get_peft_model

    from tests.jobs import tiny

    model: Any = tiny.make_model(400, tie_word_embeddings=tied, num_key_value_heads=2)
    shape = Shape.from_config(model.config.to_dict())
    assert shape.linear_parameters() + shape.other_parameters() == model.num_parameters()
    lora = Lora(rank=3, target_layers=("q_proj", "k_proj", "down_proj"))
    adapted = get_peft_model(model, LoraConfig(r=lora.rank, target_modules=list(lora.target_layers)))
    trained = sum(part.numel() for part in adapted.parameters() if part.requires_grad)
    assert shape.adapter_parameters(lora) == trained


def test_the_estimate_exceeds_weights_and_optimizer_state(shape: Shape) -> None:
    least = 2 * 1_100_048_384 + 16 * shape.adapter_parameters(Lora())
    assert resident_bytes(shape, Sft()) == least
    assert least < training_bytes(shape, Sft(), 16) < 2 * least


@pytest.mark.parametrize(
    ("less", "more"),
    [
        (Sft(), Sft(micro_batch_rows=8)),
        (Sft(micro_batch_rows=4), Sft(micro_batch_rows=8)),
        (Sft(gradient_checkpointing=True), Sft()),
        (Sft(quantization="nf4"), Sft()),
        (Sft(lora=Lora(rank=8)), Sft(lora=Lora(rank=64))),
        (Sft(lora=Lora(target_layers=("q_proj",))), Sft()),
        (Sft(), Sft(lora=Lora(dropout=0.1))),
        (Sft(), Dpo()),
    ],
)
@pytest.mark.parametrize("backend", ["packed", "unsloth"])
def test_settings_that_need_less_memory_are_estimated_lower(
    backend: str, shape: Shape, less: Sft | Dpo, more: Sft | Dpo
) -> None:
    less, more = (section.model_copy(update={"backend": backend}) for section in (less, more))
    if backend == "packed" or less.lora.dropout == more.lora.dropout:
        assert training_bytes(shape, less, 1024) < training_bytes(shape, more, 1024)
    assert training_bytes(shape, less, 512) < training_bytes(shape, less, 1024)


@pytest.mark.parametrize(
    ("section", "tokens"),
    [
        (Sft(), 700),
        (Dpo(), 1400),
        (Sft(micro_batch_rows=4), 2800),
        (Dpo(micro_batch_rows=4), 5600),
    ],
)
def test_the_smallest_pass_holds_a_row_or_as_many_as_the_recipe_sets(section: Sft | Dpo, tokens: int) -> None:
    assert least_pass_tokens(section, 700) == tokens


def test_a_pass_is_the_largest_one_that_fits(shape: Shape) -> None:
    chosen = [pass_tokens_for(shape, Sft(), free * GIB) for free in (0, 4, 20, 76, 135)]
    assert chosen == sorted(chosen)
    assert (chosen[0], chosen[-1]) == (PASS_TOKENS[0], PASS_TOKENS[-1])
    for size in PASS_TOKENS:
        needed = pass_bytes(shape, Sft(), size)
        assert pass_tokens_for(shape, Sft(), round(needed / 0.85) + 1) == size


SECTIONS = {
    "16 bits": Sft(lora=Lora(rank=8)),
    "rank 64": Sft(lora=Lora(rank=64)),
    "few layers": Sft(lora=Lora(rank=8, target_layers=("q_proj", "o_proj", "up_proj"))),
    "recomputed": Sft(lora=Lora(rank=8), gradient_checkpointing=True),
    "nf4": Sft(lora=Lora(rank=8), quantization="nf4"),
    "nf4, few layers": Sft(lora=Lora(rank=8, target_layers=("k_proj", "down_proj")), quantization="nf4"),
}
CONFIGS = {
    "narrow": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "vocab_size": 300},
    "wide": {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6, "vocab_size": 300},
    "many tokens": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "vocab_size": 8000},
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("setting", SECTIONS)
def test_a_packed_pass_allocates_the_estimated_bytes(
    setting: str, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llamarefine_jobs.models import packed_attention, token_loss

    assert token_loss.CHUNK_LOGITS == memory.LOSS_CHUNK_LOGITS
    for module, name in ((token_loss, "CHUNK_LOGITS"), (memory, "LOSS_CHUNK_LOGITS")):
        monkeypatch.setattr(module, name, 1 << 21)  # so that the loss of many tokens has several chunks
    monkeypatch.setattr(packed_attention, "_row_by_row", attention_that_keeps_what_the_kernel_keeps)
    section = SECTIONS[setting]
    model = make_model(CONFIGS[config], section)
    sizes = Shape.from_config(model.config.to_dict())
    estimated = pass_bytes(sizes, section, COUNTED_TOKENS)
    if section.quantization == "nf4":
        estimated -= sizes.intermediate * sizes.hidden * 2  # the base is not really in 4 bits here
    run_pass(model)  # creates what is created once
    counted = allocated_bytes(functools.partial(run_pass, model))
    print(f"{setting}, {config}: {counted} bytes allocated, {estimated} estimated")
    assert counted == pytest.approx(estimated, rel=0.1)


def attention_that_keeps_what_the_kernel_keeps(query: Any, key: Any, value: Any, *_: Any) -> Any:
    """Keep Q, K, V, the output and its log-sum-exp, as the attention kernel for GPUs; the values do not matter."""
    import torch

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, query: Any, key: Any, value: Any) -> Any:
            output = torch.zeros_like(query)
            context.save_for_backward(query, key, value, output, torch.zeros(query.shape[:-1]))
            return output

        @staticmethod
        def backward(context: Any, *gradients: Any) -> Any:
            return tuple(torch.zeros_like(tensor) for tensor in context.saved_tensors[:3])

    return Kernel.apply(*(tensor.transpose(1, 2) for tensor in (query, key, value)))  # type: ignore[no-untyped-call]


def make_model(config: dict[str, int], section: Sft) -> Any:
    """Return a Llama in bf16 with an fp32 adapter, whose gradient exists already."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    base: Any = LlamaForCausalLM(LlamaConfig(**config, **heads)).to(torch.bfloat16)
    lora = LoraConfig(r=section.lora.rank, target_modules=list(section.lora.target_layers), task_type="CAUSAL_LM")
    model: Any = get_peft_model(base, lora).train()
    for part in model.parameters():
        if part.requires_grad:
            part.data, part.grad = part.data.float(), torch.zeros(part.shape)
    for module in model.modules():
        if section.quantization == "nf4" and hasattr(module, "lora_A"):
            module.cast_input_dtype_enabled = False  # as PEFT's 4-bit layers under autocast
    if section.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def run_pass(model: Any) -> None:
    """Run forward and backward of a packed pass of several rows."""
    from llamarefine_jobs.models.encoding import Encoded
    from llamarefine_jobs.models.forward import PackedForward
    from llamarefine_jobs.models.packed_attention import using_packed_attention
    from llamarefine_jobs.training.objectives import SftObjective

    rows = [Encoded([1] * 56, [2] * 200)] * (COUNTED_TOKENS // 256)
    forward = PackedForward(model)
    batch = forward.batch(rows)
    with using_packed_attention(forward.causal_model):  # recomputed activations need it in the backward computation
        SftObjective().loss(forward.nats(batch), batch, None, COUNTED_TOKENS).backward()


def allocated_bytes(work: Callable[[], None]) -> int:
    """Return how many bytes more than at its start torch's CPU allocator had given out at the peak of `work`."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    recorded: Any = profiler.profiler
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    assert events
    peak = allocated = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return int(peak)
