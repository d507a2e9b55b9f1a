"""The memory that a training step of the real trainers needs, compared with the estimate that `plan` prints.

On a card the measurement is the allocator's peak. Without a card, the bytes of all tensors alive at the same time are
counted. That covers what a trainer keeps for its backward pass, but not what cuBLAS and the allocator add.
"""

import contextlib
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llamarefine_jobs.contract.memory import CUDA_CONTEXT_BYTES, training_bytes
from llamarefine_jobs.contract.memory import Shape as Sizes
from llamarefine_jobs.models import backends
from tests.gpu import trainers
from tests.gpu.shapes import INTERPRETED, Shape, write_prepared
from tests.jobs import tiny

_ROWS, _WORDS = (2, 40) if INTERPRETED else (4, 200)  # per micro-batch; per answer
# For the interpreter: large enough that tensors outside the estimate, such as the table of positions, hardly count.
_WIDER = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4}


class LiveTensorBytes(TorchDispatchMode):
    """Counts the bytes of a model's tensors and of every result of an operation, as long as each is alive."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak_bytes = 0
        for tensor in (*model.parameters(), *model.buffers()):
            self.add(tensor)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor)
        return result

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            weakref.finalize(storage, self.sizes.pop, storage._cdata)
            self.peak_bytes = max(self.peak_bytes, sum(self.sizes.values()))


@pytest.mark.parametrize("recompute", ["false", "true"], ids=["kept", "recomputed"])
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_step_needs_the_estimated_memory(
    stage: str,
    recompute: str,
    shape: Shape,
    quantization: str,
    cuda: bool,
    backend: Any,
    tmp_path: Path,
    figure: Callable[[str], None],
) -> None:
    """A step whose layers are not compiled; how much less compiled layers need is printed only."""
    if not cuda:
        pytest.skip("the estimate is for a training in 16 bits, on CUDA")
    with_unsloth = backend.name == "unsloth"
    if INTERPRETED and with_unsloth and recompute == "true":
        pytest.skip("tensors that Unsloth moves to host memory would be counted too")
    row = ("what is it", "it is " + " ".join(map(str, range(_WORDS))))
    shape = replace(shape, config=shape.config | (_WIDER if INTERPRETED else {}))
    prepared = write_prepared(tmp_path / "prepared", shape, [row] * 32)
    values = {"quantization": quantization, "gradient_checkpointing": recompute, "backend": backend.name}
    values |= {"max_steps": 2, "epochs": 1, "batch_rows": _ROWS, "micro_batch_rows": _ROWS}
    recipe = tiny.recipe(*shape.settings, *(f"{stage}.{name}={value}" for name, value in values.items()))
    section: Any = recipe.section(stage)
    backends.free_memory()
    before = torch.cuda.memory_allocated()
    context = trainers.make_context(stage, recipe, prepared, tmp_path / "work")
    model, tokenizer = trainers.load(backend, context, prepared / "base")
    forward = trainers.make_forward(context, backend, model, tokenizer)
    trainer = trainers.make_trainer(context, forward, tokenizer, trainers.make_examples(context, forward, tokenizer))
    trainer.model.train()
    length_tokens = max(len(row) for example in trainer.examples for row in example.rows)
    estimated = training_bytes(Sizes.from_config(model.config.to_dict()), section, length_tokens) - CUDA_CONTEXT_BYTES
    live = LiveTensorBytes(trainer.model) if INTERPRETED else None

    def peak_of_a_step() -> int:
        torch.cuda.reset_peak_memory_stats()
        with live or contextlib.nullcontext():
            trainer.step_loss(1)
            trainer.weights.update(0.0)
        return live.peak_bytes if live else torch.cuda.max_memory_allocated() - before

    peak = peak_of_a_step()
    figure(
        f"{stage}: peak {peak / 2**20:.1f} MiB, estimate {estimated / 2**20:.1f} MiB, {length_tokens} tokens per row"
    )
    if backend.name == "packed":
        trainer.prepare()
        figure(f"{stage}: with compiled layers and CUDA graphs: peak {peak_of_a_step() / 2**20:.1f} MiB")
        trainer.gradient.uncompile_layers()
    assert peak == pytest.approx(estimated, rel=0.15)
