"""The loss of tokens equals torch's cross entropy, chunk by chunk."""

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from llamarefine_jobs.models import token_loss
from llamarefine_jobs.models.token_loss import NO_TARGET, token_nats

POSITIONS, TOKENS = 37, 50


@pytest.fixture(params=[1, TOKENS * 5, TOKENS * 36, 1 << 26], ids="{} logits a chunk".format)
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_loss, "CHUNK_LOGITS", request.param)


def values(dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Any, Any]:
    """Return hidden states, head, targets of which every third is missing, and the weights of a loss."""
    generator = torch.Generator().manual_seed(0)
    hidden_TH, head_VH = (torch.randn(count, 16, generator=generator, dtype=dtype) for count in (POSITIONS, TOKENS))
    targets_T = torch.randint(0, TOKENS, (POSITIONS,), generator=generator)
    targets_T[::3] = NO_TARGET
    return hidden_TH.requires_grad_(), head_VH, targets_T, torch.randn(POSITIONS, generator=generator, dtype=dtype)


def torchs_nats(hidden_TH: Any, head_VH: Any, targets_T: Any) -> Any:
    logits = (hidden_TH @ head_VH.T).to(torch.promote_types(head_VH.dtype, torch.float32))
    return cross_entropy(logits, targets_T, ignore_index=NO_TARGET, reduction="none")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_values_and_gradient_equal_cross_entropy(chunked: None, dtype: torch.dtype, tolerance: float) -> None:
    hidden_TH, head_VH, targets_T, weight_T = values(dtype)
    expected = torchs_nats(hidden_TH, head_VH, targets_T)
    (gradient,) = torch.autograd.grad((expected * weight_T).sum(), hidden_TH)
    found = token_nats(hidden_TH, head_VH, targets_T)
    (found_gradient,) = torch.autograd.grad((found * weight_T).sum(), hidden_TH)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found_gradient, gradient, rtol=tolerance, atol=tolerance)


def test_nan_where_there_is_no_target_reaches_neither_values_nor_gradient(chunked: None) -> None:
    hidden_TH, head_VH, targets_T, weight_T = values()
    expected = token_nats(hidden_TH, head_VH, targets_T)
    (gradient,) = torch.autograd.grad((expected * weight_T).sum(), hidden_TH)
    broken_TH = hidden_TH.detach().clone()
    broken_TH[::3] = float("nan")
    broken_TH[3] = float("inf")
    broken_TH.requires_grad_()
    found = token_nats(broken_TH, head_VH, targets_T)
    (found_gradient,) = torch.autograd.grad((found * weight_T).sum(), broken_TH)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_gradient, gradient)
    assert not found_gradient[::3].any()


def test_nan_at_a_target_stays_visible(chunked: None) -> None:
    hidden_TH, head_VH, targets_T, _ = values()
    with torch.no_grad():
        hidden_TH[4] = float("nan")
    assert token_nats(hidden_TH, head_VH, targets_T).isnan().nonzero().tolist() == [[4]]


def test_sixteen_bit_weights_give_values_in_32_bits(chunked: None) -> None:
    hidden_TH, head_VH, targets_T, weight_T = values(torch.bfloat16)
    found = token_nats(hidden_TH, head_VH, targets_T)
    assert found.dtype == torch.float32
    expected = torchs_nats(hidden_TH, head_VH, targets_T)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad((expected * weight_T).sum(), hidden_TH)
    (found_gradient,) = torch.autograd.grad((found * weight_T).sum(), hidden_TH)
    assert found_gradient.dtype == torch.bfloat16
    assert float((found_gradient - gradient).norm() / gradient.norm()) < 0.01
    with torch.no_grad():
        assert torch.equal(token_nats(hidden_TH, head_VH, targets_T), found)
