"""Load a base, put adapters on it: two backends behind one interface.

Unsloth on CUDA (with bitsandbytes for 4 bits), transformers + peft elsewhere. `choose_backend`
says which runs and why. It is called before trl, transformers or peft are imported: Unsloth
patches them as it is imported.
"""

import atexit
import contextlib
import gc
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any, Protocol

from llamarefine_jobs.contract.errors import DataError, LlamaRefineError, RecipeError
from llamarefine_jobs.contract.recipe import Lora
from llamarefine_jobs.models.encoding import as_one_line, load_tokenizer
from llamarefine_jobs.models.lora import read_adapter
from llamarefine_jobs.process.out_of_memory import is_out_of_memory
from llamarefine_jobs.untrusted.remote_code import refuse_remote_code
from llamarefine_jobs.untrusted.safe_json import read_object

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
        """The frozen model of a folder, on the accelerator; on CUDA in `dtype`, the backend's own when None.

        RecipeError where rows of `max_length_tokens` are longer than the model was made for.
        """

    def add_adapter(self, model: Any, lora: Lora, *, seed: int, gradient_checkpointing: bool) -> Any:
        """`model` with a fresh, trainable LoRA adapter; its B is 0, so it changes nothing yet."""


def choose_backend(processes: int = 1) -> Backend:
    """Unsloth where CUDA and the package are there, transformers + peft elsewhere, and for several processes.

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
    if wish == "unsloth" and processes > 1:
        raise RecipeError("LLAMAREFINE_BACKEND=unsloth, but it trains in one process here; set gpus and nodes to 1")
    backend: Backend
    if cuda and processes > 1:
        backend = TransformersBackend(f"{processes} processes train together, and unsloth trains in one here")
    elif cuda and unsloth and wish != "transformers":
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

        _check_length(folder, max_length_tokens)
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
            options["device_map"] = {"": torch.cuda.current_device()}  # each process has its own
        with _one_line(f"the model in {folder.name}/ does not load"):
            model = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, **options
            )
        return _freeze(model)

    def add_adapter(self, model: Any, lora: Lora, *, seed: int, gradient_checkpointing: bool) -> Any:
        from peft import LoraConfig, get_peft_model
        from transformers import set_seed

        # PEFT's preparation of a 4-bit base is left out: with its norms in fp32 every activation is, and takes twice
        # the memory of those on a base of 16 bits.
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

        prepare_unsloth_environment(os.environ)
        with contextlib.redirect_stdout(sys.stderr):  # it prints a banner, and infer's standard output is the answers
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

        _check_length(folder, max_length_tokens)
        own = torch.bfloat16 if self.bf16 else torch.float16
        with _one_line(f"the model in {folder.name}/ does not load"), contextlib.redirect_stdout(sys.stderr):
            model, _ = FastLanguageModel.from_pretrained(
                model_name=str(folder),
                use_exact_model_name=True,  # it maps names to its own repositories otherwise
                local_files_only=True,
                trust_remote_code=False,
                # Its forward pass cuts longer rows with no more than a warning, and a number past the model's own
                # stretches the positions of every row: None is the model's own.
                max_seq_length=None,
                dtype=getattr(torch, dtype) if dtype else own,
                load_in_4bit=quantization == "nf4",
                load_in_16bit=quantization == "none",
                offload_embedding=False,  # when memory is tight it would move the embedding to the CPU unasked
                # Left alone, it would move the pad token to <unk>; ours is settled in encoding.py.
                fix_tokenizer=False,
                use_gradient_checkpointing=False,
            )
        return _freeze(model)

    def add_adapter(self, model: Any, lora: Lora, *, seed: int, gradient_checkpointing: bool) -> Any:
        from unsloth import FastLanguageModel

        with contextlib.redirect_stdout(sys.stderr):
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


def prepare_unsloth_environment(environment: MutableMapping[str, str]) -> None:
    """Before Unsloth is imported: no download counter, and its generated code in a folder of this process alone.

    By default it writes that code below the working folder (read-only in our containers), else into one
    folder of the system's temporary ones that every user knows, and puts it first on `sys.path`.
    """
    environment.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")  # it asks the Hub, and waits two minutes for it
    if "UNSLOTH_COMPILE_LOCATION" not in environment:
        folder = tempfile.mkdtemp(prefix="llamarefine-unsloth-", dir=environment.get("LLAMAREFINE_WORK"))
        environment["UNSLOTH_COMPILE_LOCATION"] = folder
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


def attach_adapter(model: Any, folder: Path) -> Any:
    """`model` with a published adapter on it, for inference. The adapter stays apart from the weights."""
    from peft import PeftModel

    if not (folder / ADAPTER_WEIGHTS).is_file():  # PEFT would read a pickle instead, or ask the Hub
        raise DataError(f"the adapter in {folder.name}/ holds no {ADAPTER_WEIGHTS}; only safetensors are read")
    read_adapter(folder, folder.parent.name)  # of PEFT's settings only those of a plain LoRA pass
    with _one_line("the adapter does not fit its base"):
        return _freeze(PeftModel.from_pretrained(model, folder, is_trainable=False))


def merge_in_memory(base: Path, adapter: Path, into: Path, *, bf16: bool) -> Path:
    """Write base + adapter as a model folder, added in fp32 on the CPU; the DPO stage trains on it.

    The base's tokenizer lies beside the weights: Unsloth loads no model without one.
    """
    import torch
    from safetensors.torch import save_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        base,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        dtype=torch.float32,
        device_map={"": "cpu"},
    )
    merged = attach_adapter(model, adapter).merge_and_unload().to(torch.bfloat16 if bf16 else torch.float32)
    # Not by `merged.save_pretrained`: among several processes it writes nothing but in the first of them.
    merged.config.dtype = merged.dtype
    merged.config.save_pretrained(into)
    merged.generation_config.save_pretrained(into)
    save_model(merged, str(into / "model.safetensors"), metadata={"format": "pt"})
    load_tokenizer(base).save_pretrained(into)
    return into


def hold_in_fp32(model: Any) -> None:
    """Keep what is trained in fp32.

    On a 4-bit base TRL rounds adapters to bf16 as it builds its trainer, and an update of DPO's size is then lost:
    at a weight of 0.01 bf16's next number is 6e-5 away, ten learning rates.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def free_memory() -> None:
    """Give back what a dropped model held. PEFT's wrappers refer to one another, so reference counts do not reach 0."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
    values |= {"base_model_name_or_path": base_name, "inference_mode": True, "revision": None, "auto_mapping": None}
    # By name, whatever pattern a backend has found them by: read_adapter takes no pattern.
    values["target_modules"] = sorted({name.rsplit(".", 3)[1] for name in state})
    text = json.dumps(values, indent=2, sort_keys=True, default=str)
    (folder / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")


def _freeze(model: Any) -> Any:
    model.requires_grad_(False)
    model.config.use_cache = True
    return model.eval()


@contextlib.contextmanager
def _one_line(what: str) -> Iterator[None]:
    """What a library says of a user's files, as one DataError. Memory that runs out is not the files' fault."""
    try:
        yield
    except LlamaRefineError:
        raise
    except Exception as error:  # for a strange config they raise what comes: AttributeError, errors of their own
        if is_out_of_memory(error):  # torch's is a RuntimeError
            raise
        raise DataError(f"{what}: {as_one_line(error)}") from None


def _check_length(folder: Path, max_length_tokens: int | None) -> None:
    """Refuse rows longer than the model was made for: Unsloth would cut them, transformers reads past its positions."""
    refuse_remote_code(folder)
    with _one_line(f"the model in {folder.name}/ does not load"):
        positions = read_object(folder / "config.json").get("max_position_embeddings")
    if positions and max_length_tokens and max_length_tokens > positions:
        raise RecipeError(f"max_length_tokens: expected at most the {positions} of the base, found {max_length_tokens}")


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
