"""A training's steps: their rows and their learning rates."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llamarefine_jobs.training.schedule import Schedule
from tests.jobs import tiny


def section(**fields: Any) -> Any:
    settings = {"batch_rows": 8, "epochs": 3.0, "max_steps": None, "lr_schedule": "cosine", "learning_rate": 0.01}
    return SimpleNamespace(**(settings | {"warmup_fraction": 0.1} | fields))


@pytest.mark.parametrize("warmup_fraction", [0.0, 0.1, 0.33, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_the_learning_rates_equal_transformers(kind: str, steps: int, warmup_fraction: float) -> None:
    from transformers import TrainingArguments, get_scheduler

    schedule = Schedule(section(max_steps=steps, lr_schedule=kind, warmup_fraction=warmup_fraction), rows=20, seed=0)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    warmup = TrainingArguments.get_warmup_steps(SimpleNamespace(warmup_steps=warmup_fraction), steps)
    if warmup_fraction == 1.0:  # transformers takes 1.0 for one step; a recipe means all steps
        warmup = steps
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    for step in range(1, steps + 1):
        assert schedule.learning_rate(step) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12, abs=1e-15)
        optimizer.step()
        scheduler.step()


def test_the_recipe_offers_the_tested_schedules_only() -> None:
    schema = type(tiny.recipe().sft).model_json_schema()
    assert schema["properties"]["lr_schedule"]["enum"] == ["cosine", "linear", "constant"]


@pytest.mark.parametrize(("rows", "batch_rows"), [(24, 8), (21, 8), (17, 8), (3, 8), (1, 4), (8, 1)])
def test_each_epoch_takes_every_row_once_and_fills_its_last_step_with_its_first_rows(
    rows: int, batch_rows: int
) -> None:
    schedule = Schedule(section(batch_rows=batch_rows), rows, seed=5)
    steps_per_epoch = -(-rows // batch_rows)
    assert schedule.steps == 3 * steps_per_epoch
    orders = []
    for epoch in range(3):
        steps = range(epoch * steps_per_epoch + 1, (epoch + 1) * steps_per_epoch + 1)
        taken = [schedule.rows_of(step) for step in steps]
        assert all(len(one) == batch_rows for one in taken)
        order = [row for one in taken for row in one]
        assert sorted(order[:rows]) == list(range(rows))
        assert order[rows:] == (order[:rows] * batch_rows)[: len(order) - rows]
        orders.append(order)
    if rows > 8:
        assert orders[0] != orders[1] != orders[2]


def test_rows_depend_on_the_seed_and_the_step_only() -> None:
    one, other = Schedule(section(), 50, seed=5), Schedule(section(), 50, seed=5)
    forward = [one.rows_of(step) for step in range(1, one.steps + 1)]
    backward = [other.rows_of(step) for step in range(other.steps, 0, -1)]
    assert forward == backward[::-1]
    assert forward[0] != Schedule(section(), 50, seed=6).rows_of(1)


@pytest.mark.parametrize(
    ("fields", "steps"), [({"epochs": 0.5}, 4), ({"epochs": 2.5}, 18), ({"epochs": 0.01}, 1), ({"max_steps": 5}, 5)]
)
def test_steps_follow_from_epochs_or_max_steps(fields: dict[str, Any], steps: int) -> None:
    assert Schedule(section(**fields), 50, seed=0).steps == steps
