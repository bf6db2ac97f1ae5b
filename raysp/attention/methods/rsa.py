"""Ring self-attention as its paper has it: two passes around the ring, with the scores of a rank's rows kept in between.

First the keys travel and every rank forms the scores of its own queries, then softmax runs over full rows, then the values
travel. The backward sends values and keys around once more; their gradients go straight home. Scores take
``T * S * Hq / N`` numbers on each rank, where the flash-based methods take none: this is the baseline that they are
measured against. Products are plain matrix products, whatever kernel was asked for.

Symbols: N degree, T rows of a rank, S keys, Hq, Hk heads.

Source: Sequence Parallelism (arXiv:2105.13120), section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from raysp.attention.blocks import NO_ROWS, Block, Rows
from raysp.attention.itinerary import least_itinerary
from raysp.attention.kernels.eager import visible_keys
from raysp.attention.merge import GradientSums, accumulation_dtype
from raysp.attention.methods.call import AttentionCall, Saved, all_rows
from raysp.attention.picked import pick_rows, return_rows_of_one
from raysp.comm import Lease, Message, exchange


@dataclass(frozen=True)
class RingSelfAttention:
    """See ``raysp.attention.methods.call.Method``."""

    def forward(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Saved]:
        """Keys around for the scores, softmax over full rows, values around for the output."""
        with call.lease(q) as lease:
            return self._forward(call, lease, q, k, v)

    def backward(self, call: AttentionCall, saved: Saved, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values around for the gradient of the scores, then keys around for that of the queries."""
        with call.lease(dout) as lease:
            return self._backward(call, lease, saved, dout)

    def _forward(self, call: AttentionCall, lease: Lease, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Saved]:
        dtype = accumulation_dtype(q.dtype)
        q_wide = q.to(dtype)
        out = torch.zeros(q.shape, dtype=dtype, device=q.device)
        scores: list[Tensor] = []
        lse = torch.full((q.shape[1], q.shape[0]), float("-inf"), dtype=dtype, device=q.device)
        for visit in _Journey(call, lease, k, with_return=False).visits():
            for piece in visit.pieces():
                found = _scores(q_wide, piece, call.scale)
                rows = lse[:, piece.rows]
                lse[:, piece.rows] = torch.logaddexp(rows, found.logsumexp(dim=-1))
                scores.append(found)
        weights = iter(scores)
        kept: list[Tensor] = []
        for visit in _Journey(call, lease, v, with_return=False).visits():
            for piece in visit.pieces():
                probabilities = torch.exp(next(weights) - lse[:, piece.rows].unsqueeze(-1))
                kept.append(probabilities)
                out[piece.rows] += torch.einsum("hqk,khd->qhd", probabilities, _repeated(piece.values, q.shape[1]))
        return out.to(q.dtype), (q, k, v, out.to(q.dtype), lse, *kept)

    def _backward(self, call: AttentionCall, lease: Lease, saved: Saved, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, _, *kept = saved
        dtype = accumulation_dtype(q.dtype)
        num_heads = q.shape[1]
        q_wide, dout_wide = q.to(dtype), dout.to(dtype)
        delta = (dout_wide * out.to(dtype)).sum(dim=-1).T
        dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
        weights, dscores = iter(kept), []
        values, keys = _Journey(call, lease, v, with_return=True), _Journey(call, lease, k, with_return=True)
        for visit in values.visits():
            for piece in visit.pieces():
                probabilities = next(weights)
                dprobabilities = torch.einsum("qhd,khd->hqk", dout_wide[piece.rows], _repeated(piece.values, num_heads))
                dscores.append(probabilities * (dprobabilities - delta[:, piece.rows].unsqueeze(-1)) * call.scale)
                dv = torch.einsum("hqk,qhd->khd", probabilities, dout_wide[piece.rows])
                visit.give(piece, dv)
        differences = iter(dscores)
        for visit in keys.visits():
            for piece in visit.pieces():
                difference = next(differences)
                dq[piece.rows] += torch.einsum("hqk,khd->qhd", difference, _repeated(piece.values, num_heads))
                dk = torch.einsum("hqk,qhd->khd", difference, q_wide[piece.rows])
                visit.give(piece, dk)
        return dq, keys.own.sums[0], values.own.sums[0]


@dataclass(frozen=True)
class _Piece:
    """One segment of a block: query rows, and keys or values ``[keys, Hk, D]`` in fp32 or fp64 with the mask."""

    rows: slice
    values: Tensor
    block: Block
    keys: slice


class _Visit:
    """Work of this rank with the rows that are here at one hop."""

    def __init__(self, lease: Lease, blocks: tuple[Block, ...], held: Rows, tensor: Tensor, sums: GradientSums) -> None:
        self._lease = lease
        self._blocks = blocks
        self._held = held
        self._tensor = tensor
        self.sums = sums
        self._gathered: list[Tensor] = []

    def pieces(self) -> Iterator[_Piece]:
        """Segments of all blocks; gradients that were given for a block are added when its last segment is done."""
        dtype = accumulation_dtype(self._tensor.dtype)
        for block in self._blocks:
            rows = self._tensor[block.keys.relative_to(self._held)]
            picked = (rows if block.pick is None else pick_rows(rows, block.pick, self._lease)).to(dtype)
            gathered = torch.zeros_like(picked)
            self._gathered = [gathered]
            for queries, keys in block.segments.pieces():
                start = block.queries.start
                yield _Piece(slice(start + queries.start, start + queries.stop), picked[keys], block, keys)
            gradient = gathered if block.pick is None else return_rows_of_one(gathered, block.pick, len(block.keys))
            self.sums.add(block.keys, (gradient,))

    def give(self, piece: _Piece, gradient: Tensor) -> None:
        """Add the gradient ``[keys, Hq, D]`` of a piece; query heads of one key head are summed."""
        self._gathered[0][piece.keys] += gradient.unflatten(1, (piece.values.shape[1], -1)).sum(dim=2)


class _Journey:
    """Keys or values on their way around the ring, read at every hop; gradients, if any, go straight home.

    Attributes:
        own: Gradient of the own rows, whole after the last visit.
    """

    def __init__(self, call: AttentionCall, lease: Lease, tensor: Tensor, *, with_return: bool) -> None:
        self._call = call
        self._lease = lease
        self._tensor = tensor
        self._with_return = with_return
        self._route = least_itinerary(call.schedule, side="keys", with_return=False)
        self.own = self._sums(all_rows(tensor))

    def visits(self) -> Iterator[_Visit]:
        """One visit for each hop, while the next rows travel."""
        call, route, me = self._call, self._route, self._call.group_rank
        held, tensor = all_rows(self._tensor), self._tensor.contiguous()
        before: GradientSums | None = None
        for hop in range(call.degree + self._with_return):
            sends: list[Message] = []
            recvs: list[Message] = []
            coming, buffer = NO_ROWS, tensor[:0]
            if hop + 1 < call.degree:
                leaving = route.outbound(route.owner(me, hop), hop + 1)
                coming = route.outbound(route.owner(me, hop + 1), hop + 1)
                # What is held is still read, and sent on.
                buffer = self._lease.empty(("held", hop % 2), (len(coming), *tensor.shape[1:]), tensor.dtype)
                index = leaving.relative_to(held) if len(leaving) else slice(0, 0)
                sends.append(Message(tensor[index], route.visitor(me, 1)))
                recvs.append(Message(buffer, route.owner(me, 1)))
            home, returned = NO_ROWS, tensor[:0]
            if self._with_return and hop >= 2 and before is not None:
                home = route.touched(me, hop - 1)
                returned = self._lease.empty("returned", (len(home), *tensor.shape[1:]), before.sums[0].dtype)
                sends.append(Message(before.sums[0].contiguous(), route.owner(me, hop - 1)))
                recvs.append(Message(returned, route.visitor(me, hop - 1)))
            pending = exchange(sends, recvs, call.group)
            if hop < call.degree:
                owner = route.owner(me, hop)
                blocks = call.own_blocks() if hop == 0 else route.blocks(owner, hop)
                before = self.own if hop == 0 else self._sums(route.touched(owner, hop))
                yield _Visit(self._lease, blocks, held, tensor, before)
            pending.wait()
            if len(home):
                self.own.add(home, (returned,), may_keep=False)
            held, tensor = coming, buffer

    def _sums(self, rows: Rows) -> GradientSums:
        # Always wide: the products are.
        return GradientSums(rows, self._tensor, 1, 3)


def _scores(q_wide: Tensor, piece: _Piece, scale: float) -> Tensor:
    """``[Hq, queries, keys]``, -inf where a key is not seen."""
    scores = torch.einsum("qhd,khd->hqk", q_wide[piece.rows], _repeated(piece.values, q_wide.shape[1])) * scale
    if piece.block.mask.is_full:
        return scores
    seen = visible_keys(scores.shape[1], scores.shape[2], piece.block.mask, scores.device)
    return scores.masked_fill(~seen, float("-inf"))


def _repeated(values: Tensor, num_heads: int) -> Tensor:
    """``[keys, Hk, D]`` with each key head repeated for its query heads."""
    return values.repeat_interleave(num_heads // values.shape[1], dim=1)
