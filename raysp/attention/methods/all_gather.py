"""All-gather: every rank gathers the keys that its queries see, and then works alone; gradients go back to the owners.

The keys of all ranks are at hand at once, so a document's keys are read in natural order and a rank's whole work is one
kernel call, which ends in the diagonal like plain causal attention: nothing is merged. Documents that a rank holds whole
are a call of their own where they are much of its work: forward while the first keys travel, backward while the last
gradients do. Key heads are gathered in groups: while one group is computed the next one travels, and in the backward the
gradients of the last one go home. Only rows that the receiver needs are sent. Gradients go home in fp32 or fp64 and are
summed there in rank order.

Source: the context parallelism of Llama 3 (arXiv:2407.21783, section 3.3.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from raysp.attention.blocks import Block, Rows
from raysp.attention.merge import GradientSums, PartialResult, accumulation_dtype
from raysp.attention.methods.call import (
    AttentionCall,
    KeyRows,
    OutputGradient,
    QueryRows,
    Saved,
    all_rows,
    attend_blocks,
    differentiate_blocks,
    head_groups,
)
from raysp.attention.picked import pick_rows_of_two
from raysp.attention.schedule import GatheredRows
from raysp.comm import Lease, Message, PendingExchange, exchange, other_ranks

DEFAULT_HEAD_GROUPS = 1


@dataclass(frozen=True)
class AllGather:
    """See ``raysp.attention.methods.call.Method``.

    Attributes:
        num_head_groups: Groups of key heads that travel one after the other; at most as many as key heads.
        whole_apart: Whole documents may be a call of their own.
    """

    num_head_groups: int = DEFAULT_HEAD_GROUPS
    whole_apart: bool = True

    def forward(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Saved]:
        """Gather the next group of key heads while this one is computed."""
        with call.lease(q) as lease:
            return self._forward(call, lease, q, k, v)

    def backward(self, call: AttentionCall, saved: Saved, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gather again; the gradients of a group go home while the next one is computed."""
        with call.lease(dout) as lease:
            return self._backward(call, lease, saved, dout)

    def _forward(self, call: AttentionCall, lease: Lease, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Saved]:
        groups = head_groups(q.shape[1], k.shape[1], self.num_head_groups)
        gathered = call.schedule.gathered(call.group_rank, apart=self.whole_apart)
        queries = QueryRows(all_rows(q), q)
        result = PartialResult(q.shape[0], q, 2, exactly_one=gathered.cover(q.shape[0]))
        coming = _Gather(call, lease, gathered, k, v, groups, 0)
        attend_blocks(call, lease, gathered.apart, queries, KeyRows(all_rows(k), k, v), result, queries.held)
        for place in range(len(groups)):
            here = coming
            if place + 1 < len(groups):
                coming = _Gather(call, lease, gathered, k, v, groups, place + 1)
            attend_blocks(call, lease, gathered.blocks, queries, here.keys(), result, queries.held)
        out, lse = result.finished()
        return out, (q, k, v, out, lse)

    def _backward(self, call: AttentionCall, lease: Lease, saved: Saved, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, lse = saved
        groups = head_groups(q.shape[1], k.shape[1], self.num_head_groups)
        gathered = call.schedule.gathered(call.group_rank, apart=self.whole_apart)
        queries, gradient = QueryRows(all_rows(q), q), OutputGradient(dout, lse, out)
        dq = GradientSums(queries.held, q, 1, 2, exactly_one=gathered.cover(q.shape[0]))
        parts: list[list[Tensor]] = []
        returning: _Return | None = None
        coming = _Gather(call, lease, gathered, k, v, groups, 0)
        for place in range(len(groups)):
            here = coming
            if place + 1 < len(groups):
                coming = _Gather(call, lease, gathered, k, v, groups, place + 1)
            keys = here.keys()
            sums = GradientSums(keys.held, keys.own[0], 2, 2)
            differentiate_blocks(call, lease, gathered.blocks, queries, gradient, keys, dq, sums)
            if returning is not None:
                parts.append(returning.summed())
            returning = _Return(call, lease, gathered, sums.sums)
        whole = GradientSums(Rows(len(gathered.from_rank[call.group_rank]), k.shape[0]), k, 2, 1)
        differentiate_blocks(call, lease, gathered.apart, queries, gradient, KeyRows(all_rows(k), k, v), dq, whole)
        if returning is not None:
            parts.append(returning.summed())
        dk, dv = (torch.cat(tensors, dim=1) if len(parts) > 1 else tensors[0] for tensors in zip(*parts, strict=True))
        if gathered.apart:
            dk, dv = (torch.cat([x.to(k.dtype) for x in both]) for both in zip((dk, dv), whole.sums, strict=True))
        return dq.sums[0], dk, dv


class _Gather:
    """One group of key heads on its way: own rows stay where they are, each other rank sends what is needed of its own."""

    def __init__(
        self, call: AttentionCall, lease: Lease, gathered: GatheredRows, k: Tensor, v: Tensor,
        groups: Sequence[tuple[slice, slice]], place: int,
    ) -> None:  # fmt: skip
        key_heads, self._query_heads = groups[place]
        rows = gathered.from_rank[call.group_rank].index
        self._own = k[rows, key_heads], v[rows, key_heads]
        num_others = gathered.offsets[-1] - self._own[0].shape[0]
        shape = (num_others, *self._own[0].shape[1:])
        # The group before is still computed.
        first, second = (lease.empty(("others", place % 2, index), shape, k.dtype) for index in range(2))
        self._others = first, second
        sends: list[Message] = []
        recvs: list[Message] = []
        for peer in other_ranks(call.group):
            leaving = call.schedule.gathered(peer).from_rank[call.group_rank]
            sends += [
                Message(lease.copy_of(("leaving", place % 2, peer, index), x[leaving.index]), peer)
                for index, x in enumerate(self._own)
            ]
            start = gathered.offsets[peer] - self._own[0].shape[0]
            coming = slice(start, start + len(gathered.from_rank[peer]))
            recvs += [Message(x[coming], peer) for x in self._others]
        self._pending: PendingExchange = exchange(sends, recvs, call.group)

    def keys(self) -> _GatheredKeys:
        """All gathered rows, once they are here."""
        self._pending.wait()
        return _GatheredKeys(self._own, self._others, self._query_heads)


@dataclass(frozen=True)
class _GatheredKeys:
    """Keys and values of own rows and of the others' rows behind them; see ``raysp.attention.methods.call.ReadableKeys``."""

    own: tuple[Tensor, Tensor]
    others: tuple[Tensor, Tensor]
    query_heads: slice

    @property
    def held(self) -> Rows:
        """All of them."""
        return Rows(0, self.own[0].shape[0] + self.others[0].shape[0])

    def read(self, block: Block, lease: Lease) -> tuple[Tensor, Tensor]:
        """Keys and values of a block, in its order; until the next read."""
        if block.pick is not None:
            return pick_rows_of_two(self.own, self.others, block.pick, lease)
        if block.keys.stop <= self.own[0].shape[0]:
            return self.own[0][block.keys.index], self.own[1][block.keys.index]
        k, v = (torch.cat(both)[block.keys.index] for both in zip(self.own, self.others, strict=True))
        return k, v


class _Return:
    """Gradients of one group of key heads on their way home."""

    def __init__(self, call: AttentionCall, lease: Lease, gathered: GatheredRows, sums: list[Tensor]) -> None:
        self._call = call
        self._own = [x[_place(gathered.offsets, gathered.from_rank, call.group_rank).index] for x in sums]
        wide = accumulation_dtype(sums[0].dtype)
        sums = [lease.copy_of(("widened", index), x, wide) for index, x in enumerate(sums)]
        sends: list[Message] = []
        recvs: list[Message] = []
        self._received: dict[int, tuple[Rows, list[Tensor]]] = {}
        for peer in other_ranks(call.group):
            rows = _place(gathered.offsets, gathered.from_rank, peer)
            sends += [Message(x[rows.index], peer) for x in sums]
            home = call.schedule.gathered(peer).from_rank[call.group_rank]
            buffers = [
                lease.empty(("home", peer, index), (len(home), *x.shape[1:]), wide) for index, x in enumerate(sums)
            ]
            recvs += [Message(x, peer) for x in buffers]
            self._received[peer] = home, buffers
        self._pending = exchange(sends, recvs, call.group)

    def summed(self) -> list[Tensor]:
        """dk and dv of the own rows, summed in rank order."""
        self._pending.wait()
        degree, me = self._call.degree, self._call.group_rank
        if degree == 2:
            home, buffers = self._received[1 - me]
            for total, part in zip(self._own, buffers, strict=True):
                total[home.index] += part
            return self._own
        totals = [torch.zeros(x.shape, dtype=accumulation_dtype(x.dtype), device=x.device) for x in self._own]
        for rank in range(degree):
            home, parts = (Rows(0, totals[0].shape[0]), self._own) if rank == me else self._received[rank]
            for total, part in zip(totals, parts, strict=True):
                total[home.index] += part
        return totals


def _place(offsets: tuple[int, ...], from_rank: tuple[Rows, ...], rank: int) -> Rows:
    """Rows of the buffer that hold what came from a rank."""
    return Rows(offsets[rank], offsets[rank] + len(from_rank[rank]))
