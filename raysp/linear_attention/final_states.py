"""States that every rank shall hold whole: gathered from the ranks where documents end, gradients summed back there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raysp.attention.differentiable import differentiable_once
from raysp.comm import Communicator, all_to_all_rows, start_all_gather_rows


class GatherRows(torch.autograd.Function):
    """All ranks' rows on every rank, in rank order.

    Backward: the objective is the sum of what the ranks compute, so the gradient of a row is the sum of the gradients of
    its copies.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, row_counts: list[int], group: Communicator) -> Tensor:
        """Gather ``rows [row_counts[group_rank], ...]`` to ``[sum(row_counts), ...]``."""
        ctx.row_counts, ctx.group = row_counts, group
        gathered, pending = start_all_gather_rows(rows, row_counts, group)
        pending.wait()
        return gathered

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Each rank gets the sum of the gradients of its rows."""
        mine = ctx.row_counts[ctx.group.group_rank]
        [copies] = all_to_all_rows([gradient], [ctx.row_counts], [[mine] * ctx.group.degree], ctx.group)
        return copies.unflatten(0, (ctx.group.degree, mine)).sum(dim=0), None, None
