"""The packed step on a card: does it train at all, and are its fast ways equal to the plain ones. Prints figures.

The most valuable tests come first. On a CPU only those run that need no CUDA graph.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from llamarefine_jobs.models import backends
from llamarefine_jobs.models.forward import PackedForward, PaddedForward, causal_model_of
from llamarefine_jobs.models.packing import Size, exact_size, round_up
from llamarefine_jobs.training import gradient
from llamarefine_jobs.training.adapter_weights import AdapterWeights
from llamarefine_jobs.training.gradient import StepGradient
from tests.gpu import trainers
from tests.gpu.shapes import BACKEND
from tests.jobs import tiny

pytestmark = pytest.mark.skipif(BACKEND != "packed", reason="these tests are about the packed step")
Figure = Callable[[str], None]
_TIMED = 10  # passes


@dataclass
class Loaded:
    """A model with an adapter that is not 0, its flat weights, and three steps of 16, 8 and 4 examples."""

    trainer: Any
    steps: list[list[Any]]

    @property
    def forward(self) -> PackedForward:
        forward: PackedForward = self.trainer.forward
        return forward

    @property
    def weights(self) -> AdapterWeights:
        weights: AdapterWeights = self.trainer.weights
        return weights

    def step(self, note: Callable[[str], None] = pytest.fail, forward: Any = None, tokens: int | None = None) -> Any:
        return StepGradient(forward or self.forward, self.trainer.objective, self.weights, note, most_tokens=tokens)

    def weight(self, examples: Sequence[Any]) -> int:
        return int(self.trainer.objective.weight(examples))

    def gradient(self, step: Any, examples: Sequence[Any]) -> Any:
        """Return the gradient of a step's examples, as one tensor."""
        self.weights.clear_gradient()
        step(examples, self.weight(examples))
        return self.weights.gradient.clone()

    def gradient_at(self, size: Size, examples: Sequence[Any], garbage: int | None = None) -> Any:
        """Return the plain gradient of one pass of `size`; `garbage` seeds random tokens in the padding."""
        self.weights.clear_gradient()
        rows = [example.rows[0] for example in examples]
        batch = self.forward.batch(rows, size)
        if garbage is not None:
            used, device = sum(map(len, rows)), batch.ids.device
            torch.manual_seed(garbage)
            batch.ids[used:] = torch.randint(0, 300, (size.tokens - used,)).to(device)
        self.step().backward(batch, None, self.weight(examples))
        return self.weights.gradient.clone()


@pytest.fixture(scope="module")
def loaded(prepared: Any, shape: Any, cuda: bool, backend: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    recipe = tiny.recipe(*shape.settings, "sft.backend=packed", "sft.batch_rows=16", "sft.micro_batch_rows=null")
    context = trainers.make_context("sft", recipe, prepared, tmp_path_factory.mktemp("packed"))
    model, tokenizer = trainers.load(backend, context, prepared / "base")
    torch.manual_seed(7)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.01)
    forward = trainers.plain_forward(backend, model, tokenizer)  # unchecked: these tests are the check
    trainer = trainers.make_trainer(context, forward, tokenizer, trainers.make_examples(context, forward, tokenizer))
    model.train()
    steps = [trainer.own_examples(1), trainer.own_examples(2)[:8], trainer.own_examples(3)[:4]]
    yield Loaded(trainer, steps)
    del trainer, model
    backends.free_memory()


def test_the_step_as_shipped_trains_and_needs_no_slower_way(loaded: Loaded, cuda: bool, figure: Figure) -> None:
    notes: list[str] = []
    step = loaded.step(notes.append)
    examples = loaded.steps[0]
    plain_ms = milliseconds(lambda: step(examples, loaded.weight(examples)))
    figure(f"plain packed pass of {sum(map(len, examples))} tokens: {plain_ms}")
    began_s = time.monotonic()
    try:
        step.prepare(loaded.steps, max(map(len, examples)), has_dropout=False)
        figure(f"prepared in {time.monotonic() - began_s:.1f} s (compiled and captured); slower ways: {notes}")
        fast_ms = milliseconds(lambda: step(examples, loaded.weight(examples)))
        figure(f"the same as shipped: {fast_ms}")
        kept = loaded.weights.values.clone()
        loaded.weights.clear_gradient()
        losses = []
        for _ in range(5):
            losses.append(float(step(examples, loaded.weight(examples))))
            loaded.weights.update(1e-3)
        loaded.weights.values.copy_(kept)
        figure(f"losses of five steps on the same rows: {[round(loss, 4) for loss in losses]}")
    finally:
        step.uncompile_layers()
    assert losses[-1] < losses[0]
    assert notes == []


def test_the_packed_gradient_equals_that_of_padded_rows(loaded: Loaded, cuda: bool, figure: Figure) -> None:
    packed = loaded.gradient(loaded.step(), loaded.steps[0])
    again = loaded.gradient(loaded.step(), loaded.steps[0])
    padded = PaddedForward(loaded.trainer.model, pad_id=2)
    found = loaded.gradient(loaded.step(forward=padded), loaded.steps[0])
    figure(f"packed against padded: {apart(packed, found)}; packed against packed: {apart(packed, again)}")
    assert distance(packed, found) < (5e-2 if cuda else 1e-5)


def test_empty_rows_and_garbage_in_the_padding_change_nothing(loaded: Loaded, cuda: bool, figure: Figure) -> None:
    examples = loaded.steps[1]
    exact = exact_size([example.rows[0] for example in examples])
    roomy = Size(round_up(2 * exact.tokens + 1), exact.rows + 9, round_up(exact.longest))
    plain = loaded.gradient_at(exact, examples)
    zeros, some, other = (loaded.gradient_at(roomy, examples, garbage) for garbage in (None, 1, 2))
    figure(
        f"{roomy.tokens} positions against {exact.tokens}: {apart(plain, zeros)}; other garbage: {apart(some, other)}"
    )
    assert bool(zeros.isfinite().all())
    assert distance(plain, zeros) < (5e-2 if cuda else 1e-5)
    assert distance(some, other) < (1e-2 if cuda else 1e-6)


def test_a_captured_graph_gives_the_gradient_of_the_plain_pass(loaded: Loaded, cuda: bool, figure: Figure) -> None:
    """Bit for bit, unless two plain passes differ as well: flash attention's backward kernel adds by atomics."""
    if not cuda:
        pytest.skip("CUDA graphs need a CUDA device")
    examples = loaded.steps[0]
    rows = [example.rows[0] for example in examples]
    size = Size(round_up(sum(map(len, rows)) + 1), len(rows) + 2, round_up(max(map(len, rows))))
    plain, again = loaded.gradient_at(size, examples), loaded.gradient_at(size, examples)
    loaded.weights.clear_gradient()
    began_s = time.monotonic()
    captured = gradient._CapturedPass(loaded.step(), size, rows, None)
    torch.cuda.synchronize()
    captured_s = time.monotonic() - began_s
    assert not loaded.weights.gradient.any(), "the capture left a gradient behind"
    captured.replay(rows, [], loaded.weight(examples))
    graphed = loaded.weights.gradient.clone()
    figure(
        f"captured in {captured_s:.1f} s; against no graph: {apart(plain, graphed)}; none twice: {apart(plain, again)}"
    )
    figure(f"graph: {milliseconds(lambda: captured.replay(rows, [], loaded.weight(examples)))}")
    assert distance(plain, graphed) <= 2 * distance(plain, again) + 1e-6
    few = loaded.steps[2]
    loaded.weights.clear_gradient()
    captured.replay([example.rows[0] for example in few], [], loaded.weight(few))
    fewer = loaded.weights.gradient.clone()
    assert distance(loaded.gradient(loaded.step(), few), fewer) < 5e-2, "the same graph with fewer rows"


@pytest.mark.parametrize("dynamic", [True, False], ids=["dynamic", "static"])
def test_compiled_layers_give_the_same_gradient(dynamic: bool, loaded: Loaded, cuda: bool, figure: Figure) -> None:
    """`dynamic=True` is what ships. Three sizes must cost one compilation with it."""
    from torch._dynamo.utils import counters

    plain = [loaded.gradient(loaded.step(), examples) for examples in loaded.steps]
    counters.clear()
    with compiled_layers(loaded, dynamic=dynamic):
        for examples, expected in zip(loaded.steps, plain, strict=True):
            began_s, tokens = time.monotonic(), sum(map(len, examples))
            found = loaded.gradient(loaded.step(), examples)
            seconds = time.monotonic() - began_s
            figure(
                f"dynamic={dynamic}, {tokens} tokens: first {seconds:.1f} s; against plain: {apart(expected, found)}"
            )
            assert distance(expected, found) < (5e-2 if cuda else 1e-4)
        graphs = counters["stats"]["unique_graphs"]
        step, examples = loaded.step(), loaded.steps[0]
        rows, weight = [example.rows[0] for example in examples], loaded.weight(examples)
        figure(f"dynamic={dynamic}: {graphs} compilations; {milliseconds(lambda: step(examples, weight))}")
        if cuda:
            size = Size(round_up(sum(map(len, rows))), len(rows), round_up(max(map(len, rows))))
            captured = gradient._CapturedPass(step, size, rows, None)
            figure(f"dynamic={dynamic}, graph too: {milliseconds(lambda: captured.replay(rows, [], weight))}")
            loaded.weights.clear_gradient()
            captured.replay(rows, [], weight)
            assert distance(plain[0], loaded.weights.gradient) < 5e-2
    assert not (cuda and dynamic) or graphs == 1


def test_memory_that_runs_out_halves_the_pass_and_says_so(loaded: Loaded, cuda: bool, figure: Figure) -> None:
    if not cuda:
        pytest.skip("a limit on a GPU's memory needs a CUDA device")
    examples = [*loaded.steps[0], *loaded.steps[1], *loaded.steps[2]] * 4
    free = loaded.step()
    expected = loaded.gradient(free, examples)
    notes: list[str] = []
    step = loaded.step(notes.append, tokens=sum(map(len, examples)))
    backends.free_memory()
    torch.cuda.reset_peak_memory_stats()
    kept = torch.cuda.memory_allocated()
    loaded.gradient(free, examples)
    needed = torch.cuda.max_memory_allocated() - kept
    backends.free_memory()
    reserved = torch.cuda.memory_reserved()
    limit = (reserved + 0.7 * needed) / torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(limit, 0)
    try:
        found = loaded.gradient(step, examples)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)
        backends.free_memory()
    figure(f"{needed / 2**20:.0f} MiB needed, {0.7 * needed / 2**20:.0f} allowed: {notes}; {apart(expected, found)}")
    assert notes
    assert all(note.startswith("memory ran out in a pass of up to") for note in notes)
    assert distance(expected, found) < 5e-2


def test_batches_of_changing_lengths_plan_nothing_anew(loaded: Loaded, cuda: bool, figure: Figure) -> None:
    """cuDNN's attention would: it took 3 ms a call on the CPU for each new shape."""
    padded = PaddedForward(loaded.trainer.model, pad_id=2)
    batches = [padded.batch([example.rows[0] for example in loaded.steps[0][place:]]) for place in range(12)]
    seconds = []
    with torch.no_grad():
        padded.nats(batches[-1])
        for _ in range(2):
            synchronize()
            began_s = time.monotonic()
            for batch in batches:
                padded.nats(batch)
            synchronize()
            seconds.append(time.monotonic() - began_s)
        figure(f"12 padded batches of new lengths: {seconds[0]:.2f} s, the same again: {seconds[1]:.2f} s")
        if cuda:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
                padded.nats(batches[3])
            calls = {event.key for event in profiler.key_averages() if "attention" in event.key}
            figure(f"attention: {sorted(calls)}")
            assert calls
            assert not any("cudnn" in call for call in calls)


@contextlib.contextmanager
def compiled_layers(loaded: Loaded, *, dynamic: bool) -> Iterator[None]:
    """Compile the decoder layers within the block, as StepGradient does, but with static shapes if not `dynamic`."""
    import torch._dynamo

    causal_model = causal_model_of(loaded.trainer.model)
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64
    hook = causal_model.get_input_embeddings().register_forward_hook(gradient._require_gradient)
    layers = list(causal_model.get_decoder().layers)
    for layer in layers:
        # On a CPU without the compiler itself, which takes minutes there.
        layer.compile(dynamic=dynamic, backend="inductor" if torch.cuda.is_available() else "aot_eager")
    try:
        yield
    finally:
        hook.remove()
        for layer in layers:
            layer._compiled_call_impl = None


def distance(one: Any, other: Any) -> float:
    """Return the norm of the difference relative to the norm of `one`; more than any limit if anything is NaN."""
    assert float(one.norm()) > 0
    found = float((one - other).norm() / one.norm())
    return found if found == found else 1e9


def apart(one: Any, other: Any) -> str:
    return "bit for bit" if torch.equal(one, other) else f"{distance(one, other):.1e} of its norm"


def milliseconds(call: Callable[[], Any]) -> str:
    """Run `call` some times; return the median and the range of its durations."""
    call()
    durations_ms = []
    for _ in range(_TIMED):
        synchronize()
        began_s = time.monotonic()
        call()
        synchronize()
        durations_ms.append(1000 * (time.monotonic() - began_s))
    return f"{statistics.median(durations_ms):.1f} ms ({min(durations_ms):.1f} to {max(durations_ms):.1f})"


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
