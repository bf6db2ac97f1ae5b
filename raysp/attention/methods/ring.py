"""Key rings: queries stay, keys and values travel around the group, one way or both ways at once.

The plain ring is one stream that carries all key heads. The bidirectional ring is two streams that carry half of
the key heads each, in opposite directions; a single key head is shared by key rows instead. In the backward the sums
dk, dv follow their keys through the ring, one hop behind, and the last visitor sends them home.

Source: ring attention (arXiv:2310.01889); zigzag order: llama 3 and ring-flash-attention's measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raysp.attention.itinerary import Itinerary, least_itinerary
from raysp.attention.merge import PartialResult
from raysp.attention.methods.call import (
    ALL_HEADS,
    AttentionCall,
    GradientSums,
    KeyRows,
    OutputGradient,
    QueryRows,
    Saved,
    all_rows,
    attend_blocks,
    differentiate_blocks,
)
from raysp.attention.schedule import Block, Rows, pair_blocks
from raysp.comm import Message, exchange


@dataclass(frozen=True)
class Stream:
    """Key heads that travel together in one direction."""

    itinerary: Itinerary
    key_heads: slice
    query_heads: slice


@dataclass(frozen=True)
class KeyRing:
    """The plain and the bidirectional ring; see ``raysp.attention.methods.call.Method``.

    Attributes:
        bidirectional: Two streams in opposite directions instead of one.
    """

    bidirectional: bool

    def forward(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Saved]:
        """Attend to the keys of each rank as they come by."""
        streams = self._streams(call, q.shape[1], k.shape[1], with_return=False)
        travellers = [_Traveller(call, stream, k, v) for stream in streams]
        queries, result = QueryRows(all_rows(q), q), PartialResult(q.shape[0], q)
        for hop in range(call.layout.degree):
            sends: list[Message] = []
            recvs: list[Message] = []
            for traveller in travellers:
                traveller.move_keys(hop, sends, recvs)
            pending = exchange(sends, recvs, call.group)
            if hop == 0:
                own = pair_blocks(call.layout, call.group_rank, call.group_rank, causal=call.causal)
                attend_blocks(call, own, queries, KeyRows(all_rows(k), k, v), result, queries.held)
            else:
                for traveller in travellers:
                    attend_blocks(call, traveller.blocks(hop), queries, traveller.keys, result, queries.held)
            pending.wait()
            for traveller in travellers:
                traveller.arrive()
        out = result.out.to(q.dtype)
        return out, (q, k, v, out, result.lse)

    def backward(self, call: AttentionCall, saved: Saved, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotate the keys again, and their gradients one hop behind."""
        q, k, v, out, lse = saved
        queries, gradient = QueryRows(all_rows(q), q), OutputGradient.of(dout, out, lse)
        dq, own = GradientSums(queries.held, q, 1), GradientSums(all_rows(k), k, 2)
        blocks = pair_blocks(call.layout, call.group_rank, call.group_rank, causal=call.causal)
        travellers = [
            _Traveller(call, stream, k, v) for stream in self._streams(call, q.shape[1], k.shape[1], with_return=True)
        ]
        # One more hop than ranks: the last brings the sums home.
        for hop in range(call.layout.degree + 1):
            sends: list[Message] = []
            recvs: list[Message] = []
            for traveller in travellers:
                traveller.move_keys(hop, sends, recvs)
                traveller.move_sums(hop, sends, recvs)
            pending = exchange(sends, recvs, call.group)
            fresh: list[GradientSums] = []
            if hop == 0:
                differentiate_blocks(call, blocks, queries, gradient, KeyRows(all_rows(k), k, v), dq, own)
            elif hop < call.layout.degree:
                for traveller in travellers:
                    sums = traveller.empty_sums(hop)
                    differentiate_blocks(call, traveller.blocks(hop), queries, gradient, traveller.keys, dq, sums)
                    fresh.append(sums)
            pending.wait()
            for traveller in travellers:
                traveller.arrive()
            for traveller, sums in zip(travellers, fresh, strict=False):
                traveller.collect(sums)
        for traveller in travellers:
            if traveller.returned is not None:
                own.add(traveller.returned.held, traveller.returned.sums, traveller.stream.key_heads)
        return dq.sums[0], own.sums[0], own.sums[1]

    def _streams(self, call: AttentionCall, num_heads: int, num_key_heads: int, *, with_return: bool) -> list[Stream]:
        layout = call.layout
        if not self.bidirectional:
            itinerary = least_itinerary(layout, side="keys", causal=call.causal, with_return=with_return)
            return [Stream(itinerary, ALL_HEADS, ALL_HEADS)]
        if num_key_heads == 1:
            # One head cannot be halved: first chunks go one way, second chunks the other.
            num_parts = len(layout.parts(0))
            return [
                Stream(Itinerary(layout, direction, "keys", call.causal, key_part=part), ALL_HEADS, ALL_HEADS)
                for part, direction in zip(range(min(2, num_parts)), (1, -1), strict=False)
            ]
        group, half = num_heads // num_key_heads, num_key_heads // 2
        return [
            Stream(
                Itinerary(layout, direction, "keys", call.causal),
                slice(start, stop),
                slice(start * group, stop * group),
            )
            for direction, start, stop in ((1, 0, half), (-1, half, num_key_heads))
        ]


class _Traveller:
    """What one rank holds of a stream: keys now and next, sums now and next."""

    def __init__(self, call: AttentionCall, stream: Stream, k: Tensor, v: Tensor) -> None:
        self.stream = stream
        self.returned: GradientSums | None = None
        self._route = stream.itinerary
        self._degree = call.layout.degree
        self._group_rank = call.group_rank
        self._like = k[:, stream.key_heads]
        # A copy where only some heads travel: messages must be contiguous.
        kept = [x[:, stream.key_heads].contiguous() for x in (k, v)]
        self.keys = KeyRows(all_rows(k), kept[0], kept[1], stream.query_heads)
        self._next_keys: KeyRows | None = None
        self._sums: GradientSums | None = None
        self._incoming: GradientSums | None = None

    def blocks(self, hop: int) -> tuple[Block, ...]:
        """Work with the keys that are here at this hop."""
        return self._route.blocks(self._owner(hop), hop)

    def empty_sums(self, hop: int) -> GradientSums:
        """Zero sums for everything collected up to this hop."""
        return GradientSums(self._route.collected(self._owner(hop), hop), self._like, 2)

    def move_keys(self, hop: int, sends: list[Message], recvs: list[Message]) -> None:
        """Post the keys of this hop to where they are needed next, and a buffer for those of the next hop."""
        if hop + 1 >= self._degree:
            return
        leaving = self._route.outbound(self._owner(hop), hop + 1)
        index = leaving.relative_to(self.keys.held) if len(leaving) else slice(0, 0)
        sends += [Message(tensor[index], self._next_rank) for tensor in (self.keys.k, self.keys.v)]
        coming = self._route.outbound(self._owner(hop + 1), hop + 1)
        buffers = self._buffers(coming, self._like.dtype)
        self._next_keys = KeyRows(coming, buffers[0], buffers[1], self.stream.query_heads)
        recvs += [Message(tensor, self._previous_rank) for tensor in buffers]

    def move_sums(self, hop: int, sends: list[Message], recvs: list[Message]) -> None:
        """Post the sums made at the hop before, and a buffer for those that the visitor before us made."""
        if hop < 2:
            return
        if self._sums is not None:
            sends += [Message(tensor, self._next_rank) for tensor in self._sums.sums]
        # At the last hop the sums that come are our own, back home.
        coming = self._route.collected(self._owner(hop), hop - 1)
        self._incoming = GradientSums(coming, self._like, 2)
        recvs += [Message(tensor, self._previous_rank) for tensor in self._incoming.sums]
        if hop == self._degree:
            self.returned = self._incoming

    def arrive(self) -> None:
        """The exchange is over: what was next is now here."""
        if self._next_keys is not None:
            self.keys, self._next_keys = self._next_keys, None

    def collect(self, sums: GradientSums) -> None:
        """Add what came with the ring to this hop's own gradients."""
        if self._incoming is not None and len(self._incoming.held):
            sums.add(self._incoming.held, self._incoming.sums)
        self._sums = sums

    def _buffers(self, rows: Rows, dtype: torch.dtype) -> list[Tensor]:
        shape = (len(rows), *self._like.shape[1:])
        return [torch.empty(shape, dtype=dtype, device=self._like.device) for _ in range(2)]

    def _owner(self, hop: int) -> int:
        return self._route.owner(self._group_rank, hop)

    @property
    def _next_rank(self) -> int:
        return self._route.visitor(self._group_rank, 1)

    @property
    def _previous_rank(self) -> int:
        return self._route.owner(self._group_rank, 1)
