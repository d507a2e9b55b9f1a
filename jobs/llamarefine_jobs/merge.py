"""Base + SFT adapter + DPO adapter as one model: added in fp32 in one pass, rounded once, proved.

    python -m llamarefine_jobs.merge --recipe recipe.yaml --store s3://bucket/prefix

Reads prepare's base/ and the adapters of sft and dpo, writes model/: a folder that plain
`AutoModelForCausalLM.from_pretrained`, vLLM and llama.cpp's converter load. The tensors pass by in blocks, so the sum
needs no more memory for a larger model than its largest tensor; the proof (merge_proof.py) loads the model in fp32.
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
from llamarefine_jobs.models.lineage import check_lineage
from llamarefine_jobs.models.lora import Updates, changes_nothing, check_fits, read_adapter
from llamarefine_jobs.models.weights import BLOCK_ELEMENTS, Weights, write_weights

_MB = 10**6


def work(context: Context) -> None:
    """Merge the adapters into the base and prove the result."""
    section, base = context.recipe.merge, context.inputs["prepare"] / "base"
    context.backend, context.accelerator = "streamed sum", "cpu"
    check_lineage(context, "sft", "prepare")
    check_lineage(context, "dpo", "prepare", "sft")

    # Inputs: everything that could keep them from adding up is looked for before anything is written.
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

    # The sum, into files.
    folder = context.output / "model"
    folder.mkdir()
    ticker = _Ticker(context, len(names))
    began_s = time.monotonic()
    sum_ = Sum(weights, list(updates.values()), section.dtype)
    with one_thread():
        write_weights(
            folder,
            {name: weights.shapes[name] for name in names},
            section.dtype,
            section.max_shard_mb * _MB,
            lambda name: ticker.counted(sum_.blocks(name)),
        )
    model_folder.write(folder, base, config, parameters, context)
    context.metrics |= {
        "parameters": parameters,
        "dtype": section.dtype,
        "sum_s": time.monotonic() - began_s,
        "sum_peak_memory_bytes": _peak_memory_bytes(),
    }

    # The proof. Imported here: what it stands on takes seconds to import, and a refusal above needs none of it.
    from llamarefine_jobs.models import merge_proof

    began_s = time.monotonic()
    ticker.begin("proof", merge_proof.STEPS)
    proof = merge_proof.prove(base, adapters["sft"], adapters["dpo"], folder, section.dtype, ticker.tick)
    context.metrics |= {
        "proof": proof.figures(),
        "proof_s": time.monotonic() - began_s,
        "peak_memory_bytes": _peak_memory_bytes(),
    }
    context.note(
        f"proved: logits {proof.difference:.1e} from base + adapters (rounding to {section.dtype} explains "
        f"{proof.tolerance:.1e}), {proof.distance_from_base:.1e} from the base"
    )


class Sum:
    """base + Σ scale · B A, a block of rows at a time, in buffers that are used again."""

    def __init__(self, base: Weights, adapters: list[Updates], dtype: str) -> None:
        import torch

        self.base, self.adapters, self.dtype = base, adapters, getattr(torch, dtype)
        self.largest = torch.finfo(self.dtype).max
        widest = max(prod(shape[1:]) for shape in base.shapes.values())
        self.sum = torch.empty(max(BLOCK_ELEMENTS, widest), dtype=torch.float32)
        self.rounded = torch.empty_like(self.sum, dtype=self.dtype)

    def blocks(self, name: str) -> Iterator[Any]:
        """The bytes of one tensor of the result. A block is overwritten when the next one is asked for."""
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
        """All updates of a tensor as one: their A below each other, their scaled B side by side."""
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
                f"{name} would hold {max(-low, high):.3g}, and {self.dtype} ends at {self.largest:.3g}; "
                "set merge.dtype to bfloat16 or float32"
            )
        raise DataError(f"{name} holds NaN or infinity once the adapters are added; is the base sound?")


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Hold torch to one thread: meeting at every block, more are no faster, and on busy cores many times slower."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Ticker:
    """Progress between two tensors and between two passes of the proof."""

    def __init__(self, context: Context, steps: int) -> None:
        self.context = context
        self.begin("adding", steps)

    def begin(self, phase: str, steps: int) -> None:
        self.phase, self.steps, self.done = phase, steps, 0
        self.began_s = self.told_s = time.monotonic()

    def counted(self, blocks: Iterator[Any]) -> Iterator[Any]:
        yield from blocks
        self.tick()

    def tick(self) -> None:
        self.done += 1
        now_s = time.monotonic()
        if self.done == self.steps or now_s - self.told_s >= 1:
            self.told_s = now_s
            eta_s = (now_s - self.began_s) / self.done * (self.steps - self.done)
            self.context.progress(self.done, self.steps, phase=self.phase, eta_s=eta_s)


def _peak_memory_bytes() -> int:
    """The most memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    entry.main("merge", work)
