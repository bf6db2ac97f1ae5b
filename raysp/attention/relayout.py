"""Moving rows from one layout's order to another's: between layers that need different cuts of the same documents.

Linear attention and convolutions need contiguous runs of tokens, causal softmax attention is level only in zigzag order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raysp.attention.differentiable import differentiable_once
from raysp.attention.layout import SequenceLayout
from raysp.comm import Communicator, ProcessGroup, all_to_all_rows
from raysp.errors import InputError


def relayout(
    *tensors: Tensor, source: SequenceLayout, target: SequenceLayout, group: ProcessGroup | Communicator | None
) -> tuple[Tensor, ...]:
    """Bring rows that lie in the order of ``source`` into that of ``target``, in one exchange among the group.

    All ranks of the group call this together.

    Args:
        tensors: Each ``[source.local_tokens, ...]``, this rank's rows.
        source: Where the rows are.
        target: Where they shall be; the same documents and degree.
        group: Process group or ``Communicator``; ``None`` at degree 1.

    Returns:
        For each tensor ``[target.local_tokens, ...]``; differentiable.

    Raises:
        InputError: The layouts are not of the same documents and group, or a tensor has not the source's rows.
    """
    if source.lengths != target.lengths or source.degree != target.degree:
        raise InputError(
            f"the layouts hold {source.num_tokens} and {target.num_tokens} tokens at degrees {source.degree} and "
            f"{target.degree}; expected the same documents and degree. Build both from one micro-batch."
        )
    communicator = Communicator.of(group, source.degree)
    for tensor in tensors:
        if tensor.shape[0] != source.local_tokens(communicator.group_rank):
            raise InputError(
                f"a tensor of {tensor.shape[0]} rows on group rank {communicator.group_rank}; expected "
                f"{source.local_tokens(communicator.group_rank)}, the source layout's local_tokens."
            )
    if source == target or not tensors:
        return tensors
    moved: tuple[Tensor, ...] = _Relayout.apply(source, target, communicator, *tensors)
    return moved


class _Relayout(torch.autograd.Function):
    """The gradient travels the way back."""

    @staticmethod
    def forward(
        ctx: Any, source: SequenceLayout, target: SequenceLayout, group: Communicator, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.way_back = (target, source, group)
        return _moved(tensors, source, target, group)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # Ids and masks have no gradient to send.
        wanted = [place for place, needed in enumerate(ctx.needs_input_grad[3:]) if needed]
        moved = _moved([gradients[place] for place in wanted], *ctx.way_back)
        found: list[Tensor | None] = [None] * len(gradients)
        for place, gradient in zip(wanted, moved, strict=True):
            found[place] = gradient
        return (None, None, None, *found)


@dataclass(frozen=True)
class _Route:
    """Index maps of one rank.

    Attributes:
        leaving: int64 ``[source rows]``, local rows ordered by the rank they go to.
        leaving_counts: Rows for each rank.
        arriving: int64 ``[target rows]``, the local row of each row that arrives, in rank order.
        arriving_counts: Rows from each rank.
    """

    leaving: Tensor
    leaving_counts: list[int]
    arriving: Tensor
    arriving_counts: list[int]


def _moved(
    tensors: Sequence[Tensor], source: SequenceLayout, target: SequenceLayout, group: Communicator
) -> tuple[Tensor, ...]:
    device = tensors[0].device
    route = source.memo(
        ("route", target, group.group_rank, device), lambda: _route(source, target, group.group_rank, device)
    )
    arrived = all_to_all_rows(
        [tensor.index_select(0, route.leaving) for tensor in tensors],
        [route.leaving_counts] * len(tensors),
        [route.arriving_counts] * len(tensors),
        group,
    )
    return tuple(torch.empty_like(rows).index_copy_(0, route.arriving, rows) for rows in arrived)


def _route(source: SequenceLayout, target: SequenceLayout, me: int, device: torch.device) -> _Route:
    degree = source.degree
    owner = np.empty(source.num_tokens, dtype=np.int64)
    for rank in range(degree):
        owner[target.token_indices(rank).numpy()] = rank
    mine = target.token_indices(me).numpy()
    row = np.empty(source.num_tokens, dtype=np.int64)
    row[mine] = np.arange(len(mine))
    going = owner[source.token_indices(me).numpy()]
    coming = [tokens[owner[tokens] == me] for tokens in (source.token_indices(rank).numpy() for rank in range(degree))]
    return _Route(
        leaving=torch.from_numpy(np.argsort(going, kind="stable")).to(device),
        leaving_counts=np.bincount(going, minlength=degree).tolist(),
        arriving=torch.from_numpy(row[np.concatenate(coming)]).to(device),
        arriving_counts=[len(tokens) for tokens in coming],
    )
