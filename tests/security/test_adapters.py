"""An adapter that an attacker wrote to the bucket: only a plain LoRA adapter is passed to PEFT."""

import json
from pathlib import Path
from typing import Any

import pytest

from llamarefine_jobs.contract.errors import DataError
from llamarefine_jobs.models import adapters

from ..fuzz.target import allow_refusal

SLOW_PATTERN = "([a-z_.0-9]+)+!"  # a regular expression with exponential time on a layer's name
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"
PLAIN = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def base() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"vocab_size": 304, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **shape))


def write_adapter(folder: Path, **config: Any) -> Path:
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    matrices = {f"{LAYER}.lora_A.weight": torch.ones(2, 16), f"{LAYER}.lora_B.weight": torch.ones(16, 2)}
    save_file(matrices, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(PLAIN | config))
    return folder


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": SLOW_PATTERN},
        {"target_modules": [SLOW_PATTERN]},
        {"target_modules": "all-linear"},
        {"target_modules": None},
        {"exclude_modules": SLOW_PATTERN},
        {"layers_to_transform": [0], "layers_pattern": SLOW_PATTERN},
        {"rank_pattern": {SLOW_PATTERN: 4}},
        {"r": 50_000_000},
        {"lora_alpha": float("inf")},
        {"auto_mapping": {"base_model_class": "Popen", "parent_library": "subprocess"}},
        {"megatron_config": {"a": 1}, "megatron_core": "os.path"},
        {"modules_to_save": ["lm_head"]},
        {"peft_type": "PREFIX_TUNING"},
        {"a_later_idea": {"module": "os"}},
    ],
)
def test_a_config_that_is_not_a_plain_lora_is_refused(config: dict[str, Any], base: Any, tmp_path: Path) -> None:
    with allow_refusal("attach_adapter"), pytest.raises(DataError) as caught:
        adapters.attach_adapter(base, write_adapter(tmp_path / "adapter", **config))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_plain_lora_is_loaded_whatever_base_it_names(base: Any, tmp_path: Path) -> None:
    elsewhere = {"base_model_name_or_path": "http://127.0.0.1:1/another", "revision": "main"}
    assert adapters.attach_adapter(base, write_adapter(tmp_path / "adapter", **elsewhere))
