"""Backends: the ways to load a base model and to add a LoRA adapter, behind one interface, and the choice among them.

`packed` and `transformers` load the same model, by transformers + peft; they differ in the step that trains it.
`unsloth` loads a model that Unsloth patched. A training calls `choose_backend` before transformers or peft is imported,
because importing Unsloth patches both. Adapters that are already trained are handled in adapters.py.
"""

import atexit
import contextlib
import gc
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from llamarefine_jobs.contract.environment import WORK_FOLDER
from llamarefine_jobs.contract.errors import DataError, LlamaRefineError, RecipeError
from llamarefine_jobs.contract.recipe import Lora
from llamarefine_jobs.models.encoding import as_one_line
from llamarefine_jobs.process.out_of_memory import is_out_of_memory
from llamarefine_jobs.untrusted.remote_code import refuse_remote_code
from llamarefine_jobs.untrusted.safe_json import read_object

BF16_CAPABILITY = (8, 0)  # the first CUDA compute capability with bf16, and the first with flash attention


class Backend(Protocol):
    """A way to load models and to add adapters to them."""

    name: str  # packed, transformers or unsloth
    reason: str  # why it was chosen
    accelerator: str
    bf16: bool

    def load(
        self,
        folder: Path,
        *,
        quantization: str = "none",
        max_length_tokens: int | None = None,
        dtype: str | None = None,
    ) -> Any:
        """Return the model in `folder`, frozen, on the accelerator.

        On CUDA the weights have the type `dtype`, or the backend's default type when it is None; on a CPU always fp32.
        Raises RecipeError when `max_length_tokens` exceeds the positions that the model has.
        """

    def add_adapter(self, model: Any, lora: Lora, *, seed: int, gradient_checkpointing: bool) -> Any:
        """Return `model` with a new trainable LoRA adapter. Its B matrices are 0, so the output is still the base's."""


@dataclass(frozen=True)
class Machine:
    """What the choice of a backend depends on."""

    card: str | None  # name of the CUDA device; None without one
    capability: tuple[int, int]  # of that device; (0, 0) without one
    unsloth_installed: bool


def choose_backend(requested: str = "auto", processes: int = 1, key: str = "backend") -> Backend:
    """Return the backend of a training in `processes` processes. `requested` is the value of the recipe's `key`.

    Raises RecipeError if the requested backend cannot run here.
    """
    name, reason = decide(requested, _find_machine(), processes, key)
    backend = UnslothBackend(reason) if name == "unsloth" else TransformersBackend(name, reason)
    _set_up_libraries()
    return backend


def inference_backend() -> Backend:
    """Return the backend that evaluate and infer use: plain transformers, on every machine.

    Unsloth patches Llama for the whole process, after which no Llama runs on the CPU in it. So only a training that
    uses Unsloth imports it.
    """
    backend = TransformersBackend("transformers", "models that are not trained need no other")
    _set_up_libraries()
    return backend


def decide(requested: str, machine: Machine, processes: int, key: str) -> tuple[str, str]:
    """Return the name of a training's backend, and the reason for it.

    `auto` means packed, or unsloth where that cannot run, or transformers where neither can. Unsloth is not preferred
    on newer cards, in 16 bits or in nf4: on an H200 it was slower than transformers + peft (docs/gpu.md).
    """
    obstacles = {
        "packed": _obstacle_to_packed(machine),
        "unsloth": _obstacle_to_unsloth(machine, processes),
        "transformers": None,
    }
    if requested != "auto":
        if obstacle := obstacles[requested]:
            raise RecipeError(f"{key}: {requested} {obstacle}; set it to auto")
        return requested, f"{key} is set to it"
    in_the_way = []
    for name, obstacle in obstacles.items():
        if obstacle is None:
            break
        in_the_way.append(f"{name} {obstacle}")
    return name, "; ".join(in_the_way) or "it is the default"


def _obstacle_to_packed(machine: Machine) -> str | None:
    """Return why the packed step cannot run, or None. On a CPU it runs; on CUDA it needs bf16 and flash attention."""
    if machine.card is None or machine.capability >= BF16_CAPABILITY:
        return None
    needed, found = (".".join(map(str, capability)) for capability in (BF16_CAPABILITY, machine.capability))
    return f"needs compute capability {needed} or newer (bf16, flash attention), and {machine.card} has {found}"


def _obstacle_to_unsloth(machine: Machine, processes: int) -> str | None:
    """Return why Unsloth cannot train here, or None."""
    if machine.card is None:
        return "needs a CUDA device, and there is none"
    if not machine.unsloth_installed:
        return "needs its package, which is not installed (pip install 'llamarefine[gpu]')"
    if processes > 1:
        return f"trains in one process here, and gpus x nodes is {processes}"
    return None


def _find_machine() -> Machine:
    import torch

    unsloth_installed = importlib.util.find_spec("unsloth") is not None
    if not torch.cuda.is_available():
        return Machine(None, (0, 0), unsloth_installed)
    return Machine(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), unsloth_installed)


def describe_backend(backend: Backend) -> str:
    """Return the line that every stage logs: which backend runs, on which device, and why."""
    return f"backend: {backend.name} on {backend.accelerator}, because {backend.reason}"


class TransformersBackend:
    """transformers + peft, on any machine: fp32 on a CPU, bf16 on CUDA devices that support it.

    It is the backend `packed` as well as `transformers`: which step trains the model is the training's matter.
    """

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        self.accelerator, self.bf16 = _accelerator(), _has_bf16()

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
        default_dtype = torch.bfloat16 if self.bf16 else torch.float32
        options: dict[str, Any] = {"dtype": getattr(torch, dtype) if dtype and cuda else default_dtype}
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
            options["device_map"] = {"": torch.cuda.current_device()}  # each process trains on its own device
        with loading(f"the model in {folder.name}/ does not load"):
            model = AutoModelForCausalLM.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, **options
            )
        return freeze(model)

    def add_adapter(self, model: Any, lora: Lora, *, seed: int, gradient_checkpointing: bool) -> Any:
        from peft import LoraConfig, get_peft_model
        from transformers import set_seed

        # peft's prepare_model_for_kbit_training is not called on a 4-bit base: it casts the norms to fp32, which makes
        # every activation fp32 too, so activations take twice the memory that they take on a 16-bit base.
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
        if gradient_checkpointing:
            # Frozen embeddings give the first layer an input without a gradient, which the reentrant way cannot take.
            # Reading the state of the random numbers could not be captured in a CUDA graph.
            model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": lora.dropout > 0})
        return get_peft_model(model, config)


class UnslothBackend:
    """Unsloth's kernels, with bitsandbytes for 4 bits. CUDA only."""

    name = "unsloth"

    def __init__(self, reason: str) -> None:
        prepare_unsloth_environment(os.environ)
        with contextlib.redirect_stdout(sys.stderr):  # Unsloth prints a banner; a stage's stdout is its log
            import unsloth  # noqa: F401  (before transformers and peft: it patches them)

        self.reason = reason
        self.accelerator, self.bf16 = _accelerator(), _has_bf16()

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
        default_dtype = torch.bfloat16 if self.bf16 else torch.float16
        with loading(f"the model in {folder.name}/ does not load"), contextlib.redirect_stdout(sys.stderr):
            model, _ = FastLanguageModel.from_pretrained(
                model_name=str(folder),
                use_exact_model_name=True,  # without it, Unsloth maps known names to its own Hub repositories
                local_files_only=True,
                trust_remote_code=False,
                # None means the model's own number of positions. A smaller number cuts longer rows with only a
                # warning; a larger one rescales the rotary positions of every row.
                max_seq_length=None,
                dtype=getattr(torch, dtype) if dtype else default_dtype,
                load_in_4bit=quantization == "nf4",
                load_in_16bit=quantization == "none",
                offload_embedding=False,  # otherwise Unsloth moves the embeddings to the CPU when memory is short
                # Otherwise Unsloth changes the pad token to <unk>; encoding.py chooses our pad token.
                fix_tokenizer=False,
                use_gradient_checkpointing=False,
            )
        return freeze(model)

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
    """Set the variables that Unsloth reads on import: no download statistics, generated code in a private folder.

    By default Unsloth writes generated code below the working directory (read-only in our containers), or else into a
    folder with a fixed name in the system's temporary directory, which any user can create; it then puts that folder
    first on `sys.path`.
    """
    environment.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")  # its request to the Hub blocks for up to two minutes
    if "UNSLOTH_COMPILE_LOCATION" not in environment:
        folder = tempfile.mkdtemp(prefix="llamarefine-unsloth-", dir=environment.get(WORK_FOLDER))
        environment["UNSLOTH_COMPILE_LOCATION"] = folder
        atexit.register(shutil.rmtree, folder, ignore_errors=True)


def freeze(model: Any) -> Any:
    """Return `model` in evaluation mode, with no trainable parameter and its key/value cache on."""
    model.requires_grad_(False)
    model.config.use_cache = True
    return model.eval()


@contextlib.contextmanager
def loading(failure: str) -> Iterator[None]:
    """Turn any error of a library that loads a user's files into a one-line DataError that begins with `failure`.

    Out-of-memory errors pass unchanged, because the files did not cause them.
    """
    try:
        yield
    except LlamaRefineError:
        raise
    except Exception as error:  # the libraries raise anything for a malformed config, such as AttributeError
        if is_out_of_memory(error):  # torch's is a RuntimeError, as is its error for a wrong shape
            raise
        raise DataError(f"{failure}: {as_one_line(error)}") from None


def free_memory() -> None:
    """Release the memory of models that are no longer referenced, on the CPU and on CUDA.

    PEFT's wrappers refer to each other, so only the garbage collector frees them.
    """
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _check_length(folder: Path, max_length_tokens: int | None) -> None:
    """Raise RecipeError if rows can exceed the model's positions.

    Unsloth would cut such rows; transformers would use positions that the model was not trained for.
    """
    refuse_remote_code(folder)
    with loading(f"the model in {folder.name}/ does not load"):
        positions = read_object(folder / "config.json").get("max_position_embeddings")
    if positions and max_length_tokens and max_length_tokens > positions:
        raise RecipeError(
            f"max_length_tokens: expected at most the base's {positions} positions, found {max_length_tokens}"
        )


def _accelerator() -> str:
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    return f"{torch.cuda.get_device_name(0)} ({torch.cuda.get_device_properties(0).total_memory / 2**30:.0f} GiB)"


def _has_bf16() -> bool:
    """Return whether the CUDA device computes in bf16. torch's own answer is True where it only emulates bf16, too."""
    import torch

    return bool(torch.cuda.is_available() and torch.cuda.get_device_capability() >= BF16_CAPABILITY)


def _set_up_libraries() -> None:
    """Turn off cuDNN's attention, and the libraries' progress bars and warnings. Stages log their own progress.

    Users cannot act on these warnings, and among them they would overlook the messages that they can act on.
    """
    import warnings

    import torch
    import transformers

    if torch.cuda.is_available():
        # cuDNN's attention plans anew for every new shape, which took the CPU 3 ms a call on an H200. Rows have many
        # lengths; flash attention and the memory-efficient kernel need no plan.
        torch.backends.cuda.enable_cudnn_sdp(False)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"(torch|transformers|peft|accelerate|unsloth|unsloth_zoo|trl)\b.*")
