"""The memory estimate: its parameter counts equal those of real models, and settings that need less memory lower it.

tests/gpu/test_memory.py compares the estimate with the real trainers; the last test runs a part of it without a GPU.
"""

import functools
import os
import subprocess
import sys
from typing import Any

import pytest

from llamarefine_jobs.contract.memory import Shape, training_bytes
from llamarefine_jobs.contract.recipe import Dpo, Lora, Sft

TINYLLAMA = {
    "num_hidden_layers": 22,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32_000,
}


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
    assert least < training_bytes(shape, Sft(micro_batch_rows=1, batch_rows=1), 16, with_unsloth=True) < 2 * least


@pytest.mark.parametrize(
    ("less", "more"),
    [
        (Sft(micro_batch_rows=4), Sft(micro_batch_rows=8)),
        (Sft(gradient_checkpointing=True), Sft()),
        (Sft(quantization="nf4"), Sft()),
        (Sft(lora=Lora(rank=8)), Sft(lora=Lora(rank=64))),
        (Sft(), Dpo()),
    ],
)
def test_settings_that_need_less_memory_are_estimated_lower(shape: Shape, less: Sft | Dpo, more: Sft | Dpo) -> None:
    for with_unsloth in (False, True):
        estimate = functools.partial(training_bytes, shape, with_unsloth=with_unsloth)
        assert estimate(less, 1024) < estimate(more, 1024)
        assert estimate(less, 512) < estimate(less, 1024)


def test_the_estimate_matches_the_real_trainers() -> None:
    """Run a GPU test with transformers + peft, in a process that simulates a GPU."""
    pytest.importorskip("triton")
    environment = os.environ | {"LLAMAREFINE_GPU_TESTS": "interpreter", "LLAMAREFINE_BACKEND": "transformers"}
    arguments = "-q -p no:cacheprovider tests/gpu/test_memory.py -k tiny-none"
    command = [sys.executable, "-m", "pytest", *arguments.split()]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=400)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "4 passed" in ended.stdout
