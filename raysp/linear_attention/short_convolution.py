"""Causal depthwise convolutions inside documents, over shards: the tokens just before a rank's first come from its peers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raysp.attention.differentiable import differentiable_once
from raysp.attention.layout import SequenceLayout
from raysp.comm import Communicator, Message, ProcessGroup, exchange
from raysp.errors import InputError
from raysp.linear_attention.chains import chain_of, local_pieces


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    layout: SequenceLayout,
    group: ProcessGroup | Communicator | None,
) -> Tensor:
    """Convolve every channel with its own filter, along each document, seeing W tokens up to the current one.

    ``y[t, c] = bias[c] + sum over d < W of weight[c, W - 1 - d] * x[t - d, c]``, tokens before the document being zero.
    All ranks of the group call this together.

    Args:
        x: ``[local_tokens, C]``, this rank's rows.
        weight: ``[C, W]``; every rank returns its part of the gradient, the group's sum is the whole.
        bias: ``[C]``, likewise.
        layout: A contiguous layout.
        group: Process group or ``Communicator``; ``None`` at degree 1.

    Returns:
        ``[local_tokens, C]``; differentiable.

    Raises:
        InputError: Shapes or layout do not fit.
    """
    communicator = Communicator.of(group, layout.degree)
    me = communicator.group_rank
    if x.dim() != 2 or weight.dim() != 2 or weight.shape[0] != x.shape[1] or x.shape[0] != layout.local_tokens(me):
        raise InputError(
            f"x {list(x.shape)}, weight {list(weight.shape)} on group rank {me}; expected x "
            f"[{layout.local_tokens(me)}, C], the layout's local_tokens, and weight [C, W]."
        )
    width = weight.shape[1]
    if width < 1 or (bias is not None and bias.shape != weight.shape[:1]):
        raise InputError(
            f"weight {list(weight.shape)}, bias {None if bias is None else list(bias.shape)}; expected W of at least 1 and "
            f"bias [{weight.shape[0]}] or None."
        )
    if weight.dtype != x.dtype or weight.device != x.device:
        raise InputError(
            f"x is {x.dtype} on {x.device}, weight {weight.dtype} on {weight.device}; expected the same of both."
        )
    halo = _Halo.apply(x, width - 1, layout, communicator)
    rows = torch.cat([halo, x])
    positions = layout.memo(("positions", me, x.device), lambda: layout.positions(me).to(x.device))
    out = weight[:, width - 1] * x
    for distance in range(1, width):
        earlier = rows[width - 1 - distance : rows.shape[0] - distance]
        inside = (positions >= distance).unsqueeze(1)
        out = out + weight[:, width - 1 - distance] * torch.where(inside, earlier, 0)
    return out if bias is None else out + bias


@dataclass(frozen=True)
class _HaloRows:
    """Rows of one rank that lie in another's halo.

    Attributes:
        peer: The other rank.
        first: First row: of this rank's own where it gives, of its halo where it takes.
        stop: One past the last.
    """

    peer: int
    first: int
    stop: int


class _Halo(torch.autograd.Function):
    """The last ``size`` tokens before this rank's first, ``[size, C]``; rows outside its first document are zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, layout: SequenceLayout, group: Communicator) -> Tensor:
        gives, takes = layout.memo(("halo", size, group.group_rank), lambda: _halo_rows(layout, group.group_rank, size))
        ctx.gives, ctx.takes, ctx.group, ctx.num_rows = gives, takes, group, x.shape[0]
        halo = x.new_zeros(size, x.shape[1])
        sends = [Message(x[part.first : part.stop].contiguous(), part.peer) for part in gives]
        recvs = [Message(halo[part.first : part.stop], part.peer) for part in takes]
        exchange(sends, recvs, group).wait()
        return halo

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        gradient = gradient.contiguous()
        arrived = [gradient.new_empty(part.stop - part.first, gradient.shape[1]) for part in ctx.gives]
        sends = [Message(gradient[part.first : part.stop], part.peer) for part in ctx.takes]
        recvs = [Message(rows, part.peer) for part, rows in zip(ctx.gives, arrived, strict=True)]
        exchange(sends, recvs, ctx.group).wait()
        dx = gradient.new_zeros(ctx.num_rows, gradient.shape[1])
        for part, rows in zip(ctx.gives, arrived, strict=True):
            dx[part.first : part.stop] += rows
        return dx, None, None, None


def _halo_rows(layout: SequenceLayout, me: int, size: int) -> tuple[list[_HaloRows], list[_HaloRows]]:
    """What this rank gives to others' halos, and what it takes for its own."""
    stops = [0]
    for rank in range(layout.degree):
        stops.append(stops[-1] + layout.local_tokens(rank))
    gives: list[_HaloRows] = []
    takes: list[_HaloRows] = []
    for taker in range(layout.degree):
        pieces = local_pieces(layout, taker)
        if not pieces.takes:
            continue
        halo_first = stops[taker] - size
        document_first = stops[taker] - int(layout.positions(taker)[0])
        for giver in chain_of(layout, pieces.documents[0]):
            first, last = max(halo_first, document_first, stops[giver]), min(stops[taker], stops[giver + 1])
            if giver >= taker or first >= last:
                continue
            if giver == me:
                gives.append(_HaloRows(taker, first - stops[me], last - stops[me]))
            if taker == me:
                takes.append(_HaloRows(giver, first - halo_first, last - halo_first))
    return gives, takes
