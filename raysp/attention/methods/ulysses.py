"""Ulysses: all-to-alls turn a shard of the tokens with all heads into all tokens with a share of the heads.

Attention is then local, or, where there are more ranks than heads, another method's work: groups of neighbouring ranks
trade heads, and ranks at the same place in their groups run the inner method on what their groups hold. With more ranks
than key heads, key heads are replicated: each rank gets the one that its query heads read, and the owner of the rows
sums the gradients of the copies.

Symbols: N degree, u ranks that trade heads, T local rows, S tokens of u ranks, Hq, Hk heads.

Sources: DeepSpeed Ulysses (arXiv:2309.14509); USP (arXiv:2405.07719) for the two dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from planner.attention_heads import heads_divide, trading_neighbours
from raysp.attention.layout import SequenceLayout
from raysp.attention.merge import accumulation_dtype
from raysp.attention.methods.call import AttentionCall, Method, Saved
from raysp.attention.methods.local import document_attention, document_gradients
from raysp.attention.schedule import schedule_of
from raysp.comm import Communicator, all_to_all_rows
from raysp.errors import InputError


class Ulysses:
    """One dimension: all ranks trade heads; see ``raysp.attention.methods.call.Method``."""

    def forward(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Saved]:
        """Trade tokens for heads, attend, trade back."""
        check_heads(call.degree, q.shape[1], k.shape[1])
        trade = _Trade(call.group, call.schedule.layout, call.schedule.key_layout, call.num_key_heads)
        all_heads = trade.to_heads(q, k, v)
        out, lse = document_attention(call, *all_heads)
        return trade.to_tokens(out), (*all_heads, out, lse)

    def backward(self, call: AttentionCall, saved: Saved, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same trades in reverse."""
        trade = _Trade(call.group, call.schedule.layout, call.schedule.key_layout, call.num_key_heads)
        return trade.gradients_to_tokens(*document_gradients(call, saved, trade.queries_to_heads(dout)), saved[0].dtype)


@dataclass(frozen=True)
class UlyssesRing:
    """Two dimensions: neighbours trade heads, the inner method runs across; see ``raysp.attention.methods.call.Method``.

    Where all ranks can share out the heads this is Ulysses, where no two can it is the inner method.

    Attributes:
        inner: The method across groups.
    """

    inner: Method

    def forward(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Saved]:
        """Trade tokens for heads among neighbours, attend across, trade back."""
        factor = neighbours_that_trade(call.degree, q.shape[1], k.shape[1])
        if factor in (1, call.degree):
            return self._one_dimension(call, factor).forward(call, q, k, v)
        trade, across = _two_dimensions(call, factor)
        out, saved = self.inner.forward(across, *trade.to_heads(q, k, v))
        return trade.to_tokens(out), saved

    def backward(self, call: AttentionCall, saved: Saved, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same trades in reverse."""
        factor = neighbours_that_trade(call.degree, dout.shape[1], call.num_key_heads)
        if factor in (1, call.degree):
            return self._one_dimension(call, factor).backward(call, saved, dout)
        trade, across = _two_dimensions(call, factor)
        gradients = self.inner.backward(across, saved, trade.queries_to_heads(dout))
        return trade.gradients_to_tokens(*gradients, dout.dtype)

    def _one_dimension(self, call: AttentionCall, factor: int) -> Method:
        return Ulysses() if factor == call.degree else self.inner


def neighbours_that_trade(degree: int, num_heads: int, num_key_heads: int) -> int:
    """The largest part of a group, up to all of it, whose ranks can share out the heads; 1 where not even two can."""
    if heads_divide(degree, num_heads, num_key_heads):
        return degree
    return trading_neighbours(degree, num_heads, num_key_heads) or 1


def check_heads(degree: int, num_heads: int, num_key_heads: int) -> None:
    """Refuse heads that cannot be shared out.

    Raises:
        InputError: Names heads and degree.
    """
    if num_heads % degree:
        raise InputError(
            f"ulysses cannot share {num_heads} query heads over a group of degree {degree}; expected a degree that "
            f"divides {num_heads}. Use another degree, or method 'ring', which runs any degree."
        )
    if not heads_divide(degree, num_heads, num_key_heads):
        raise InputError(
            f"ulysses cannot share {num_key_heads} key heads over a group of degree {degree}; expected one to divide "
            "the other. Use another degree, or method 'ring', which runs any degree."
        )


class _Trade:
    """All-to-alls among the ranks of one group, with the row order of their joint layout.

    Args:
        group: The ranks that trade.
        layout: Of the queries of these ranks; its degree may be larger: then ``first_rank`` is the group's first.
        key_layout: Of the keys.
        num_key_heads: Hk before the trade.
        first_rank: Rank of the layout that the group's first rank is.
        joint: Layouts whose rank ``joint_rank`` holds the rows of all ranks of the group; natural order by default.
        joint_rank: See ``joint``.
    """

    def __init__(
        self,
        group: Communicator,
        layout: SequenceLayout,
        key_layout: SequenceLayout,
        num_key_heads: int,
        first_rank: int = 0,
        joint: tuple[SequenceLayout, SequenceLayout] | None = None,
        joint_rank: int = 0,
    ) -> None:
        self._group = group
        self._num_key_heads = num_key_heads
        self._copies = max(1, group.degree // num_key_heads)
        self._queries = _RowOrder(layout, first_rank, group.degree, joint and joint[0], joint_rank)
        self._keys = _RowOrder(key_layout, first_rank, group.degree, joint and joint[1], joint_rank)

    def to_heads(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All tokens of a share of the heads; key heads are copied where there are too few."""
        k, v = (x if self._copies == 1 else x.repeat_interleave(self._copies, dim=1) for x in (k, v))
        q, k, v = self._traded_for_heads((q, self._queries), (k, self._keys), (v, self._keys))
        return q, k, v

    def queries_to_heads(self, q: Tensor) -> Tensor:
        """All tokens of a share of the query heads: ``[T, H, D]`` -> ``[S, H/u, D]``."""
        return self._traded_for_heads((q, self._queries))[0]

    def to_tokens(self, out: Tensor) -> Tensor:
        """The reverse for query rows: ``[S, H/u, D]`` -> ``[T, H, D]``."""
        return self._traded_for_tokens((out, self._queries))[0]

    def gradients_to_tokens(
        self, dq: Tensor, dk: Tensor, dv: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The reverse for all gradients, in ``dtype`` on the way; copies of key heads are summed in fp32 or fp64."""
        # Copies travel as their kernel gave them: rounding each would add up with their number.
        dk, dv = (x if self._copies > 1 else x.to(dtype) for x in (dk, dv))
        dq, dk, dv = self._traded_for_tokens((dq.to(dtype), self._queries), (dk, self._keys), (dv, self._keys))
        if self._copies > 1:
            wide = accumulation_dtype(dtype)
            dk, dv = (x.to(wide).unflatten(1, (self._num_key_heads, -1)).sum(dim=2) for x in (dk, dv))
        return dq, dk, dv

    def _traded_for_heads(self, *shards: tuple[Tensor, _RowOrder]) -> list[Tensor]:
        degree = self._group.degree
        with self._group.workspace.lease(shards[0][0].device) as lease:
            by_rank = []
            for index, (x, _) in enumerate(shards):
                parts = x.unflatten(1, (degree, -1)).transpose(0, 1)
                by_rank.append(lease.empty(("leaving", index), parts.shape, x.dtype).copy_(parts).flatten(0, 1))
            sent = [[x.shape[0]] * degree for x, _ in shards]
            joined = all_to_all_rows(by_rank, sent, [order.counts for _, order in shards], self._group, lease)
            return [x.index_select(0, order.on(x.device)[0]) for x, (_, order) in zip(joined, shards, strict=True)]

    def _traded_for_tokens(self, *shards: tuple[Tensor, _RowOrder]) -> list[Tensor]:
        degree = self._group.degree
        with self._group.workspace.lease(shards[0][0].device) as lease:
            by_rank = [
                torch.index_select(x, 0, order.on(x.device)[1], out=lease.empty(("leaving", index), x.shape, x.dtype))
                for index, (x, order) in enumerate(shards)
            ]
            mine = [order.counts[self._group.group_rank] for _, order in shards]
            received = [[rows] * degree for rows in mine]
            joined = all_to_all_rows(by_rank, [order.counts for _, order in shards], received, self._group, lease)
            return [_heads_of_ranks(x, degree, rows) for x, rows in zip(joined, mine, strict=True)]


def _heads_of_ranks(joined: Tensor, degree: int, num_rows: int) -> Tensor:
    """``[degree * rows, heads, D]``, rank by rank, as a new tensor ``[rows, degree * heads, D]``."""
    by_row = joined.new_empty((num_rows, degree, *joined.shape[1:]))
    return by_row.copy_(joined.unflatten(0, (degree, num_rows)).transpose(0, 1)).flatten(1, 2)


class _RowOrder:
    """Rows of some ranks joined rank by rank, against their order on the one rank of a joint layout."""

    def __init__(
        self, layout: SequenceLayout, first_rank: int, num_ranks: int, joint: SequenceLayout | None, joint_rank: int
    ) -> None:
        self.counts = [layout.local_tokens(first_rank + place) for place in range(num_ranks)]
        self._layout = layout
        self._first_rank = first_rank
        self._joint = joint
        self._joint_rank = joint_rank

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Joint order from rank by rank, and the inverse; int64 ``[S]`` each, made once for a layout."""
        key = ("row_order", self._first_rank, len(self.counts), self._joint, device)
        return self._layout.memo(key, lambda: self._build(device))

    def _build(self, device: torch.device) -> tuple[Tensor, Tensor]:
        ranks = range(self._first_rank, self._first_rank + len(self.counts))
        tokens = torch.cat([self._layout.token_indices(rank) for rank in ranks])
        to_natural = torch.argsort(tokens)
        if self._joint is None:
            return to_natural.to(device), tokens.to(device)
        place_in_joint = torch.argsort(self._joint.token_indices(self._joint_rank))
        # The n-th token in natural order lies at to_natural[n] here and at place_in_joint[n] there.
        forward = torch.empty_like(to_natural)
        forward[place_in_joint] = to_natural
        return forward.to(device), torch.argsort(forward).to(device)


def _two_dimensions(call: AttentionCall, factor: int) -> tuple[_Trade, AttentionCall]:
    """The trade of this rank's neighbours, and the inner call across their groups."""
    schedule, me = call.schedule, call.group_rank
    first_rank, place = me - me % factor, me % factor
    joint = schedule.layout.coarsened(factor), schedule.key_layout.coarsened(factor)
    trade = _Trade(
        call.group.subset(range(first_rank, first_rank + factor)),
        schedule.layout,
        schedule.key_layout,
        call.num_key_heads,
        first_rank,
        joint,
        me // factor,
    )
    across = AttentionCall(
        schedule=schedule_of(joint[0], schedule.mask, joint[1]),
        group=call.group.subset(range(place, call.degree, factor)),
        num_key_heads=max(1, call.num_key_heads // factor),
        kernel=call.kernel,
        scale=call.scale,
        deterministic=call.deterministic,
    )
    return trade, across
