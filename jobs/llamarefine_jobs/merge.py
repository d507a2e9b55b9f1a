"""Merge: add the SFT and DPO adapters to the base in fp32, round once, and prove the result.

    python -m llamarefine_jobs.merge --recipe recipe.yaml --store s3://bucket/prefix

Reads prepare's base/ and the adapters of sft and dpo, writes model/. The sum streams the tensors in blocks, so its
memory depends on the largest tensor, not on the size of the model. The proof (models/merge_proof.py) then loads model/
in fp32 with plain `AutoModelForCausalLM.from_pretrained`.

This project's tests run neither vLLM nor llama.cpp. vLLM was never run. llama.cpp's converter was run by hand only: it
converted a model with a SentencePiece-like tokenizer.json and refused the demo's own BPE tokenizer.
"""

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from math import prod
from typing import Any

from llamarefine_jobs import entry
from llamarefine_jobs.context import Context
from llamarefine_jobs.contract.errors import DataError
from llamarefine_jobs.models import model_folder
from llamarefine_jobs.models.adapters import check_lineage
from llamarefine_jobs.models.lora import Updates, changes_nothing, check_fits, read_adapter
from llamarefine_jobs.models.weights import BLOCK_ELEMENTS, Weights, write_weights

_MB = 10**6


def work(context: Context) -> None:
    """Merge the adapters into the base and prove the result."""
    section, base = context.recipe.merge, context.inputs["prepare"] / "base"
    context.backend, context.accelerator = "streamed sum", "cpu"
    check_lineage(context, "sft", "prepare")
    check_lineage(context, "dpo", "prepare", "sft")

    # Inputs: all checks that can refuse them run before anything is written.
    weights = Weights(base)
    config = model_folder.read_config(base)
    adapters = {name: context.inputs[name] / "adapter" for name in ("sft", "dpo")}
    updates = {name: read_adapter(folder, name.upper()) for name, folder in adapters.items()}
    for name, adapter in updates.items():
        check_fits(adapter, weights.shapes, bool(config.get("tie_word_embeddings")), name.upper())
        if changes_nothing(adapter):
            context.note(f"warning: the {name.upper()} adapter adds zero everywhere; did its training learn anything?")
    names = model_folder.tensors_to_keep(weights, config)
    parameters = sum(prod(weights.shapes[name]) for name in names)

    # Sum: base + adapters, written block by block.
    folder = context.output / "model"
    folder.mkdir()
    progress = _PhaseProgress(context)
    progress.begin("adding", len(names))
    began_s = time.monotonic()
    sum_ = Sum(weights, list(updates.values()), section.dtype)
    with one_thread():
        write_weights(
            folder,
            {name: weights.shapes[name] for name in names},
            section.dtype,
            section.max_shard_mb * _MB,
            lambda name: progress.after_last(sum_.blocks(name)),
        )
    model_folder.write(folder, base, config, parameters, context)
    context.metrics |= {
        "parameters": parameters,
        "dtype": section.dtype,
        "sum_s": time.monotonic() - began_s,
        "sum_peak_memory_bytes": _peak_memory_bytes(),
    }

    # Proof: the written folder against PEFT's own sum. Imported here because transformers and peft take seconds to
    # import, and a refusal above does not need them.
    from llamarefine_jobs.models import merge_proof

    began_s = time.monotonic()
    progress.begin("proof", merge_proof.STEPS)
    proof = merge_proof.prove(base, adapters["sft"], adapters["dpo"], folder, section.dtype, progress.advance)
    context.metrics |= {
        "proof": proof.figures(),
        "proof_s": time.monotonic() - began_s,
        "peak_memory_bytes": _peak_memory_bytes(),
    }
    context.note(
        f"proved: the logits differ by {proof.difference:.1e} from base + adapters (rounding to {section.dtype} "
        f"explains up to {proof.tolerance:.1e}), and by {proof.distance_from_base:.1e} from the base alone"
    )


class Sum:
    """Computes base + Σ scale · B A for one block of rows at a time, in buffers that are reused."""

    def __init__(self, base: Weights, adapters: list[Updates], dtype: str) -> None:
        import torch

        self.base, self.adapters, self.dtype = base, adapters, getattr(torch, dtype)
        self.largest = torch.finfo(self.dtype).max
        widest = max(prod(shape[1:]) for shape in base.shapes.values())
        self.sum = torch.empty(max(BLOCK_ELEMENTS, widest), dtype=torch.float32)
        self.rounded = torch.empty_like(self.sum, dtype=self.dtype)

    def blocks(self, name: str) -> Iterator[Any]:
        """Yield the bytes of the merged tensor `name`, block by block. Each block overwrites the one before.

        Raises DataError when the result holds NaN or infinity, or exceeds the range of the output type.
        """
        import torch

        a_nC, b_Rn = self._factors(name)
        for begin, block in self.base.blocks(name):
            sum_, rounded = (whole[: block.numel()].view(block.shape) for whole in (self.sum, self.rounded))
            sum_.copy_(block)
            if a_nC is not None:
                sum_.addmm_(b_Rn[begin : begin + len(block)], a_nC)
            self._check_range(sum_, name)
            rounded.copy_(sum_)
            yield rounded.view(torch.uint8).numpy()

    def _factors(self, name: str) -> tuple[Any, Any]:
        """Return A (n, C) and B (R, n) whose product B A is the sum of all adapters' updates of the tensor `name`.

        Both are None if no adapter updates the tensor.
        """
        import torch

        found = [adapter[name] for adapter in self.adapters if name in adapter]
        if not found:
            return None, None
        a_nC = torch.cat([update.a for update in found])
        return a_nC, torch.cat([update.scale * update.b for update in found], dim=1)

    def _check_range(self, block: Any, name: str) -> None:
        low, high = (float(end) for end in block.aminmax())
        if max(-low, high) <= self.largest:  # false for NaN too
            return
        if max(-low, high) < float("inf"):
            raise DataError(
                f"{name} would hold {max(-low, high):.3g}, but the largest {self.dtype} is {self.largest:.3g}; "
                "set merge.dtype to bfloat16 or float32"
            )
        raise DataError(f"{name} holds NaN or infinity after the adapters are added; check the base model's weights")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Limit torch to one thread.

    Several threads synchronise at every block: that is no faster, and many times slower when the cores are busy.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _PhaseProgress:
    """Reports the progress of one phase after another: tensors summed, then forward passes of the proof."""

    def __init__(self, context: Context) -> None:
        self.context = context

    def begin(self, phase: str, steps: int) -> None:
        self.phase, self.steps, self.done = phase, steps, 0
        self.began_s = self.reported_s = time.monotonic()

    def after_last(self, blocks: Iterator[Any]) -> Iterator[Any]:
        """Yield `blocks`, then count one step."""
        yield from blocks
        self.advance()

    def advance(self) -> None:
        """Count one step. Report it if the last report is a second old or the phase is finished."""
        self.done += 1
        now_s = time.monotonic()
        if self.done == self.steps or now_s - self.reported_s >= 1:
            self.reported_s = now_s
            eta_s = (now_s - self.began_s) / self.done * (self.steps - self.done)
            self.context.progress(self.done, self.steps, phase=self.phase, eta_s=eta_s)


def _peak_memory_bytes() -> int:
    """Return the peak resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    entry.main("merge", work)
