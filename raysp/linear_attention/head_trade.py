"""Ulysses for recurrences: all-to-alls turn a run of the tokens with all heads into all tokens with a share of the heads.

Source: DeepSpeed Ulysses (arXiv:2309.14509).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from planner.linear_attention_bytes import head_shares
from raysp.attention.differentiable import differentiable_once
from raysp.comm import Communicator, all_to_all_rows


def own_heads(tensor: Tensor, group: Communicator, dim: int) -> Tensor:
    """This rank's share of the heads of a tensor that every rank holds whole."""
    shares = head_shares(tensor.shape[dim], group.degree)
    return tensor.split(shares, dim=dim)[group.group_rank]


class ToHeads(torch.autograd.Function):
    """``[local_tokens, H, ...]`` each to all tokens of this rank's heads; the gradient travels back."""

    @staticmethod
    def forward(ctx: Any, token_counts: list[int], group: Communicator, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Trade."""
        ctx.token_counts, ctx.group, ctx.num_heads = token_counts, group, tensors[0].shape[1]
        return _to_heads(tensors, token_counts, group)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Trade back."""
        return (None, None, *_to_tokens(gradients, ctx.token_counts, ctx.num_heads, ctx.group))


class ToTokens(torch.autograd.Function):
    """The inverse of ``ToHeads`` for one tensor."""

    @staticmethod
    def forward(ctx: Any, token_counts: list[int], num_heads: int, group: Communicator, tensor: Tensor) -> Tensor:
        """Trade back."""
        ctx.token_counts, ctx.group = token_counts, group
        # A checkpoint runs a block again when it needs a saved tensor, and its exchanges need all ranks: ranks without heads
        # save nothing else.
        ctx.save_for_backward(tensor.new_empty(0))
        [rows] = _to_tokens([tensor], token_counts, num_heads, group)
        return rows

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, Tensor]:
        """Trade."""
        _ = ctx.saved_tensors
        [rows] = _to_heads([gradient], ctx.token_counts, ctx.group)
        return None, None, None, rows


def _to_heads(tensors: Sequence[Tensor], token_counts: Sequence[int], group: Communicator) -> tuple[Tensor, ...]:
    me = group.group_rank
    shares = head_shares(tensors[0].shape[1], group.degree)
    leaving = [share * token_counts[me] for share in shares]
    coming = [shares[me] * count for count in token_counts]
    by_head = [tensor.transpose(0, 1).flatten(0, 1) for tensor in tensors]
    arrived = all_to_all_rows(by_head, [leaving] * len(tensors), [coming] * len(tensors), group)
    return tuple(_joined(rows, coming, shares[me], token_counts).transpose(0, 1) for rows in arrived)


def _joined(rows: Tensor, counts: Sequence[int], num_heads: int, token_counts: Sequence[int]) -> Tensor:
    """What the ranks sent, each its tokens of all heads, as ``[heads, tokens, ...]``."""
    parts = [
        part.unflatten(0, (num_heads, count)) for part, count in zip(rows.split(counts), token_counts, strict=True)
    ]
    return torch.cat(parts, dim=1)


def _to_tokens(
    tensors: Sequence[Tensor], token_counts: Sequence[int], num_heads: int, group: Communicator
) -> tuple[Tensor, ...]:
    me = group.group_rank
    shares = head_shares(num_heads, group.degree)
    leaving = [shares[me] * count for count in token_counts]
    coming = [share * token_counts[me] for share in shares]
    by_rank = [
        torch.cat([part.transpose(0, 1).flatten(0, 1) for part in tensor.split(list(token_counts))])
        for tensor in tensors
    ]
    arrived = all_to_all_rows(by_rank, [leaving] * len(tensors), [coming] * len(tensors), group)
    return tuple(rows.unflatten(0, (num_heads, token_counts[me])).transpose(0, 1) for rows in arrived)
