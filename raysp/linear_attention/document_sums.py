"""Bidirectional linear attention: every token reads the sum of k v^T over its whole document.

    out_t = scale * (S_0 + sum over the document of k v^T)^T q_t

Only the additive rule without decay is the same from both ends; nothing else has a bidirectional form here. Documents on
several ranks exchange their partial sums once, forward and backward, whatever their length.

Source: LASP-2 (arXiv:2502.07563), section 3.2, with the sum over all ranks that its algorithm 3 should state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from raysp.attention.differentiable import differentiable_once
from raysp.attention.layout import SequenceLayout
from raysp.comm import Communicator, Message, exchange
from raysp.linear_attention.chains import LocalPieces, chain_of, local_pieces


class DocumentSums(torch.autograd.Function):
    """Output of the local rows and sums ``[P, H, K, V]`` of the local pieces' documents."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, initial: Tensor, scale: float, layout: SequenceLayout,
        group: Communicator,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """``initial`` is ``[P, H, K, V]``, zero but for pieces that begin their document."""
        pieces = local_pieces(layout, group.group_rank)
        dtype = initial.dtype
        sums = _whole(initial + _products(k, v, pieces, dtype), layout, group)
        out = _rows(q, sums, pieces) * scale
        ctx.save_for_backward(q, k, v, sums)
        ctx.scale, ctx.layout, ctx.group = scale, layout, group
        # What is returned may be changed in place.
        return out.to(v.dtype), sums.clone()

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, dout: Tensor, dsums: Tensor) -> tuple[Tensor | None, ...]:
        """The sums' gradient is a sum over the document's ranks like the sums themselves."""
        q, k, v, sums = ctx.saved_tensors
        pieces = local_pieces(ctx.layout, ctx.group.group_rank)
        with torch.autocast(q.device.type, enabled=False):
            dout = dout.to(sums.dtype) * ctx.scale
            part = _products(q, dout, pieces, sums.dtype) + dsums
            whole = _whole(part, ctx.layout, ctx.group)
            begins = torch.tensor(pieces.begins, dtype=torch.bool, device=q.device)
            return (
                _rows(dout, sums.mT, pieces).to(q.dtype),
                _rows(v, whole.mT, pieces).to(k.dtype),
                _rows(k, whole, pieces).to(v.dtype),
                whole * begins[:, None, None, None],
                None,
                None,
                None,
            )


def _products(left: Tensor, right: Tensor, pieces: LocalPieces, dtype: torch.dtype) -> Tensor:
    """Sum over each piece's rows of ``left right^T``: ``[P, H, K, V]``."""
    parts = zip(_split(left.to(dtype), pieces), _split(right.to(dtype), pieces), strict=True)
    products = [torch.einsum("thk,thv->hkv", a, b) for a, b in parts]
    return torch.stack(products) if products else left.new_zeros((0, *left.shape[1:], right.shape[2]), dtype=dtype)


def _rows(rows: Tensor, states: Tensor, pieces: LocalPieces) -> Tensor:
    """Each row times the state of its piece: ``[T, H, V]``."""
    parts = [
        torch.einsum("thk,hkv->thv", part, state)
        for part, state in zip(_split(rows.to(states.dtype), pieces), states, strict=True)
    ]
    return torch.cat(parts) if parts else rows.new_zeros((0, rows.shape[1], states.shape[3]), dtype=states.dtype)


def _split(rows: Tensor, pieces: LocalPieces) -> Sequence[Tensor]:
    return rows.split(list(pieces.lengths)) if pieces.lengths else ()


def _whole(parts: Tensor, layout: SequenceLayout, group: Communicator) -> Tensor:
    """Add what the other ranks of the first and the last piece's documents hold, in rank order on all of them."""
    pieces = local_pieces(layout, group.group_rank)
    sends: list[Message] = []
    recvs: list[Message] = []
    shared: list[tuple[int, list[Tensor]]] = []
    for place, document in enumerate(pieces.documents):
        chain = chain_of(layout, document)
        if len(chain) == 1:
            continue
        mine = parts[place].contiguous()
        terms = [mine if rank == group.group_rank else torch.empty_like(mine) for rank in chain]
        others = [(rank, term) for rank, term in zip(chain, terms, strict=True) if rank != group.group_rank]
        sends += [Message(mine, rank) for rank, _ in others]
        recvs += [Message(term, rank) for rank, term in others]
        shared.append((place, terms))
    exchange(sends, recvs, group).wait()
    whole = parts.clone()
    for place, terms in shared:
        whole[place] = torch.stack(terms).sum(dim=0)
    return whole
