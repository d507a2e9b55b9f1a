"""Run Unsloth without a card, for tests: torch reports a card, and Triton interprets its kernels on the CPU.

Python imports a module of this name at start, so with this folder on PYTHONPATH it applies to every process of a stage.
Unsloth's own code runs: its loading, its changes to trl's trainers, and the arithmetic of its kernels, bf16 included.
CUDA does not run: torch uses its CPU kernels, nothing is compiled, memory cannot run out, and everything is slow.
"""

import contextlib
import os
from types import SimpleNamespace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"
os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # `_CudaOnCpu` below works in one thread only

import ml_dtypes
import numpy as np
import torch
import torch._dynamo  # before the patches below: it lists torch's functions and checks that each is torch's own
import torch.utils.checkpoint
import triton.language as tl
from torch.overrides import TorchFunctionMode
from triton.runtime import interpreter

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_MEMORY_BYTES = 80 << 30
_CARD = SimpleNamespace(
    name="no card, Triton's interpreter",
    major=9,
    minor=0,
    total_memory=_MEMORY_BYTES,
    multi_processor_count=132,
    warp_size=32,
    gcnArchName="",
)
_RESULTS = {
    "current_device": 0,
    "device_count": 1,
    "get_device_capability": (9, 0),
    "get_device_name": _CARD.name,
    "get_device_properties": _CARD,
    "get_rng_state": torch.zeros(8, dtype=torch.uint8),
    "get_rng_state_all": [torch.zeros(8, dtype=torch.uint8)],
    "is_available": True,
    "is_bf16_supported": True,
    "is_current_stream_capturing": False,
    "is_initialized": True,
    "max_memory_allocated": 0,
    "max_memory_reserved": 0,
    "mem_get_info": (_MEMORY_BYTES, _MEMORY_BYTES),
    "memory_allocated": 0,
    "memory_reserved": 0,
    "memory_stats": {},
}
_NO_OPS = (
    "_lazy_init",
    "empty_cache",
    "init",
    "manual_seed",
    "manual_seed_all",
    "reset_peak_memory_stats",
    "set_device",
    "set_rng_state",
    "set_rng_state_all",
    "synchronize",
)


class _CudaOnCpu(TorchFunctionMode):
    """Keeps every tensor on the CPU, and reports CPU tensors as being on the card."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function == torch.Tensor.is_cuda.__get__:
            return True
        if function == torch.Tensor.device.__get__:
            found = function(*args)
            return torch.device("cuda", 0) if found.type == "cpu" else found
        if function in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if function is torch.Tensor.to and len(args) > 1 and isinstance(args[1], int):
            args = (args[0], "cpu", *args[2:])
        named = {key: _on_cpu(value) for key, value in (kwargs or {}).items() if key != "pin_memory"}
        if isinstance(named.get("device"), int):
            named["device"] = "cpu"
        return function(*map(_on_cpu, args), **named)


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.device | str) and str(value).partition(":")[0] == "cuda":
        return type(value)("cpu")
    return value


class _Stream:
    """A CUDA stream or event; all work is finished when it is asked, since everything runs synchronously."""

    cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return _returning(None)

    def query(self) -> bool:
        return True


class _Device(contextlib.nullcontext[None]):
    idx = 0

    def __init__(self, *_: Any) -> None:
        super().__init__()


def _returning(value: Any) -> Any:
    return lambda *_, **__: value


def fake_cuda() -> None:
    """Replace functions of `torch.cuda` so that it reports a card."""
    for name, value in (_RESULTS | dict.fromkeys(_NO_OPS)).items():
        setattr(torch.cuda, name, _returning(value))
        if hasattr(torch.cuda.random, name):
            setattr(torch.cuda.random, name, _returning(value))
    torch.cuda.Stream = torch.cuda.Event = _Stream
    torch.cuda.current_stream = torch.cuda.default_stream = torch.accelerator.current_stream = _Stream
    torch.cuda.device, torch.cuda.stream = _Device, _Device
    torch.accelerator.current_device_index = _returning(0)
    torch._C._cuda_getCurrentRawStream = _returning(0)
    mode, run_backward = _CudaOnCpu(), torch.autograd._engine_run_backward

    def run_backward_with_mode(*args: Any, **kwargs: Any) -> Any:
        with mode:  # torch turns it off during `backward`, in which recomputed layers run forward
            return run_backward(*args, **kwargs)

    checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns
    description = checks["default"]

    def description_without_mode(tensor: Any) -> Any:  # the mode is off when the forward pass calls it
        with torch._C.DisableTorchFunction():
            return description(tensor)

    torch.autograd._engine_run_backward, checks["default"] = run_backward_with_mode, description_without_mode
    mode.__enter__()


def interpret_bf16() -> None:
    """Make Triton's interpreter compute in bf16: its own code adds the bits as integers, and its rounding is wrong."""
    own, handle, builder = interpreter._get_np_dtype, interpreter.TensorHandle, interpreter.InterpreterBuilder

    def dtype_of(kind: Any) -> Any:
        is_bf16 = not isinstance(kind, tl.pointer_type) and kind.scalar == tl.bfloat16
        return _BFLOAT16 if is_bf16 else own(kind)

    def cast(self: Any, source: Any, kind: Any, *_: Any) -> Any:
        return handle(source.data.astype(dtype_of(kind)), kind.scalar)

    def load(self: Any, pointers: Any, mask: Any, other: Any, *_: Any) -> Any:
        kind = pointers.get_element_ty()
        dtype = dtype_of(kind)
        bits = np.dtype(np.uint16) if dtype == _BFLOAT16 else dtype
        rest = np.zeros_like(pointers.data, dtype=bits) if other is None else other.data.astype(dtype).view(bits)
        return handle(interpreter._interpreter.load(pointers.data, mask.data, rest, bits).view(dtype), kind)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *_: Any) -> Any:
        data = value.data.view(np.uint16) if value.data.dtype == _BFLOAT16 else value.data
        return interpreter._interpreter.store(pointers.data, data, mask.data)

    interpreter._get_np_dtype = dtype_of
    builder.cast_impl = builder.create_fp_ext = builder.create_fp_trunc = builder.create_fp_to_fp = cast
    builder.create_masked_load, builder.create_masked_store = load, store


interpret_bf16()
fake_cuda()
