"""The gradient of one optimizer step: the step's examples are split into passes that fit the memory.

On CUDA a pass is fast only if Python launches few kernels: decoder layers are compiled, and forward and backward of
each size of a packed sequence are captured as one CUDA graph. Each of the two is tried once, before the first step. If
it fails, or its gradient is not that of the plain pass, the training goes on without it and says so in one line.
"""

import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from llamarefine_jobs.contract.errors import LlamaRefineError, first_line
from llamarefine_jobs.models.backends import free_memory
from llamarefine_jobs.models.encoding import Encoded
from llamarefine_jobs.models.forward import Forward, PackedForward, device_of
from llamarefine_jobs.models.packing import Packed, Size, choose_sizes, round_up
from llamarefine_jobs.process.out_of_memory import is_out_of_memory
from llamarefine_jobs.training.adapter_weights import AdapterWeights
from llamarefine_jobs.training.objectives import Example, Objective

_MOST_SIZES = 4  # of packed sequences; each takes about a second to capture, and memory for its graph
_MOST_COMPILATIONS = 64  # per function; torch's own limit of 8 would silently run the rest without compilation
# Relative distance between two gradients of the same pass in 16 bits, computed by different kernels.
_SAME_GRADIENT = 5e-2

Way = tuple[Callable[[], None], Callable[[], None]]  # begins to compute passes in another way; undoes it


class StepGradient:
    """Computes the gradient of a step into `weights.gradient`, and returns the step's loss.

    most_tokens: of a pass, padding included; halved if memory runs out. most_examples: of a pass, None for no limit.
    """

    def __init__(
        self,
        forward: Forward,
        objective: Objective,
        weights: AdapterWeights,
        note: Callable[[str], None],
        *,
        most_tokens: int | None,
        most_examples: int | None = None,
    ) -> None:
        self.forward = forward
        self.objective = objective
        self.weights = weights
        self.most_tokens = most_tokens
        self.most_examples = most_examples
        self._note = note
        self._captured: dict[Size, _CapturedPass] = {}
        self._sizes: list[Size] = []  # ascending; empty while passes are not captured
        self._compiled: list[Any] = []  # decoder layers
        self._hook: Any = None

    def __call__(self, examples: Sequence[Example], weight: int) -> Any:
        """Add the gradient of `examples` to the flat gradient, which is 0 before; return their part of the loss.

        The loss is a tensor on the device; reading it would wait for the device. `weight` is the weight of the whole
        step, over all processes.
        """

        def loss_of_passes() -> Any:
            return torch.stack([self._run(part, weight) for part in self._split(examples)]).sum()

        return self._halving_passes(loss_of_passes, examples)

    def prepare(self, steps: Iterable[Sequence[Example]], longest_row: int, *, has_dropout: bool) -> None:
        """Try compiled layers, then CUDA graphs, on the first of `steps`; keep what works. Does nothing on a CPU.

        `steps` are the examples of this process in some steps of the training, from which the sizes of the packed
        sequences are chosen; `longest_row` is the most tokens of a row in all steps. With dropout, two passes draw
        different numbers, so their gradients are not compared.
        """
        if not isinstance(self.forward, PackedForward) or device_of(self.forward.model).type != "cuda":
            return
        sampled = list(steps)
        ways = {
            "compiled layers": (self.compile_layers, self.uncompile_layers),
            "CUDA graphs": (lambda: self._capture_passes(sampled, longest_row), self._release_captured),
        }
        self.keep_what_works(ways, sampled[0], has_dropout=has_dropout)

    def keep_what_works(self, ways: Mapping[str, Way], examples: Sequence[Example], *, has_dropout: bool) -> None:
        """Switch on each faster way; switch it off again, and log why, if it fails or changes the gradient."""
        weight = self.objective.weight(examples)
        plain = self._gradient_of(examples, weight)
        for name, (begin, undo) in ways.items():
            try:
                begin()
                found = self._gradient_of(examples, weight)
                distance = float((found - plain).norm() / plain.norm().clamp_min(1e-30))
                is_same = bool(found.isfinite().all()) if has_dropout else distance <= _SAME_GRADIENT
                reason = "" if is_same else f"their gradient is {distance:.1%} off"
            except Exception as error:
                if isinstance(error, LlamaRefineError):
                    raise
                traceback.clear_frames(error.__traceback__)
                reason = f"{type(error).__name__}: {first_line(error)}"
            if reason:
                undo()
                self._note(f"trains without {name}, which is slower: {reason}")
            self.weights.clear_gradient()
        free_memory()

    def _gradient_of(self, examples: Sequence[Example], weight: int) -> Any:
        self.weights.clear_gradient()
        self(examples, weight)
        return self.weights.gradient.clone()

    def _split(self, examples: Sequence[Example]) -> Iterator[list[Example]]:
        """Yield the passes, each with the examples in their order in the step."""
        lengths = [[len(row) for row in example.rows] for example in examples]
        for indices in self.forward.passes(lengths, self.most_tokens, self.most_examples):
            yield [examples[index] for index in sorted(indices)]

    def _run(self, examples: Sequence[Example], weight: int) -> Any:
        """Add the gradient of one pass; return its part of the loss."""
        rows = [row for example in examples for row in example.rows]
        reference = [nats for example in examples for nats in example.reference]
        if captured := self._captured_for(rows):
            return captured.replay(rows, reference, weight)
        batch = self.forward.batch(rows)
        reference_R = torch.zeros(batch.rows, dtype=torch.float64, device=batch.targets.device)
        reference_R[: len(reference)] = torch.tensor(reference, dtype=torch.float64)
        return self.backward(batch, reference_R, weight)

    def backward(self, batch: Any, reference_R: Any, weight: Any) -> Any:
        """Add the gradient of one batch; return its part of the loss."""
        with self.forward.attention():
            loss = self.objective.loss(self.forward.nats(batch), batch, reference_R, weight)
            loss.backward()
        return loss.detach()

    def _captured_for(self, rows: Sequence[Encoded]) -> "_CapturedPass | None":
        """Return the captured pass that holds `rows`, captured now if it is new; None if passes are not captured."""
        if not self._sizes:
            return None
        size = self._size_for(sum(map(len, rows)))
        if size not in self._captured:
            try:
                self._capture([size], rows[:1])
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                self._note(f"goes on without CUDA graphs, which is slower: {type(error).__name__}: {first_line(error)}")
                self._release_captured()
                return None
        return self._captured[size]

    def _choose_sizes(self, steps: Sequence[Sequence[Example]], longest_row: int) -> list[Size]:
        """Return the sizes for which graphs are captured. All hold as many rows as the largest step has."""
        pass_tokens = [sum(map(len, part)) for examples in steps for part in self._split(examples)]
        rows = max(len(examples) for examples in steps) * self.objective.rows_per_example
        return [Size(tokens, rows, round_up(longest_row)) for tokens in choose_sizes(pass_tokens, _MOST_SIZES)]

    def _size_for(self, tokens: int) -> Size:
        """Return the smallest size that holds `tokens`; if none does, a new one with room for a tenth more."""
        if self._sizes[-1].tokens < tokens:
            self._sizes.append(replace(self._sizes[-1], tokens=round_up(tokens + tokens // 10)))
        return next(size for size in self._sizes if size.tokens >= tokens)

    def _halving_passes(self, compute: Callable[[], Any], examples: Sequence[Example]) -> Any:
        """Return the result of `compute`, called again with half the tokens in a pass whenever memory runs out."""
        while True:
            try:
                return compute()
            except Exception as error:
                if not is_out_of_memory(error) or not self._halve(examples):
                    raise
                traceback.clear_frames(error.__traceback__)  # the frames hold the pass's tensors
            self._captured.clear()
            free_memory()
            self.weights.clear_gradient()

    def _halve(self, examples: Sequence[Example]) -> bool:
        """Halve the tokens of a pass if the step has passes that can be split; return whether it did."""
        longest = max(map(len, examples))
        if self.most_tokens is None or self.most_examples is not None or self.most_tokens <= longest:
            return False
        tokens = min(self.most_tokens, sum(map(len, examples)))
        self.most_tokens = max(longest, tokens // 2)
        if self._sizes:
            largest = replace(self._sizes[-1], tokens=round_up(self.most_tokens))
            self._sizes = [size for size in self._sizes if size.tokens < largest.tokens] + [largest]
        self._note(
            f"memory ran out in a pass of up to {tokens} tokens: goes on with {self.most_tokens}; "
            f"a step keeps its {len(examples)} rows"
        )
        return True

    def compile_layers(self, backend: str = "inductor") -> None:
        """Compile the decoder layers, once for all sizes."""
        import torch._dynamo

        _use_private_cache()
        torch._dynamo.config.recompile_limit = _MOST_COMPILATIONS
        causal_model = self.forward.causal_model
        # The first layer's input would be the only one without a gradient, and would take a compilation of its own.
        self._hook = causal_model.get_input_embeddings().register_forward_hook(_require_gradient)
        for layer in causal_model.get_decoder().layers:
            layer.compile(dynamic=True, backend=backend)
            self._compiled.append(layer)

    def uncompile_layers(self) -> None:
        """Undo `compile_layers`, also if it failed."""
        if self._hook is not None:
            self._hook.remove()
        for layer in self._compiled:
            layer._compiled_call_impl = None
        self._compiled.clear()

    def _capture_passes(self, steps: Sequence[Sequence[Example]], longest_row: int) -> None:
        """Choose sizes for `steps` and capture them; halve the tokens of a pass as long as memory runs out."""

        def capture() -> None:
            self._release_captured()
            self._capture(self._choose_sizes(steps, longest_row), steps[0][0].rows)

        self._halving_passes(capture, steps[0])

    def _capture(self, sizes: Sequence[Size], rows: Sequence[Encoded]) -> None:
        """Capture a pass of each size; from now on, every pass runs in a captured size.

        The largest is captured first, because the others then fit into its memory: all graphs use the same, as they
        run one after the other and nothing of a pass is read after the next.
        """
        self._sizes = sorted({*self._sizes, *sizes}, key=lambda size: size.tokens)
        pool = next((one.pool for one in self._captured.values()), None)
        for size in sorted(sizes, key=lambda size: -size.tokens):
            self._captured[size] = _CapturedPass(self, size, rows, pool)
            pool = self._captured[size].pool

    def _release_captured(self) -> None:
        self._sizes = []
        self._captured.clear()


class _CapturedPass:
    """Forward and backward of one packed size as a CUDA graph, with the tensors that it reads."""

    def __init__(self, step: StepGradient, size: Size, rows: Sequence[Encoded], pool: Any) -> None:
        device = device_of(step.forward.model)
        self._batch = Packed(size, device)
        # The reference's log-probabilities, and the weight.
        self._numbers = torch.zeros(size.rows + 1, dtype=torch.float64, device=device)
        self._fill(rows, (), 1)
        before = step.weights.gradient.clone()
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # allocates, compiles and chooses kernels, none of which can be captured
                    self._compute(step)
            torch.cuda.current_stream().wait_stream(stream)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=pool):
                self._loss = self._compute(step)
        finally:
            step.weights.gradient.copy_(before)
        self.pool = self._graph.pool()

    def replay(self, rows: Sequence[Encoded], reference: Sequence[float], weight: int) -> Any:
        """Add the gradient of `rows`; return their part of the loss."""
        self._fill(rows, reference, weight)
        self._graph.replay()
        return self._loss.clone()  # the next replay overwrites it

    def _compute(self, step: StepGradient) -> Any:
        return step.backward(self._batch, self._numbers[:-1], self._numbers[-1])

    def _fill(self, rows: Sequence[Encoded], reference: Sequence[float], weight: int) -> None:
        self._batch.fill(rows)
        numbers = torch.zeros(len(self._numbers), dtype=torch.float64)
        numbers[: len(reference)] = torch.tensor(reference, dtype=torch.float64)
        numbers[-1] = weight
        self._numbers.copy_(numbers.pin_memory(), non_blocking=True)


def _use_private_cache() -> None:
    """Let compiled code be cached in the user's own folder, if the environment names no other.

    torch's default is a folder in the system's temporary directory with a name that anyone can know and create, and
    what is cached there is run.
    """
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llamarefine" / "inductor"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)


def _require_gradient(_module: Any, _inputs: Any, output: Any) -> Any:
    return output.requires_grad_()
