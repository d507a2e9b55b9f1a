"""Backends and adapters: loading, errors, numeric types, and the state that Unsloth needs before it is imported."""

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


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_no_library_that_unsloth_patches_is_imported_before_the_backend_is_chosen(stage: str) -> None:
    code = f"""
import sys
from llamarefine_jobs import {stage}, entry, recipe_file
from llamarefine_jobs.models import backends
recipe = recipe_file.parse_recipe({tiny.RECIPE!r}, "tiny", ())
def choose():
    print(sorted({{"unsloth", "trl", "transformers", "peft", "datasets"}} & set(sys.modules)))
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


def test_the_adapter_of_a_16_bit_base_is_trained_in_fp32(base: Path, backend: backends.Backend) -> None:
    """In bf16, steps of DPO's size are lost."""
    step, weight = 5e-6, 0.01
    assert torch.tensor(weight).bfloat16() + torch.tensor(step).bfloat16() == torch.tensor(weight).bfloat16()
    model = backend.load(base).bfloat16()
    model = backend.add_adapter(model, tiny.recipe().dpo.lora, seed=1, gradient_checkpointing=False)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}


def machine(capability: tuple[int, int] | None = None, *, unsloth_installed: bool = True) -> backends.Machine:
    """Return a machine with a CUDA device of that compute capability, or without one."""
    card = None if capability is None else "a card"
    return backends.Machine(card, capability or (0, 0), unsloth_installed)


CPU = machine()
H200 = machine((9, 0))
T4 = machine((7, 5))
T4_WITHOUT_UNSLOTH = machine((7, 5), unsloth_installed=False)
DEFAULT, SET = "it is the default", "sft.backend is set to it"
TOO_OLD = "packed needs compute capability 8.0 or newer (bf16, flash attention), and a card has 7.5"


@pytest.mark.parametrize(
    ("requested", "found", "processes", "name", "reason"),
    [
        ("auto", CPU, 1, "packed", DEFAULT),
        ("auto", CPU, 2, "packed", DEFAULT),
        ("auto", H200, 1, "packed", DEFAULT),
        ("auto", H200, 8, "packed", DEFAULT),
        ("auto", machine((8, 0)), 1, "packed", DEFAULT),
        ("auto", T4, 1, "unsloth", TOO_OLD),
        ("auto", T4, 2, "transformers", f"{TOO_OLD}; unsloth trains in one process here, and gpus x nodes is 2"),
        (
            "auto",
            T4_WITHOUT_UNSLOTH,
            1,
            "transformers",
            f"{TOO_OLD}; unsloth needs its package, which is not installed (pip install 'llamarefine[gpu]')",
        ),
        ("packed", CPU, 1, "packed", SET),
        ("packed", H200, 2, "packed", SET),
        ("unsloth", H200, 1, "unsloth", SET),
        ("unsloth", T4, 1, "unsloth", SET),
        ("transformers", CPU, 1, "transformers", SET),
        ("transformers", H200, 2, "transformers", SET),
        ("transformers", T4, 1, "transformers", SET),
    ],
)
def test_the_backend_depends_on_the_recipe_the_card_and_the_packages(
    requested: str, found: backends.Machine, processes: int, name: str, reason: str
) -> None:
    assert backends.decide(requested, found, processes, "sft.backend") == (name, reason)


@pytest.mark.parametrize(
    ("requested", "found", "processes", "message"),
    [
        ("packed", T4, 1, f"dpo.backend: {TOO_OLD}; set it to auto"),
        ("unsloth", CPU, 1, "dpo.backend: unsloth needs a CUDA device, and there is none; set it to auto"),
        (
            "unsloth",
            machine((9, 0), unsloth_installed=False),
            1,
            "dpo.backend: unsloth needs its package, which is not installed (pip install 'llamarefine[gpu]'); "
            "set it to auto",
        ),
        (
            "unsloth",
            H200,
            2,
            "dpo.backend: unsloth trains in one process here, and gpus x nodes is 2; set it to auto",
        ),
    ],
)
def test_a_backend_that_cannot_run_here_is_refused_in_one_line(
    requested: str, found: backends.Machine, processes: int, message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        backends.decide(requested, found, processes, "dpo.backend")
    assert str(caught.value) == message


def test_what_is_chosen_on_this_machine_is_what_the_rules_say() -> None:
    backend = backends.choose_backend("transformers", key="sft.backend")
    assert (backend.name, backend.reason) == ("transformers", "sft.backend is set to it")
    if not torch.cuda.is_available():
        assert (backend.accelerator, backend.bf16) == ("cpu", False)
        assert backends.choose_backend().name == "packed"
        with pytest.raises(RecipeError, match=r"^sft\.backend: unsloth needs a CUDA device"):
            backends.choose_backend("unsloth", key="sft.backend")


@pytest.mark.parametrize("stage", ["evaluate", "infer"])
def test_a_stage_that_does_not_train_imports_neither_unsloth_nor_what_only_trainings_and_data_need(stage: str) -> None:
    """Unsloth patches Llama for the whole process, and `datasets` takes longer to import than transformers."""
    code = f"""
import sys
from llamarefine_jobs import {stage}
from llamarefine_jobs.models import backends
from transformers import AutoModelForCausalLM
from peft import PeftModel
print(backends.inference_backend().name, sorted({{"unsloth", "trl", "datasets"}} & set(sys.modules)))
"""
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert completed.stdout == "transformers []\n", completed.stderr
