"""Key rings: queries stay, keys and values travel around the group, one way or both ways at once.

The plain ring is one stream that carries all key heads. The bidirectional ring is two streams that carry half of
the key heads each, in opposite directions; a single key head is shared by key rows instead. In the backward the sums
dk, dv follow their keys through the ring, one hop behind, and the last visitor sends them home. Where that exchange is
slow, half of the work on a rank's own keys is kept for it, so that it is hidden like the others. Under a window keys are
done after few hops, and gradients go straight home from where they were made.

Source: ring attention (arXiv:2310.01889); zigzag order: llama 3 and ring-flash-attention's measurements.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from raysp.attention.blocks import Block, Rows
from raysp.attention.itinerary import Itinerary, least_itinerary
from raysp.attention.merge import ALL_HEADS, GradientSums, LeasedMemory, PartialResult, accumulation_dtype
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
from raysp.comm import Lease, Message, exchange


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
        hides_last_return: Keep half of the own work for the last exchange of the backward, at the price of one more
            kernel call.
    """

    bidirectional: bool
    hides_last_return: bool = True

    def forward(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Saved]:
        """Attend to the keys of each rank as they come by."""
        with call.lease(q) as lease:
            return self._forward(call, lease, q, k, v)

    def backward(self, call: AttentionCall, saved: Saved, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotate the keys again, and their gradients one hop behind."""
        with call.lease(dout) as lease:
            return self._backward(call, lease, saved, dout)

    def _forward(self, call: AttentionCall, lease: Lease, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Saved]:
        streams = self._streams(call, q.shape[1], k.shape[1], with_return=False)
        travellers = [_Traveller(call, lease, place, stream, k, v) for place, stream in enumerate(streams)]
        queries, result = QueryRows(all_rows(q), q), PartialResult(q.shape[0], q, call.most_partials)
        for hop in range(call.degree):
            sends: list[Message] = []
            recvs: list[Message] = []
            for traveller in travellers:
                traveller.move_keys(hop, sends, recvs)
            pending = exchange(sends, recvs, call.group)
            if hop == 0:
                attend_blocks(call, lease, call.own_blocks(), queries, KeyRows(all_rows(k), k, v), result, queries.held)
            else:
                for traveller in travellers:
                    attend_blocks(call, lease, traveller.blocks(hop), queries, traveller.keys, result, queries.held)
            pending.wait()
            for traveller in travellers:
                traveller.arrive()
        out, lse = result.finished()
        return out, (q, k, v, out, lse)

    def _backward(self, call: AttentionCall, lease: Lease, saved: Saved, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, lse = saved
        queries, gradient = QueryRows(all_rows(q), q), OutputGradient(dout, lse, out)
        num_terms = call.most_partials
        dq, own = GradientSums(queries.held, q, 1, num_terms), GradientSums(all_rows(k), k, 2, num_terms)
        own_keys = KeyRows(own.held, k, v)
        first, *last = head_groups(q.shape[1], k.shape[1], 2 if self.hides_last_return else 1)
        travellers = [
            _Traveller(call, lease, place, stream, k, v)
            for place, stream in enumerate(self._streams(call, q.shape[1], k.shape[1], with_return=True))
        ]
        # One more hop than ranks: the last brings the sums home.
        for hop in range(call.degree + 1):
            sends: list[Message] = []
            recvs: list[Message] = []
            for traveller in travellers:
                traveller.move_keys(hop, sends, recvs)
                traveller.move_sums(hop, sends, recvs)
            pending = exchange(sends, recvs, call.group)
            fresh: list[GradientSums] = []
            if 0 < hop < call.degree:
                for traveller in travellers:
                    sums = traveller.empty_sums(hop)
                    differentiate_blocks(
                        call, lease, traveller.blocks(hop), queries, gradient, traveller.keys, dq, sums
                    )
                    fresh.append(sums)
            else:
                for heads in [first] if hop == 0 else last:
                    keys = own_keys.of_heads(*heads)
                    differentiate_blocks(call, lease, call.own_blocks(), queries, gradient, keys, dq, own, heads[0])
            pending.wait()
            for traveller in travellers:
                traveller.arrive()
                if traveller.returned is not None and len(traveller.returned[0]):
                    own.add(*traveller.returned, traveller.stream.key_heads, may_keep=False)
            for traveller, sums in zip(travellers, fresh, strict=False):
                traveller.collect(sums)
        return dq.sums[0], own.sums[0], own.sums[1]

    def _streams(self, call: AttentionCall, num_heads: int, num_key_heads: int, *, with_return: bool) -> list[Stream]:
        schedule = call.schedule
        parts = range(len(schedule.key_layout.parts(0)))
        if not self.bidirectional and schedule.mask.window is None:
            return [Stream(least_itinerary(schedule, side="keys", with_return=with_return), ALL_HEADS, ALL_HEADS)]
        if not self.bidirectional:
            # A window wants a rank's first chunks at the next rank and its second chunks at the one before: each part
            # goes the way on which it is done after a few hops.
            return [
                Stream(least_itinerary(schedule, side="keys", with_return=False, key_part=part), ALL_HEADS, ALL_HEADS)
                for part in parts
            ]
        if num_key_heads == 1:
            # One head cannot be halved: first chunks go one way, second chunks the other, and whole documents, which
            # others need in cross attention only, with the first.
            return [
                Stream(Itinerary(schedule, direction, "keys", key_part=part), ALL_HEADS, ALL_HEADS)
                for part, direction in zip(parts, (1, -1, 1), strict=False)
            ]
        halves = head_groups(num_heads, num_key_heads, 2)
        return [
            Stream(Itinerary(schedule, direction, "keys"), *half)
            for direction, half in zip((1, -1), halves, strict=True)
        ]


class _Traveller:
    """What one rank holds of a stream: keys now and next, sums now and next."""

    def __init__(self, call: AttentionCall, lease: Lease, place: int, stream: Stream, k: Tensor, v: Tensor) -> None:
        self.stream = stream
        self._lease = lease
        self._place = place
        self.returned: tuple[Rows, list[Tensor]] | None = None
        self._route = stream.itinerary
        self._degree = call.degree
        self._group_rank = call.group_rank
        self._num_terms = call.most_partials - 1
        self._has_one_document = len(call.schedule.layout.lengths) == 1
        self._straight_home = call.schedule.mask.window is not None
        self._like = k[:, stream.key_heads]
        # A copy where only some heads travel: messages must be contiguous.
        kept = [lease.copy_of(("kept", place, index), x[:, stream.key_heads]) for index, x in enumerate((k, v))]
        self.keys = KeyRows(all_rows(k), kept[0], kept[1], stream.query_heads)
        self._next_keys: KeyRows | None = None
        self._sums: GradientSums | None = None
        self._incoming: tuple[Rows, list[Tensor]] | None = None

    def blocks(self, hop: int) -> tuple[Block, ...]:
        """Work with the keys that are here at this hop."""
        return self._route.blocks(self._owner(hop), hop)

    def empty_sums(self, hop: int) -> GradientSums:
        """Zero sums for what this hop gives back: with what was collected before, or only its own where that is home."""
        owner = self._owner(hop)
        rows = self._route.touched(owner, hop) if self._straight_home else self._route.collected(owner, hop)
        # Those of the hop before are on their way.
        memory = LeasedMemory(self._lease, "collected", self._place, hop % 2)
        return GradientSums(rows, self._like, 2, self._num_terms, memory)

    def move_keys(self, hop: int, sends: list[Message], recvs: list[Message]) -> None:
        """Post the keys of this hop to where they are needed next, and a buffer for those of the next hop."""
        if hop + 1 >= self._degree:
            return
        leaving = self._route.outbound(self._owner(hop), hop + 1)
        index = leaving.relative_to(self.keys.held) if len(leaving) else slice(0, 0)
        sends += [Message(tensor[index], self._next_rank) for tensor in (self.keys.k, self.keys.v)]
        coming = self._route.outbound(self._owner(hop + 1), hop + 1)
        # Those of this hop are still read, and sent on.
        buffers = self._buffers(("keys", hop % 2), coming, self._like.dtype)
        self._next_keys = KeyRows(coming, buffers[0], buffers[1], self.stream.query_heads)
        recvs += [Message(tensor, self._previous_rank) for tensor in buffers]

    def move_sums(self, hop: int, sends: list[Message], recvs: list[Message]) -> None:
        """Post the sums made at the hop before, and a buffer for those that the visitor before us made."""
        if hop < 2:
            return
        dtype = self._sum_dtype
        if self._sums is not None:
            target = self._owner(hop - 1) if self._straight_home else self._next_rank
            sends += [Message(tensor, target) for tensor in self._sums.to_send(dtype)]
        if self._straight_home:
            coming = self._route.touched(self._group_rank, hop - 1)
            source = self._route.visitor(self._group_rank, hop - 1)
        else:
            coming, source = self._route.collected(self._owner(hop), hop - 1), self._previous_rank
        incoming = coming, self._buffers(("sums",), coming, dtype)
        recvs += [Message(tensor, source) for tensor in incoming[1]]
        # At the last hop the sums that come around the ring are our own, back home.
        if self._straight_home or hop == self._degree:
            self.returned = incoming
        else:
            self._incoming = incoming

    def arrive(self) -> None:
        """The exchange is over: what was next is now here."""
        if self._next_keys is not None:
            self.keys, self._next_keys = self._next_keys, None

    def collect(self, sums: GradientSums) -> None:
        """Add what came with the ring to this hop's own gradients."""
        if self._incoming is not None and len(self._incoming[0]):
            sums.add(*self._incoming, may_keep=False)
        self._sums = sums

    @property
    def _sum_dtype(self) -> torch.dtype:
        """Of sums that travel: where a single kernel call made them, a wider one would say no more."""
        is_single = self._degree == 2 and self._has_one_document and not self._straight_home
        return self._like.dtype if is_single else accumulation_dtype(self._like.dtype)

    def _buffers(self, role: tuple[Hashable, ...], rows: Rows, dtype: torch.dtype) -> list[Tensor]:
        shape = (len(rows), *self._like.shape[1:])
        return [self._lease.empty((*role, self._place, index), shape, dtype) for index in range(2)]

    def _owner(self, hop: int) -> int:
        return self._route.owner(self._group_rank, hop)

    @property
    def _next_rank(self) -> int:
        return self._route.visitor(self._group_rank, 1)

    @property
    def _previous_rank(self) -> int:
        return self._route.owner(self._group_rank, 1)
