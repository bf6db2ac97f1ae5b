"""Chunked cross-entropy equals the naive one, value and gradients."""

from __future__ import annotations

import pytest
import torch

from raysp.errors import InputError
from raysp.train.loss import IGNORED_LABEL, resolve_loss_kernel, summed_cross_entropy


def _case(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, 12, generator=generator, dtype=dtype, requires_grad=True)
    weight = torch.randn(37, 12, generator=generator, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, 37, (rows,), generator=generator)
    labels[::3] = IGNORED_LABEL
    return hidden, weight, labels


@pytest.mark.parametrize("rows", [1, 2, 7, 63, 128])
@pytest.mark.parametrize("chunk_rows", [1, 5, 1000])
def test_value_and_gradients_equal_full_logits(rows: int, chunk_rows: int) -> None:
    hidden, weight, labels = _case(rows, torch.float64)
    loss = summed_cross_entropy(hidden, weight, labels, chunk_rows=chunk_rows, kernel="chunked")
    grads = torch.autograd.grad(loss * 0.37, (hidden, weight))
    naive = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, ignore_index=IGNORED_LABEL, reduction="sum")
    expected = torch.autograd.grad(naive * 0.37, (hidden, weight))
    torch.testing.assert_close(loss, naive, rtol=0, atol=1e-10)
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-10)


def test_rows_without_any_target_give_zero_loss_and_defined_zero_gradients() -> None:
    hidden, weight, labels = _case(4, torch.float32)
    loss = summed_cross_entropy(hidden, weight, torch.full_like(labels, IGNORED_LABEL), chunk_rows=2, kernel="chunked")
    loss.backward()
    assert loss.item() == 0
    assert hidden.grad is not None
    assert not hidden.grad.any()
    assert weight.grad is not None
    assert not weight.grad.any()


def test_bf16_inputs_accumulate_in_fp32() -> None:
    hidden, weight, labels = _case(64, torch.bfloat16)
    loss = summed_cross_entropy(hidden, weight, labels, chunk_rows=16, kernel="chunked")
    exact = torch.nn.functional.cross_entropy(
        hidden.double() @ weight.double().T, labels, ignore_index=IGNORED_LABEL, reduction="sum"
    )
    assert loss.dtype == torch.float32
    assert abs(loss.item() / exact.item() - 1) < 5e-3


def test_liger_on_cpu_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="loss_kernel = 'liger' cannot run on cpu"):
        resolve_loss_kernel("liger", device=torch.device("cpu"), dtype=torch.float32)
    assert resolve_loss_kernel("auto", device=torch.device("cpu"), dtype=torch.float32) == "chunked"
