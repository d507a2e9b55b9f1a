"""The whole pipeline on bases that differ from TinyLlama: biases, tied weights, a sliding window, scaled positions."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.test_one_machine import llamarefine
from tests.jobs import tiny

_SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_LLAMA_3_POSITIONS = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
# Model class -> settings in which it differs from TinyLlama. All vocabularies are padded, like Qwen's.
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama 3": ("Llama", {"tie_word_embeddings": True, "head_dim": 16, "rope_parameters": _LLAMA_3_POSITIONS}),
    "mistral": ("Mistral", {"sliding_window": 64}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("name", BASES)
def test_the_pipeline_runs_and_its_model_loads(name: str, tmp_path: Path) -> None:
    kind, config = BASES[name]
    write_base(tmp_path / "base", kind, config)
    recipe = tiny.RECIPE.replace("source: tiny-llama", f"source: {tmp_path / 'base'}")
    assert recipe != tiny.RECIPE
    (tmp_path / "recipe.yaml").write_text(recipe)
    ended = llamarefine(
        *("run", tmp_path / "recipe.yaml", "--store", tmp_path / "store", "--into", tmp_path),
        *("--set", "prepare.max_rows=60", "--set", "evaluate.generated_rows=2"),
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    model, base = load(tmp_path / "model"), load(tmp_path / "base")
    assert type(model) is type(base)
    assert model.config.tie_word_embeddings is base.config.tie_word_embeddings
    assert model.state_dict().keys() == base.state_dict().keys()
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, base.state_dict()[key])}
    assert changed, "the merged model equals the base"
    assert all(key.endswith("_proj.weight") for key in changed), "biases, norms and embeddings equal the base's"
    ended = llamarefine("infer", "--store", tmp_path / "store", "What is an iterator?")
    assert ended.returncode == 0, ended.stderr


def write_base(folder: Path, kind: str, config: dict[str, Any]) -> None:
    """Write a random model of this class, and a tokenizer."""
    import transformers

    tokenizer = tiny.make_tokenizer([question + answer for question, answer in tiny.made_up_rows()])
    torch.manual_seed(0)
    settings = getattr(transformers, f"{kind}Config")(vocab_size=len(tokenizer) + 8, **_SHAPE, **config)
    model = getattr(transformers, f"{kind}ForCausalLM")(settings)
    for key, weight in model.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(weight, std=0.2)
    # Half precision is the merged model's dtype, so that weights that are not merged stay equal.
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
