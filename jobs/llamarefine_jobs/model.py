"""Load a base, put adapters on it: two backends behind one interface.

Unsloth on CUDA (with bitsandbytes for 4 bits), transformers + peft elsewhere. `choose_backend`
says which runs and why. It is called before trl, transformers or peft are imported: Unsloth
patches them as it is imported.
"""

import importlib.util
import json
import os
from pathlib import Path
from typing import Any, Protocol

from llamarefine_jobs.contract.errors import DataError, RecipeError
from llamarefine_jobs.contract.recipe import Lora

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


class Backend(Protocol):
    """How models are loaded and adapted."""

    name: str
    reason: str
    accelerator: str
    bf16: bool
    flattens: bool  # attention keeps the rows of one flattened sequence apart, so no padding is needed

    def load(
        self,
        folder: Path,
        *,
        quantization: str = "none",
        max_length_tokens: int | None = None,
        dtype: str | None = None,
    ) -> Any:
        """The frozen model of a folder, on the accelerator; on CUDA in `dtype`, the backend's own when None."""

    def add_adapter(self, model: Any, lora: Lora, *, seed: int, gradient_checkpointing: bool) -> Any:
        """`model` with a fresh, trainable LoRA adapter; its B is 0, so it changes nothing yet."""


def choose_backend() -> Backend:
    """Unsloth where CUDA and the package are there, transformers + peft elsewhere.

    LLAMAREFINE_BACKEND=transformers takes the plain one on CUDA too, to compare the two.
    """
    import torch

    wish = os.environ.get("LLAMAREFINE_BACKEND", "")
    if wish not in ("", "transformers", "unsloth"):
        raise RecipeError(f"LLAMAREFINE_BACKEND: expected transformers or unsloth, found {wish}")
    cuda, unsloth = torch.cuda.is_available(), importlib.util.find_spec("unsloth") is not None
    if wish == "unsloth" and not (cuda and unsloth):
        missing = "the package (pip install 'llamarefine[gpu]')" if cuda else "a CUDA device"
        raise RecipeError(f"LLAMAREFINE_BACKEND=unsloth, but there is not {missing}")
    backend: Backend
    if cuda and unsloth and wish != "transformers":
        backend = UnslothBackend("CUDA is available")
    elif cuda:
        backend = TransformersBackend(
            "LLAMAREFINE_BACKEND asks for it" if wish else "unsloth is not installed (pip install 'llamarefine[gpu]')"
        )
    else:
        backend = TransformersBackend("CUDA is not available")
    _quiet_libraries()
    return backend


def describe(backend: Backend) -> str:
    """The notice that every stage prints: which backend, where, why."""
    return f"backend: {backend.name} on {backend.accelerator}, because {backend.reason}"


class TransformersBackend:
    """Plain transformers + peft: any machine, fp32 on a CPU, bf16 on CUDA."""

    name = "transformers + peft"
    flattens = False

    def __init__(self, reason: str) -> None:
        import torch

        self.reason = reason
        self.bf16 = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        self.accelerator = _accelerator()

    def load(
        self,
        folder: Path,
        *,
        quantization: str = "none",
        max_length_tokens: int | None = None,
        dtype: str | None = None,
    ) -> Any:
        import torch
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        cuda = torch.cuda.is_available()
        own = torch.bfloat16 if self.bf16 else torch.float32
        options: dict[str, Any] = {"dtype": getattr(torch, dtype) if dtype and cuda else own}
        if quantization == "nf4":
            if not cuda:
                raise RecipeError("quantization: nf4 needs a CUDA device, found none; set it to none to train on a CPU")
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=options["dtype"],
            )
        if cuda:
            options["device_map"] = {"": 0}
        try:
            model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, use_safetensors=True, **options)
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(f"the model in {folder.name}/ does not load: {str(error).splitlines()[0]}") from None
        return _freeze(model)

    def add_adapter(self, model: Any, lora: Lora, *, seed: int, gradient_checkpointing: bool) -> Any:
        from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
        from transformers import set_seed

        if getattr(model, "is_loaded_in_4bit", False):
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=gradient_checkpointing)
        set_seed(seed)
        config = LoraConfig(
            task_type="CAUSAL_LM",
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            use_rslora=lora.rslora,
            target_modules=list(lora.target_layers),
            bias="none",
        )
        return get_peft_model(model, config)


class UnslothBackend:
    """Unsloth's kernels and, for 4 bits, bitsandbytes: CUDA only."""

    name = "unsloth"
    flattens = True

    def __init__(self, reason: str) -> None:
        import torch
        import unsloth  # noqa: F401  (before transformers, trl and peft: it patches them)

        self.reason = reason
        self.bf16 = torch.cuda.is_bf16_supported()
        self.accelerator = _accelerator()

    def load(
        self,
        folder: Path,
        *,
        quantization: str = "none",
        max_length_tokens: int | None = None,
        dtype: str | None = None,
    ) -> Any:
        import torch
        from unsloth import FastLanguageModel

        own = torch.bfloat16 if self.bf16 else torch.float16
        model, _ = FastLanguageModel.from_pretrained(
            model_name=str(folder),
            max_seq_length=max_length_tokens or 2048,
            dtype=getattr(torch, dtype) if dtype else own,
            load_in_4bit=quantization == "nf4",
            load_in_16bit=quantization == "none",
            # Left alone, it would move the pad token to <unk>; ours is settled in encoding.py.
            fix_tokenizer=False,
            use_gradient_checkpointing=False,
        )
        return _freeze(model)

    def add_adapter(self, model: Any, lora: Lora, *, seed: int, gradient_checkpointing: bool) -> Any:
        from unsloth import FastLanguageModel

        return FastLanguageModel.get_peft_model(
            model,
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            use_rslora=lora.rslora,
            target_modules=list(lora.target_layers),
            bias="none",
            random_state=seed,
            use_gradient_checkpointing="unsloth" if gradient_checkpointing else False,
        )


def attach_adapter(model: Any, folder: Path) -> Any:
    """`model` with a published adapter on it, for inference. The adapter stays apart from the weights."""
    from peft import PeftModel

    try:
        return _freeze(PeftModel.from_pretrained(model, folder, is_trainable=False))
    except (RuntimeError, ValueError, KeyError) as error:
        raise DataError(f"the adapter does not fit its base: {str(error).splitlines()[0]}") from None


def merge_in_memory(base: Path, adapter: Path, into: Path, *, bf16: bool) -> Path:
    """Write base + adapter as a model folder, added in fp32 on the CPU; the DPO stage trains on it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        base, local_files_only=True, use_safetensors=True, dtype=torch.float32, device_map={"": "cpu"}
    )
    merged = attach_adapter(model, adapter).merge_and_unload()
    merged.to(torch.bfloat16 if bf16 else torch.float32).save_pretrained(into)
    return into


def adapter_state(model: Any) -> dict[str, Any]:
    """The adapter's tensors as PEFT names them in a file, on the CPU."""
    from peft import get_peft_model_state_dict

    return {name: tensor.detach().cpu().contiguous() for name, tensor in get_peft_model_state_dict(model).items()}


def save_adapter(config: Any, state: dict[str, Any], folder: Path, base_name: str | None) -> None:
    """Write an adapter in PEFT's format: the same bytes for the same adapter, no path of this machine in them."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    values = {
        key: sorted(value) if isinstance(value, set) else getattr(value, "value", value)
        for key, value in config.to_dict().items()
    }
    values |= {"base_model_name_or_path": base_name, "inference_mode": True, "revision": None}
    if isinstance(values.get("target_modules"), list):
        values["target_modules"] = sorted(values["target_modules"])
    text = json.dumps(values, indent=2, sort_keys=True, default=str)
    (folder / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")


def _freeze(model: Any) -> Any:
    model.requires_grad_(False)
    model.config.use_cache = True
    return model.eval()


def _accelerator() -> str:
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return f"{torch.cuda.get_device_name(0)} ({torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB)"


def _quiet_libraries() -> None:
    """Progress is ours to show, and warnings that no user can act on drown the ones they can."""
    import warnings

    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|trl|accelerate|datasets)\b.*")
