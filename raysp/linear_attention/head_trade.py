"""Ulysses for recurrences: all-to-alls turn a run of the tokens with all heads into all tokens with a share of the heads.

Source: DeepSpeed Ulysses (arXiv:2309.14509).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raysp.comm import Communicator, all_to_all_rows
from raysp.errors import InputError


def check_heads(num_heads: int, degree: int) -> None:
    """Refuse heads that cannot be shared out equally.

    Raises:
        InputError: Names heads and degree.
    """
    if num_heads % degree:
        raise InputError(
            f"ulysses cannot share {num_heads} heads over a group of degree {degree}; expected a degree that divides "
            "them. Use another degree, or method 'lasp2', which runs any."
        )


def own_heads(tensor: Tensor, group: Communicator, dim: int) -> Tensor:
    """This rank's share of the heads of a tensor that every rank holds whole."""
    share = tensor.shape[dim] // group.degree
    return tensor.narrow(dim, group.group_rank * share, share)


class ToHeads(torch.autograd.Function):
    """``[local_tokens, H, ...]`` each to ``[tokens, H / N, ...]``; the gradient travels back."""

    @staticmethod
    def forward(ctx: Any, token_counts: list[int], group: Communicator, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Trade."""
        ctx.token_counts, ctx.group = token_counts, group
        return _to_heads(tensors, token_counts, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Trade back."""
        return (None, None, *_to_tokens(gradients, ctx.token_counts, ctx.group))


class ToTokens(torch.autograd.Function):
    """The inverse of ``ToHeads`` for one tensor."""

    @staticmethod
    def forward(ctx: Any, token_counts: list[int], group: Communicator, tensor: Tensor) -> Tensor:
        """Trade back."""
        ctx.token_counts, ctx.group = token_counts, group
        [rows] = _to_tokens([tensor], token_counts, group)
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, Tensor]:
        """Trade."""
        [rows] = _to_heads([gradient], ctx.token_counts, ctx.group)
        return None, None, rows


def _to_heads(tensors: Sequence[Tensor], token_counts: Sequence[int], group: Communicator) -> tuple[Tensor, ...]:
    degree, mine = group.degree, token_counts[group.group_rank]
    by_rank = [tensor.unflatten(1, (degree, -1)).transpose(0, 1).flatten(0, 1) for tensor in tensors]
    counts = [mine] * degree
    return tuple(all_to_all_rows(by_rank, [counts] * len(tensors), [token_counts] * len(tensors), group))


def _to_tokens(tensors: Sequence[Tensor], token_counts: Sequence[int], group: Communicator) -> tuple[Tensor, ...]:
    degree, mine = group.degree, token_counts[group.group_rank]
    counts = [mine] * degree
    arrived = all_to_all_rows(list(tensors), [token_counts] * len(tensors), [counts] * len(tensors), group)
    return tuple(rows.unflatten(0, (degree, mine)).transpose(0, 1).flatten(1, 2) for rows in arrived)
