"""A checkpoint is read as it was written, or refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.jobs import packed

STEPS = 10


def make(folder: Path | None = None) -> tuple[Any, Any]:
    """Return a model and its flat weights after three updates; write them into `folder` as a checkpoint of step 3."""
    from llamarefine_jobs.training.adapter_weights import AdapterWeights
    from llamarefine_jobs.training.checkpoint_files import TrainingState, write_checkpoint

    model = packed.make_policy()
    weights = AdapterWeights(model, weight_decay=0.1, most_gradient_norm=1.0)
    if folder:
        for step in range(3):
            weights.gradient.normal_(generator=torch.Generator().manual_seed(step))
            weights.update(0.01)
        write_checkpoint(folder, model, weights, TrainingState(3, STEPS, [{"step": 3, "loss": 1.5}]))
    return model, weights


def test_a_checkpoint_brings_back_adapter_optimizer_and_state(tmp_path: Path) -> None:
    from llamarefine_jobs.training.checkpoint_files import read_checkpoint

    model, weights = make(tmp_path / "3")
    resumed, again = make()
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert not torch.equal(resumed.get_parameter(trained[0]), model.get_parameter(trained[0]))
    state = read_checkpoint(tmp_path / "3", resumed, again, STEPS)
    assert (state.step, state.steps, state.history) == (3, STEPS, [{"step": 3, "loss": 1.5}])
    for name in trained:
        assert torch.equal(resumed.get_parameter(name), model.get_parameter(name))
    found, expected = again.optimizer_state(), weights.optimizer_state()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    next(resumed.get_parameter(name) for name in trained).data.fill_(7)
    assert (again.values == 7).any(), "the model's weights are no longer those that the optimizer updates"


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def edit_state(**fields: Any) -> Callable[[Path], None]:
    def edit(file: Path) -> None:
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return edit


def set_first_tensor(value: float) -> Callable[[Path], None]:
    def fill(file: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(file)
        tensors[min(tensors)].fill_(value)
        save_file(tensors, file)

    return fill


def drop_first_tensor(file: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    del tensors[min(tensors)]
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("optimizer.safetensors", truncate, "incomplete|Error"),
        ("optimizer.safetensors", Path.unlink, "optimizer.safetensors"),
        ("optimizer.safetensors", drop_first_tensor, "another adapter"),
        ("optimizer.safetensors", set_first_tensor(float("nan")), "NaN or infinity"),
        ("adapter_model.safetensors", truncate, "incomplete|Error"),
        ("adapter_model.safetensors", Path.unlink, "adapter_model.safetensors"),
        ("adapter_model.safetensors", drop_first_tensor, "other weights"),
        ("adapter_model.safetensors", set_first_tensor(float("inf")), "NaN or infinity"),
        ("training_state.json", Path.unlink, "training_state.json"),
        ("training_state.json", edit_state(step=0), "of step 0 of 10, expected one of 10 steps"),
        ("training_state.json", edit_state(step=11), "of step 11 of 10"),
        ("training_state.json", edit_state(step=True), "of step True of 10"),
        ("training_state.json", edit_state(steps=12), "of step 3 of 12"),
        ("training_state.json", edit_state(history="none"), "history"),
        ("training_state.json", edit_state(history=[{"step": 3, "loss": float("nan")}]), "NaN|history"),
    ],
)
def test_a_damaged_checkpoint_is_refused(name: str, damage: Any, reason: str, tmp_path: Path) -> None:
    from llamarefine_jobs.training.checkpoint_files import read_checkpoint

    make(tmp_path / "3")
    damage(tmp_path / "3" / name)
    model, weights = make()
    with pytest.raises((ValueError, OSError), match=reason):
        read_checkpoint(tmp_path / "3", model, weights, STEPS)
