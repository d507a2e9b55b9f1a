"""Fuzz the files of a checkpoint: a training resumes with finite numbers, or there is a one-line error."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from llamarefine_jobs.models import adapters
from llamarefine_jobs.models.encoding import Encoded
from llamarefine_jobs.models.lora import ADAPTER_WEIGHTS
from llamarefine_jobs.process.world import World
from llamarefine_jobs.training.adapter_weights import AdapterWeights
from llamarefine_jobs.training.best_adapter import BestAdapter
from llamarefine_jobs.training.checkpoint_files import (
    TrainingState,
    read_checkpoint,
    reporting_damage,
    write_checkpoint,
)
from llamarefine_jobs.training.objectives import Example
from llamarefine_jobs.training.reference_logprobs import examples_with_reference, write_reference

from ..jobs import tiny
from .target import allow_refusal, fuzzed
from .test_files import mutations

STEP, STEPS = 3, 10
HISTORY = [{"step": 1, "loss": 2.5, "learning_rate": 0.01}, {"step": 2, "eval_loss": 2.25}]
PAIRS = [(Encoded([1], [2, 3]), Encoded([1], [3, 2])), (Encoded([4], [5]), Encoded([4], [6]))]
CONTEXT: Any = SimpleNamespace(
    store=SimpleNamespace(uri="s3://bucket"), stage=SimpleNamespace(name="dpo"), key="0" * 64, world=World()
)


class Training:
    """A training whose checkpoint lies in a folder, and the valid bytes of each of its files."""

    def __init__(self, folder: Path) -> None:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=1, target_modules=["q_proj"], task_type="CAUSAL_LM")
        self.model = get_peft_model(
            tiny.make_model(8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1), config
        )
        self.weights = AdapterWeights(self.model, weight_decay=0.0, most_gradient_norm=1.0)
        for _ in range(STEP):
            self.weights.gradient.fill_(0.5)
            self.weights.update(0.01)
        self.folder = folder
        write_checkpoint(folder, self.model, self.weights, TrainingState(STEP, STEPS, HISTORY))
        write_reference(folder, [Example(pair, (-2.0, -3.0)) for pair in PAIRS])
        (folder / "best").mkdir()
        (folder / "best" / "best.json").write_text(json.dumps({"loss": 2.25, "step": 2}))
        save_file(adapters.adapter_state(self.model), folder / "best" / ADAPTER_WEIGHTS)
        paths = (path for path in folder.rglob("*") if path.is_file())
        self.valid = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}

    def resume(self, work: Path) -> tuple[TrainingState, list[Example], BestAdapter]:
        """Read all files as a DPO that resumes does."""
        for path in work.glob("best/*"):
            path.unlink()
        best = BestAdapter(work, "s3://bucket/checkpoints")
        with reporting_damage(CONTEXT):
            examples = examples_with_reference(None, PAIRS, self.folder, CONTEXT)  # type: ignore[arg-type]
            if (work / "best").exists():
                (work / "best").rmdir()
            best.restore(self.folder, World())
            state = read_checkpoint(self.folder, self.model, self.weights, STEPS)
            best.check(self.model)
        return state, examples, best


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Training]:
    outer = tmp_path_factory.mktemp("outer")
    (outer / "work").mkdir()
    yield Training(outer / "checkpoint")
    assert {path.name for path in outer.iterdir()} == {"checkpoint", "work"}, "a file was written elsewhere"


FILES = (
    "training_state.json",
    "optimizer.safetensors",
    "adapter_model.safetensors",
    "reference_logprobs.safetensors",
    "best/best.json",
    "best/adapter_model.safetensors",
)


def write_all(training: Training, **changed: bytes) -> None:
    for name, content in (training.valid | changed).items():
        (training.folder / name).write_bytes(content)


@pytest.mark.parametrize("name", FILES)
@fuzzed(0.03)
@given(data=st.data())
def test_a_file_of_a_checkpoint(name: str, data: Any, training: Training) -> None:
    write_all(training, **{name: data.draw(mutations(training.valid[name]))})
    with allow_refusal(name):
        state, examples, best = training.resume(training.folder.parent / "work")
        assert 0 < state.step <= STEPS
        assert best.step >= 1
        assert training.weights.is_finite()
        assert all(bool(tensor.isfinite().all()) for tensor in best.weights().values())
        assert torch.tensor([example.reference for example in examples]).isfinite().all()
        training.weights.update(0.01)  # the next step, with the optimizer's state
        assert training.weights.is_finite()


def test_the_unmutated_checkpoint_is_valid(training: Training) -> None:
    assert set(FILES) | {"adapter_config.json"} == training.valid.keys()
    write_all(training)
    state, examples, best = training.resume(training.folder.parent / "work")
    assert state == TrainingState(STEP, STEPS, HISTORY)
    assert [example.reference for example in examples] == [(-2.0, -3.0)] * 2
    assert (best.loss, best.step) == (2.25, 2)
