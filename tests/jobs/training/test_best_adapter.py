"""The best adapter in a checkpoint is checked before a training continues with it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llamarefine_jobs.contract.errors import IntegrityError
from llamarefine_jobs.models.lora import ADAPTER_WEIGHTS
from llamarefine_jobs.training.best_adapter import check_best, read_best

WHERE = "s3://bucket/checkpoints/sft/0"


@pytest.mark.parametrize(
    ("record", "expected"), [(b'{"loss": 2.5, "step": 8}', (2.5, 8)), (b'{"loss": 2, "step": 1}', (2, 1))]
)
def test_loss_and_step_are_read(record: bytes, expected: tuple[float, int], tmp_path: Path) -> None:
    (tmp_path / "best.json").write_bytes(record)
    assert read_best(tmp_path, WHERE) == expected


@pytest.mark.parametrize(
    "record",
    [
        b"",
        b"[]",
        b"null",
        b"\xff",
        b'{"loss": 1.5}',
        b'{"loss": NaN, "step": 8}',
        b'{"loss": -Infinity, "step": 8}',
        b'{"loss": "1.5", "step": 8}',
        b'{"loss": true, "step": 8}',
        b'{"loss": 1.5, "step": 8.5}',
        b'{"loss": 1.5, "step": 0}',
        b"[" * 100_000,
    ],
)
def test_an_invalid_loss_or_step_is_a_one_line_error(record: bytes, tmp_path: Path) -> None:
    (tmp_path / "best.json").write_bytes(record)
    with pytest.raises(IntegrityError, match=f"checkpoint under {WHERE} is damaged: its best.json") as refused:
        read_best(tmp_path, WHERE)
    assert "\n" not in str(refused.value)


def test_an_adapter_that_does_not_fit_the_trained_one_is_an_error(tmp_path: Path) -> None:
    trained = {"a": torch.zeros(2, 3), "b": torch.zeros(3)}
    with pytest.raises(IntegrityError, match="missing"):
        check_best(tmp_path, trained, WHERE)
    for best, message in (
        ({"a": torch.zeros(2, 3)}, "shapes of its best adapter differ"),
        ({"a": torch.zeros(3, 2), "b": torch.zeros(3)}, "shapes of its best adapter differ"),
        ({"a": torch.full((2, 3), torch.nan), "b": torch.zeros(3)}, "contains NaN or infinity"),
    ):
        save_file(best, tmp_path / ADAPTER_WEIGHTS)
        with pytest.raises(IntegrityError, match=message):
            check_best(tmp_path, trained, WHERE)
    (tmp_path / ADAPTER_WEIGHTS).write_bytes(b"no safetensors")
    with pytest.raises(IntegrityError, match="cannot be read"):
        check_best(tmp_path, trained, WHERE)
    save_file(trained, tmp_path / ADAPTER_WEIGHTS)
    check_best(tmp_path, trained, WHERE)
