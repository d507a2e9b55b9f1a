"""The flat adapter: updates equal torch's, and its optimizer state survives a file, or is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from llamarefine_jobs.training.adapter_weights import AdapterWeights

SHAPES = {"a": (4, 33), "b": (7, 5), "c": (1,), "d": (64,)}


def make_model(shapes: dict[str, tuple[int, ...]] = SHAPES) -> Any:
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Module()
    model.register_parameter("frozen", torch.nn.Parameter(torch.ones(3), requires_grad=False))
    for name, shape in shapes.items():
        model.register_parameter(name, torch.nn.Parameter(torch.randn(shape, generator=generator)))
    return model


def make_weights(model: Any, most_gradient_norm: float = 1.0) -> AdapterWeights:
    return AdapterWeights(model, weight_decay=0.1, most_gradient_norm=most_gradient_norm)


def set_gradients(model: Any, step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for weight in model.parameters():
        if weight.requires_grad:
            gradient = scale * torch.randn(weight.shape, generator=generator)
            weight.grad = gradient if weight.grad is None else weight.grad.copy_(gradient)


@pytest.mark.parametrize("most_gradient_norm", [0.1, 1e6])
def test_updates_equal_torchs_clipping_and_adamw(most_gradient_norm: float) -> None:
    ours, theirs = make_model(), make_model()
    weights = make_weights(ours, most_gradient_norm)
    trained = [weight for weight in theirs.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.1, foreach=True)
    for step in range(20):
        rate = 0.1 / (step + 1)
        for model in (ours, theirs):
            set_gradients(model, step, scale=10.0 ** (step % 5 - 2))
        weights.update(rate)
        torch.nn.utils.clip_grad_norm_(trained, most_gradient_norm)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        assert not weights.gradient.any()
        for name in SHAPES:
            torch.testing.assert_close(ours.get_parameter(name), theirs.get_parameter(name), rtol=1e-5, atol=1e-6)
    assert (ours.a - make_model().a).abs().max() > 0.1
    assert torch.equal(ours.frozen, make_model().frozen)


def test_the_models_weights_and_gradients_are_views_of_the_flat_ones() -> None:
    model = make_model()
    weights = make_weights(model)
    assert torch.equal(model.a, make_model().a)
    (model.a.sum() * 2 + model.d.sum()).backward()
    assert weights.gradient.sum() == 2 * model.a.numel() + model.d.numel()
    weights.clear_gradient()
    assert not model.a.grad.any()
    weights.values.fill_(3)
    assert (model.b == 3).all()
    assert weights.is_finite()
    with torch.no_grad():
        model.b[2, 3] = float("nan")
    assert not weights.is_finite()


def test_the_optimizer_state_survives_a_file(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model, resumed = make_model(), make_model()
    weights = make_weights(model)
    for step in range(5):
        set_gradients(model, step)
        weights.update(0.01)
    save_file(weights.optimizer_state(), tmp_path / "optimizer.safetensors")
    again = make_weights(resumed)
    again.values.copy_(weights.values)
    again.load_optimizer_state(load_file(tmp_path / "optimizer.safetensors"), updates=5)
    for step in range(5, 10):
        for one, flat in ((model, weights), (resumed, again)):
            set_gradients(one, step)
            flat.update(0.01)
    assert torch.equal(weights.values, again.values)


def without(state: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda state: without(state, "exp_avg.a"), "of another adapter"),
        (lambda state: without(state, "step"), "of another adapter"),
        (lambda state: state | {"exp_avg.e": torch.zeros(2)}, "of another adapter"),
        (lambda state: state | {"exp_avg.a": torch.zeros(33, 4)}, "of another adapter"),
        (lambda state: state | {"step": torch.zeros(2)}, "of another adapter"),
        (lambda state: state | {"exp_avg_sq.b": torch.full((7, 5), float("nan"))}, "NaN or infinity"),
        (lambda state: state | {"exp_avg.c": torch.tensor([float("inf")])}, "NaN or infinity"),
        (lambda state: state | {"step": torch.tensor(float("nan"))}, "NaN or infinity"),
        (lambda state: state | {"step": torch.tensor(2.0)}, "of step 2, expected 1"),
        (lambda state: state | {"exp_avg_sq.c": torch.tensor([-1.0])}, "negative squares"),
    ],
)
def test_a_damaged_state_is_refused_and_changes_nothing(damage: Any, reason: str) -> None:
    model = make_model()
    weights = make_weights(model)
    set_gradients(model, 0)
    weights.update(0.01)
    before = weights.optimizer_state()
    with pytest.raises(ValueError, match=reason):
        weights.load_optimizer_state(damage(dict(before)), updates=1)
    after = weights.optimizer_state()
    assert all(torch.equal(after[name], before[name]) for name in before)
