"""The entry point at degree 1: input checks, defaults, use under checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from raysp.attention import SequenceLayout, check_method, parallel_attention, reference_attention
from raysp.errors import InputError


def make_rows(num_heads: int = 4, num_key_heads: int = 2, num_rows: int = 12) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (num_heads, num_key_heads, num_key_heads)
    return [torch.randn(num_rows, h, 8, generator=generator, dtype=torch.float64, requires_grad=True) for h in heads]


def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **changes: Any) -> torch.Tensor:
    arguments: dict[str, Any] = {"layout": SequenceLayout([5, 7], 1), "group": None} | changes
    return parallel_attention(q, k, v, **arguments)


@pytest.mark.parametrize("method", ["auto", "local", "ring", "ulysses", "token_ring"])
def test_a_group_of_one_is_local_attention(method: str) -> None:
    q, k, v = make_rows()
    torch.testing.assert_close(run(q, k, v, method=method), reference_attention(q, k, v, [5, 7]), rtol=0, atol=1e-14)


def test_future_tokens_and_other_documents_change_nothing() -> None:
    q, k, v = make_rows()
    before = run(q, k, v)
    with torch.no_grad():
        k[3] += 1.0
        v[3] -= 1.0
    after = run(q, k, v)
    unchanged = [0, 1, 2, *range(5, 12)]
    assert torch.equal(before[unchanged], after[unchanged])
    assert (before[[3, 4]] != after[[3, 4]]).any()


def test_gradients_under_checkpointing_are_the_same() -> None:
    leaves = make_rows()
    plain = torch.autograd.grad(run(*leaves).square().sum(), leaves)
    again = torch.autograd.grad(checkpoint(run, *leaves, use_reentrant=False).square().sum(), leaves)
    for expected, found in zip(plain, again, strict=True):
        assert torch.equal(expected, found)


def test_a_gradient_of_a_gradient_is_refused() -> None:
    layout = SequenceLayout([6], 1)
    q, k, v = (torch.randn(6, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = parallel_attention(q, k, v, layout=layout, group=None)
    # Linear in the output: the incoming gradient itself needs none.
    with pytest.raises(InputError, match="expected first derivatives alone"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


def test_inputs_that_are_views_of_another_memory_order_are_accepted() -> None:
    q, k, v = (tensor.detach() for tensor in make_rows())
    strided = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (q, k, v)]
    torch.testing.assert_close(run(*strided), run(q, k, v), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window": 0}, "window is 0; expected"),
        ({"window": 4, "causal": False}, "expected a causal call"),
        ({"kv_layout": SequenceLayout([3], 1), "causal": False}, "1 documents, layout degree 1 and 2"),
        ({"kv_layout": SequenceLayout([5, 8], 1)}, "expected causal = False for cross attention"),
        ({"kv_layout": SequenceLayout([5, 8], 1), "causal": False}, "expected 13 rows of k, v, the kv_layout's"),
        ({"method": "rings"}, "'rings' is unknown"),
        ({"kernel": "fa4"}, "expected bf16 or fp16 on CUDA"),
        ({"layout": SequenceLayout([5, 6], 1)}, "expected 11 rows"),
        ({"layout": SequenceLayout([5, 7], 2)}, "group is None"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(*make_rows(), **changes)


def test_bad_tensors_are_refused() -> None:
    q, k, v = make_rows()
    with pytest.raises(InputError, match="key heads that divide"):
        run(*make_rows(num_heads=4, num_key_heads=3))
    with pytest.raises(InputError, match="one floating-point dtype"):
        run(q.float(), k, v)
    with pytest.raises(InputError, match="k, v both"):
        run(q, k, v[:, :1])
    with pytest.raises(InputError, match="one head size"):
        run(q[..., :4], k, v)


@pytest.mark.parametrize(
    ("num_heads", "num_key_heads", "degree", "message"),
    [(4, 2, 3, "4 query heads over a group of degree 3"), (12, 4, 6, "4 key heads over a group of degree 6")],
)
def test_ulysses_names_heads_and_degree_that_do_not_divide(
    num_heads: int, num_key_heads: int, degree: int, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        check_method("ulysses", degree=degree, num_heads=num_heads, num_key_heads=num_key_heads)
