"""The gradient of a step: compiled, recomputed, with dropout, in two processes, and when memory runs out."""

import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from llamarefine_jobs.contract.errors import RecipeError
from llamarefine_jobs.models.packing import Size
from llamarefine_jobs.training.objectives import Example, SftObjective
from tests.jobs import packed, tiny

TOLERANCE = 1e-5  # relative to the largest number of a tensor; passes add their gradients in another order


class Step:
    """A model with its StepGradient, and the lines that it notes."""

    def __init__(self, model: Any, make_forward: Callable[[Any], Any] | None = None, **limits: Any) -> None:
        from llamarefine_jobs.models.forward import PackedForward
        from llamarefine_jobs.training.adapter_weights import AdapterWeights
        from llamarefine_jobs.training.gradient import StepGradient

        self.model = model
        self.notes: list[str] = []
        self.weights = AdapterWeights(model, weight_decay=0.0, most_gradient_norm=1.0)
        self.forward = (make_forward or PackedForward)(model)
        self.gradient = StepGradient(
            self.forward, SftObjective(), self.weights, self.notes.append, **({"most_tokens": None} | limits)
        )

    def __call__(self, examples: Sequence[Example], weight: int | None = None) -> tuple[float, dict[str, Any]]:
        """Return the loss and the gradients of a step, and clear them."""
        loss = float(self.gradient(examples, weight or SftObjective().weight(examples)))
        found = packed.gradients(self.model)
        self.weights.clear_gradient()
        return loss, found


def assert_same(found: tuple[float, dict[str, Any]], expected: tuple[float, dict[str, Any]]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert packed.worst_difference(found[1], expected[1]) < TOLERANCE


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    return packed.sft_examples(packed.rows())


@pytest.fixture(scope="module")
def plain(examples: list[Example]) -> tuple[float, dict[str, Any]]:
    """Return loss and gradients of the step in one pass."""
    return Step(packed.make_policy())(examples)


# Gradient checkpointing.


def padded(model: Any) -> Any:
    from llamarefine_jobs.models.forward import PaddedForward

    return PaddedForward(model, packed.PAD)


def count_layer_calls(model: Any) -> list[int]:
    calls = [0]
    for layer in model.get_base_model().model.layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    return calls


def make_checkpointed(dropout: float = 0.0) -> Any:
    """Return the model of packed.make_policy with gradient checkpointing, by the backend that trains it."""
    from llamarefine_jobs.contract.recipe import Lora
    from llamarefine_jobs.models.backends import TransformersBackend

    expected = packed.make_policy(dropout=dropout)
    lora = Lora(rank=4, alpha=8, dropout=dropout)
    base = tiny.make_model(packed.TOKENS, initializer_range=0.1).requires_grad_(False)
    model = TransformersBackend("packed", "a test").add_adapter(base, lora, seed=0, gradient_checkpointing=True)
    model.load_state_dict(expected.state_dict())
    return model.train()


@pytest.mark.parametrize("make_forward", [None, padded], ids=["packed", "padded"])
def test_gradient_checkpointing_computes_each_layer_twice_and_gives_the_same_gradient(
    make_forward: Any, examples: list[Example], plain: Any
) -> None:
    from llamarefine_jobs.models.scoring import score

    step = Step(make_checkpointed(), make_forward, most_tokens=400)
    passes = len(list(step.gradient._split(examples)))
    assert passes > 1
    calls = count_layer_calls(step.model)
    assert_same(step(examples), plain)
    assert calls == [4 * passes], "two layers, each computed twice"
    attention = step.forward.causal_model.config._attn_implementation
    assert attention == packed.make_policy().config._attn_implementation, "the packed attention was left on"
    calls[0] = 0
    score(step.forward, packed.rows()[:3])
    assert calls == [2], "a score computes no layer again"


def test_dropout_draws_the_same_numbers_when_layers_are_computed_again(examples: list[Example]) -> None:
    found = []
    for model in (packed.make_policy(dropout=0.3), make_checkpointed(dropout=0.3)):
        torch.manual_seed(7)
        found.append(Step(model)(examples))
    assert_same(found[1], found[0])


# Dropout.


def test_a_step_draws_the_same_dropout_wherever_a_training_resumes(tmp_path: Path, examples: list[Example]) -> None:
    from llamarefine_jobs.models.forward import PackedForward
    from llamarefine_jobs.training.loop import Trainer

    context = packed.make_context(tmp_path, "sft", "sft.lora.dropout=0.3")

    def loss_of(step: int) -> tuple[float, Any]:
        model = packed.make_policy(dropout=0.3)
        trainer = Trainer(
            context, context.recipe.sft, PackedForward(model), examples, SftObjective(), lambda forward: {}
        )
        for earlier in [] if step == 2 else [1]:
            trainer.step_loss(earlier)
            trainer.weights.clear_gradient()
        return float(trainer.step_loss(2)), trainer.weights.gradient.clone()

    torch.manual_seed(1)
    resumed = loss_of(2)
    torch.manual_seed(2)
    uninterrupted = loss_of(1)
    assert resumed[0] == uninterrupted[0]
    assert torch.equal(resumed[1], uninterrupted[1])


def test_dropout_differs_from_step_to_step(examples: list[Example]) -> None:
    step = Step(packed.make_policy(dropout=0.3))
    assert step(examples)[0] != step(examples)[0]


# Memory that runs out.


def with_little_memory(most_tokens: int) -> Callable[[Any], Any]:
    """Return a maker of forwards that run out of memory in passes of more tokens."""
    from llamarefine_jobs.models.forward import PackedForward

    class SmallForward(PackedForward):
        def nats(self, batch: Any) -> Any:
            nats_T = super().nats(batch)
            if batch.size.tokens > most_tokens:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return nats_T

    return SmallForward


def test_a_pass_that_runs_out_of_memory_is_halved_with_one_line_each_time(examples: list[Example], plain: Any) -> None:
    step = Step(packed.make_policy(), with_little_memory(400), most_tokens=4096)
    assert_same(step(examples), plain)
    assert step.notes == [
        "memory ran out in a pass of up to 727 tokens: goes on with 363; a step keeps its 12 rows",
    ]
    assert_same(step(examples), plain)
    assert len(step.notes) == 1, "the next step starts with the smaller passes"


def test_memory_that_runs_out_in_a_later_pass_leaves_nothing_of_the_earlier_ones(
    examples: list[Example], plain: Any
) -> None:
    step = Step(packed.make_policy(), most_tokens=400)
    run, calls = step.gradient._run, []

    def run_out_once(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(*arguments)

    step.gradient._run = run_out_once  # type: ignore[method-assign]
    assert_same(step(examples), plain)
    assert len(step.notes) == 1


def test_a_single_row_that_does_not_fit_raises(examples: list[Example]) -> None:
    step = Step(packed.make_policy(), with_little_memory(250), most_tokens=4096)
    with pytest.raises(torch.OutOfMemoryError):
        step(examples)
    assert step.notes[-1].startswith("memory ran out in a pass of up to 363 tokens: goes on with 300")


def test_passes_of_a_fixed_number_of_rows_are_not_halved(examples: list[Example]) -> None:
    step = Step(packed.make_policy(), with_little_memory(250), most_examples=4)
    with pytest.raises(torch.OutOfMemoryError):
        step(examples)
    assert step.notes == []


def test_other_errors_are_not_taken_for_a_lack_of_memory(examples: list[Example]) -> None:
    step = Step(packed.make_policy(), most_tokens=400)
    step.gradient._run = lambda *_: 1 / 0  # type: ignore[method-assign]
    with pytest.raises(ZeroDivisionError):
        step(examples)


def test_a_row_longer_than_a_pass_gets_a_pass_of_its_own(examples: list[Example], plain: Any) -> None:
    step = Step(packed.make_policy(), most_tokens=100)
    passes = list(step.gradient._split(examples))
    assert [len(part) for part in passes if sum(map(len, part)) > 100] == [1, 1]
    assert_same(step(examples), plain)


def test_rows_of_one_answer_token_count_that_token_only() -> None:
    rows = [packed.row(tokens, answer=1) for tokens in (2, 40, 7)]
    examples = packed.sft_examples(rows)
    assert SftObjective().weight(examples) == 3
    together = Step(packed.make_policy())(examples)
    apart = Step(packed.make_policy(), most_examples=1)(examples)
    assert_same(apart, together)
    assert all(gradient.any() for gradient in together[1].values())


def test_nan_in_a_pass_reaches_the_loss(examples: list[Example]) -> None:
    model = packed.make_policy()
    with torch.no_grad():
        next(weight for weight in model.parameters() if weight.requires_grad)[0, 0] = float("nan")
    assert Step(model, most_tokens=400)(examples)[0] != pytest.approx(0, abs=1e9)


# Faster ways: compiled on the CPU without a C++ compiler; CUDA graphs are tested in tests/gpu.


@pytest.fixture
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "and checkpointed"])
def test_compiled_layers_give_the_same_gradient_for_three_sizes_by_one_compilation(
    checkpointed: bool, examples: list[Example], plain: Any
) -> None:
    sizes = [Size(tokens, 12, 384) for tokens in (768, 1024, 1280)]
    current = [sizes[0]]

    def make_forward(model: Any) -> Any:
        forward = packed.sized_forward(model, sizes[0])
        batch_of_size = type(forward).__mro__[1].batch
        forward.batch = lambda rows: batch_of_size(forward, rows, current[0])
        return forward

    step = Step(make_checkpointed() if checkpointed else packed.make_policy(), make_forward)
    step.gradient.compile_layers("aot_eager")
    compilations = []
    for size in sizes[:1] if checkpointed else sizes:
        current[0] = size
        assert_same(step(examples), plain)
        compilations.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert compilations[0] > 0
    assert len(set(compilations)) == 1, "another size was compiled anew"
    step.gradient.uncompile_layers()
    before = dict(torch._dynamo.utils.counters["stats"])
    assert_same(step(examples), plain)
    assert dict(torch._dynamo.utils.counters["stats"]) == before


def failing() -> None:
    raise RuntimeError("no compiler was found\nTraceback and more")


@pytest.mark.parametrize("has_dropout", [False, True])
def test_a_faster_way_that_fails_is_undone_with_one_line(
    has_dropout: bool, examples: list[Example], plain: Any
) -> None:
    step = Step(packed.make_policy())
    undone: list[str] = []
    ways = {"compiled layers": (failing, lambda: undone.append("one")), "graphs": (list, lambda: undone.append("two"))}
    step.gradient.keep_what_works(ways, examples, has_dropout=has_dropout)
    assert undone == ["one"]
    assert step.notes == [
        "trains without compiled layers, which is slower: RuntimeError: no compiler was found",
    ]
    assert_same(step(examples), plain)


def test_a_faster_way_with_another_gradient_is_undone(examples: list[Example], plain: Any) -> None:
    step = Step(packed.make_policy())
    run = step.gradient._run

    def begin() -> None:
        step.gradient._run = lambda *arguments: (run(*arguments), run(*arguments))[0]  # type: ignore[method-assign]

    def undo() -> None:
        step.gradient._run = run  # type: ignore[method-assign]

    step.gradient.keep_what_works({"two passes": (begin, undo)}, examples, has_dropout=False)
    assert step.notes == ["trains without two passes, which is slower: their gradient is 100.0% off"]
    assert_same(step(examples), plain)


def test_an_error_of_the_users_is_not_taken_for_a_faster_way_that_fails(examples: list[Example]) -> None:
    def refuse() -> None:
        raise RecipeError("no")

    with pytest.raises(RecipeError):
        Step(packed.make_policy()).gradient.keep_what_works({"": (refuse, refuse)}, examples, has_dropout=False)


def test_a_model_with_other_layers_trains_uncompiled(examples: list[Example], plain: Any) -> None:
    step = Step(packed.make_policy())
    decoder = step.model.get_base_model().get_decoder

    def no_layers() -> Any:
        raise AttributeError("'GPT2Model' object has no attribute 'layers'")

    step.forward.causal_model.get_decoder = lambda: no_layers()
    with pytest.raises(AttributeError):
        step.gradient.compile_layers()
    step.gradient.uncompile_layers()
    step.forward.causal_model.get_decoder = decoder
    assert_same(step(examples), plain)


def test_nothing_is_compiled_or_captured_on_a_cpu(examples: list[Example]) -> None:
    step = Step(packed.make_policy())
    step.gradient.prepare([examples], 300, has_dropout=False)
    assert step.notes == []
    assert step.gradient._sizes == []
    assert not any(layer._compiled_call_impl for layer in step.forward.causal_model.get_decoder().layers)


def test_passes_of_later_steps_get_a_size_that_holds_them(examples: list[Example]) -> None:
    gradient = Step(packed.make_policy()).gradient
    gradient._sizes = gradient._choose_sizes([examples[3:4], examples[2:6]], longest_row=300)
    assert gradient._sizes == [Size(128, 4, 384), Size(256, 4, 384)]
    assert gradient._size_for(20) == Size(128, 4, 384)
    assert gradient._size_for(200) == Size(256, 4, 384)
    assert gradient._size_for(500) == Size(640, 4, 384)
    assert gradient._size_for(600) == Size(640, 4, 384)
    assert gradient._size_for(129) == Size(256, 4, 384)
    assert [size.tokens for size in gradient._sizes] == [128, 256, 640]


def test_memory_that_runs_out_in_a_capture_halves_the_pass_and_captures_again(examples: list[Example]) -> None:
    gradient = Step(packed.make_policy(), most_tokens=4096).gradient
    tried = []

    def capture(sizes: list[Size], _: list[Example]) -> None:
        tried.append([size.tokens for size in sizes])
        if sizes[-1].tokens > 400:
            raise torch.OutOfMemoryError("CUDA out of memory")

    gradient._capture = capture  # type: ignore[method-assign, assignment]
    gradient._capture_passes([examples], 300)
    assert tried == [[768], [256, 384]]
    assert gradient._note.__self__ == [  # type: ignore[attr-defined]
        "memory ran out in a pass of up to 727 tokens: goes on with 363; a step keeps its 12 rows"
    ]


# Two processes.


def gradient_of_one_of_two(rank: int, folder: Path) -> None:
    """Write loss and gradients of a step that this process computes together with another one."""
    import torch.distributed as dist

    from llamarefine_jobs.process.world import World

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    world = World(rank=rank, size=2, local_rank=rank)
    examples = packed.sft_examples(packed.rows())
    step = Step(packed.make_policy())
    own = world.shard(examples)
    assert len(own) == 6
    loss = step.gradient(own, SftObjective().weight(examples))
    world.sum_gradient(step.weights.gradient)
    (sum_of_losses,) = world.sum_over_processes(lambda: [float(loss)])
    torch.save({"loss": sum_of_losses, "gradients": packed.gradients(step.model)}, folder / f"{rank}.pt")
    world.shutdown()


def test_two_processes_sum_to_the_gradient_of_one(tmp_path: Path, plain: Any) -> None:
    fork = multiprocessing.get_context("fork")  # it spares both processes the imports
    processes = [fork.Process(target=gradient_of_one_of_two, args=(rank, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=120)
        if process.exitcode is None:
            process.kill()
        assert process.exitcode == 0
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert_same((found["loss"], found["gradients"]), plain)
