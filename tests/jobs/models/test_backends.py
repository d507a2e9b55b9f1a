"""Backends and adapters: loading, errors, numeric types, and the state that Unsloth needs before it is imported."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llamarefine_jobs import entry
from llamarefine_jobs.contract.errors import DataError, RecipeError
from llamarefine_jobs.models import adapters, backends
from llamarefine_jobs.models.encoding import load_tokenizer
from llamarefine_jobs.models.scoring import generate
from tests.jobs import tiny

POSITIONS = 64


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a base with few positions."""
    folder = tmp_path_factory.mktemp("prepared")
    tokenizer = load_tokenizer(tiny.write_prepared(folder) / "base")
    tiny.make_model(len(tokenizer), max_position_embeddings=POSITIONS).save_pretrained(folder / "base")
    return folder / "base"


@pytest.fixture
def backend() -> backends.Backend:
    return backends.choose_backend()


@pytest.fixture
def adapter(base: Path, backend: backends.Backend, tmp_path: Path) -> Path:
    model = backend.add_adapter(backend.load(base), tiny.recipe().sft.lora, seed=1, gradient_checkpointing=False)
    adapters.save_adapter(model.peft_config["default"], adapters.adapter_state(model), tmp_path / "adapter", None)
    return tmp_path / "adapter"


@pytest.mark.parametrize("stage", ["sft", "dpo", "evaluate", "infer"])
def test_no_library_that_unsloth_patches_is_imported_before_the_backend_is_chosen(stage: str) -> None:
    code = f"""
import sys
from llamarefine_jobs import {stage}, entry, recipe_file
from llamarefine_jobs.models import backends
recipe = recipe_file.parse_recipe({tiny.RECIPE!r}, "tiny", ())
def choose():
    print(sorted({{"unsloth", "trl", "transformers", "peft"}} & set(sys.modules)))
    sys.exit()
backends.choose_backend = choose
with entry.seeded_threads(recipe):
    backends.choose_backend()
"""
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert completed.stdout == "[]\n", completed.stderr


def test_unsloth_sends_no_statistics_and_writes_code_to_a_private_folder(tmp_path: Path) -> None:
    environment = {"LLAMAREFINE_WORK": str(tmp_path)}
    backends.prepare_unsloth_environment(environment)
    folder = Path(environment["UNSLOTH_COMPILE_LOCATION"])
    assert folder.parent == tmp_path
    assert folder.stat().st_mode & 0o077 == 0
    assert environment["UNSLOTH_DISABLE_STATISTICS"] == "1"
    backends.prepare_unsloth_environment(environment)
    assert list(tmp_path.iterdir()) == [folder], "the second call created another folder"


def test_running_out_of_memory_while_loading_is_not_reported_as_a_bad_model(
    base: Path, adapter: Path, backend: backends.Backend, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """torch's out-of-memory error is a RuntimeError, as is its error for a weight of the wrong shape."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = backend.load(base)

    def raise_out_of_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", raise_out_of_memory)
    monkeypatch.setattr(PeftModel, "from_pretrained", raise_out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        adapters.attach_adapter(model, adapter)
    with pytest.raises(SystemExit) as exited, entry.exit_code("sft"):
        backend.load(base)
    assert exited.value.code == 14
    assert "lower sft.micro_batch_rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    "message", ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"]
)
def test_out_of_memory_errors_of_cuda_libraries_have_the_same_exit_code(message: str) -> None:
    with pytest.raises(SystemExit) as exited, entry.exit_code("evaluate"):
        raise RuntimeError(message)
    assert exited.value.code == 14


def test_rows_longer_than_the_models_positions_are_refused_in_one_line(base: Path, backend: backends.Backend) -> None:
    assert backend.load(base, max_length_tokens=POSITIONS)
    with pytest.raises(RecipeError, match="max_length_tokens: expected at most the base's 64 positions, found 65"):
        backend.load(base, max_length_tokens=POSITIONS + 1)


def test_a_folder_without_a_model_is_refused_in_one_line(backend: backends.Backend, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not load") as caught:
        backend.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_model_merged_in_memory_has_its_bases_tokenizer(base: Path, adapter: Path, tmp_path: Path) -> None:
    policy = adapters.merge_in_memory(base, adapter, tmp_path / "policy", bf16=False)
    expected, found = load_tokenizer(base), load_tokenizer(policy)
    assert found.get_vocab() == expected.get_vocab()
    assert (found.pad_token_id, found.eos_token_id) == (expected.pad_token_id, expected.eos_token_id)


def test_an_adapter_that_was_rounded_to_bf16_is_trained_in_fp32(base: Path, backend: backends.Backend) -> None:
    """TRL rounds the adapter of a 4-bit base to bf16, in which steps of DPO's size are lost."""
    step, weight = 5e-6, 0.01
    assert torch.tensor(weight).bfloat16() + torch.tensor(step).bfloat16() == torch.tensor(weight).bfloat16()
    model = backend.add_adapter(backend.load(base), tiny.recipe().dpo.lora, seed=1, gradient_checkpointing=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.bfloat16()
    adapters.cast_trainable_to_fp32(model)
    assert {parameter.dtype for parameter in trained} == {torch.float32}


def test_an_answer_ends_at_the_models_last_position(base: Path, backend: backends.Backend) -> None:
    tokenizer = load_tokenizer(base)
    prompt = tokenizer("alpha " * POSITIONS, add_special_tokens=False)["input_ids"][: POSITIONS - 5]
    answer = generate(backend.load(base), tokenizer, [prompt], max_new_tokens=40, batch_rows=1)[0]
    assert answer.tokens <= 5


def test_an_unknown_backend_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "LLAMAREFINE_BACKEND", "jax")
    with pytest.raises(RecipeError, match="expected transformers or unsloth, found jax"):
        backends.choose_backend()
