"""TokenRing: keys stay, queries travel one way, results go straight back to their owner.

At every hop a rank sends the queries on, and the result of the hop before to whoever owns it, in one batch of both
directions. The backward rotates (q, dout, lse, delta) and returns dq; dk and dv stay where the keys are. The last
exchange carries nothing but results: where it is slow, half of the work on a rank's own queries is kept for it.

Source: TokenRing (arXiv:2412.20501). Its published code has no backward, no GQA and a wrong mask in one variant.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raysp.attention.blocks import NO_ROWS, Rows
from raysp.attention.itinerary import Itinerary, least_itinerary
from raysp.attention.kernels.delta import output_delta
from raysp.attention.merge import GradientSums, LeasedMemory, PartialResult, accumulation_dtype
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
class TokenRing:
    """See ``raysp.attention.methods.call.Method``.

    Attributes:
        hides_last_return: Keep half of the own work for the last exchange, at the price of one more kernel call.
    """

    hides_last_return: bool = True

    def forward(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Saved]:
        """Send queries around and gather their partial results."""
        with call.lease(q) as lease:
            return self._forward(call, lease, q, k, v)

    def backward(self, call: AttentionCall, saved: Saved, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Send queries and their output gradients around and gather dq."""
        with call.lease(dout) as lease:
            return self._backward(call, lease, saved, dout)

    def _forward(self, call: AttentionCall, lease: Lease, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Saved]:
        route = least_itinerary(call.schedule, side="queries", with_return=False)
        keys, own = KeyRows(all_rows(k), k, v), QueryRows(all_rows(q), q)
        result = PartialResult(q.shape[0], q, call.most_partials)
        first, *last = head_groups(q.shape[1], k.shape[1], 2 if self.hides_last_return else 1)
        held = _Held(own.held, (lease.copy_of("kept", q),))
        finished: tuple[Tensor, ...] = ()
        for hop in range(call.degree + 1):
            move = _Move(call, lease, route, hop)
            arriving = move.pass_on(held)
            returns = move.give_back(finished, _result_shapes(q))
            pending = exchange(move.sends, move.recvs, call.group)
            if 0 < hop < call.degree:
                owner = route.owner(call.group_rank, hop)
                rows = route.touched(owner, hop)
                partial = PartialResult(len(rows), q, call.most_partials, LeasedMemory(lease, "partial", hop % 2))
                attend_blocks(
                    call, lease, route.blocks(owner, hop), QueryRows(held.rows, held.tensors[0]), keys, partial, rows
                )
                out, lse = partial.finished()
                finished = tuple(
                    lease.copy_of(("leaving", hop % 2, index), x) for index, x in enumerate((out, lse.transpose(0, 1)))
                )
            else:
                for heads in [first] if hop == 0 else last:
                    attend_blocks(call, lease, call.own_blocks(), own, keys.of_heads(*heads), result, own.held)
            pending.wait()
            if len(returns.rows):
                out, lse = returns.tensors
                result.add(returns.rows.index, out, lse.transpose(0, 1), may_keep=False)
            held = arriving
        out, lse = result.finished()
        return out, (q, k, v, out, lse)

    def _backward(self, call: AttentionCall, lease: Lease, saved: Saved, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, out, lse = saved
        route = least_itinerary(call.schedule, side="queries", with_return=False)
        keys, own = KeyRows(all_rows(k), k, v), QueryRows(all_rows(q), q)
        gradient = OutputGradient(dout, lse, out)
        num_terms = call.most_partials
        dq, dkv = GradientSums(own.held, q, 1, num_terms), GradientSums(keys.held, k, 2, num_terms)
        first, *last = head_groups(q.shape[1], k.shape[1], 2 if self.hides_last_return else 1)
        # lse and delta travel as one message, rows first so that a range of rows is contiguous.
        statistics = lease.empty("statistics", (*lse.T.shape, 2), lse.dtype)
        torch.stack((lse.T, output_delta(dout, out).T), dim=-1, out=statistics)
        held = _Held(own.held, (lease.copy_of("kept", q), dout.contiguous(), statistics))
        finished: tuple[Tensor, ...] = ()
        for hop in range(call.degree + 1):
            move = _Move(call, lease, route, hop)
            arriving = move.pass_on(held)
            returns = move.give_back(finished, ((q.dtype, q.shape[1:]),))
            pending = exchange(move.sends, move.recvs, call.group)
            if 0 < hop < call.degree:
                owner = route.owner(call.group_rank, hop)
                memory = LeasedMemory(lease, "partial", hop % 2)
                sums = GradientSums(route.touched(owner, hop), q, 1, num_terms, memory)
                queries, visiting = QueryRows(held.rows, held.tensors[0]), _visiting_gradient(held)
                differentiate_blocks(call, lease, route.blocks(owner, hop), queries, visiting, keys, sums, dkv)
                finished = tuple(sums.to_send(q.dtype))
            else:
                for heads in [first] if hop == 0 else last:
                    some = keys.of_heads(*heads)
                    differentiate_blocks(call, lease, call.own_blocks(), own, gradient, some, dq, dkv, heads[0])
            pending.wait()
            if len(returns.rows):
                dq.add(returns.rows, returns.tensors, may_keep=False)
            held = arriving
        return dq.sums[0], dkv.sums[0], dkv.sums[1]


@dataclass(frozen=True)
class _Held:
    """Rows of some owner and the tensors that hold them, rows first."""

    rows: Rows
    tensors: tuple[Tensor, ...]


class _Move:
    """Both directions of one hop: queries to the next rank, the last hop's results to their owner."""

    def __init__(self, call: AttentionCall, lease: Lease, route: Itinerary, hop: int) -> None:
        self.sends: list[Message] = []
        self.recvs: list[Message] = []
        self._lease = lease
        self._route = route
        self._hop = hop
        self._group_rank = call.group_rank
        self._degree = call.degree

    def pass_on(self, held: _Held) -> _Held:
        """Post the held queries to the next rank; return what will be held after the exchange."""
        hop = self._hop
        if hop + 1 >= self._degree:
            return held
        leaving = self._route.outbound(self._route.owner(self._group_rank, hop), hop + 1)
        index = leaving.relative_to(held.rows) if len(leaving) else slice(0, 0)
        coming = self._route.outbound(self._route.owner(self._group_rank, hop + 1), hop + 1)
        # What is held is still read, and sent on.
        buffers = tuple(
            self._lease.empty(("held", hop % 2, index), (len(coming), *tensor.shape[1:]), tensor.dtype)
            for index, tensor in enumerate(held.tensors)
        )
        next_rank, previous_rank = self._route.visitor(self._group_rank, 1), self._route.owner(self._group_rank, 1)
        self.sends += [Message(tensor[index], next_rank) for tensor in held.tensors]
        self.recvs += [Message(buffer, previous_rank) for buffer in buffers]
        return _Held(coming, buffers)

    def give_back(
        self,
        finished: tuple[Tensor, ...],
        shapes: tuple[tuple[torch.dtype, torch.Size], ...],
    ) -> _Held:
        """Post the results of the hop before to their owner; return the rows and buffers of our own results."""
        past = self._hop - 1
        if past < 1:
            return _Held(NO_ROWS, ())
        owner, visitor = self._route.owner(self._group_rank, past), self._route.visitor(self._group_rank, past)
        self.sends += [Message(tensor, owner) for tensor in finished]
        rows = self._route.touched(self._group_rank, past)
        buffers = tuple(
            self._lease.empty(("returned", index), (len(rows), *shape), dtype)
            for index, (dtype, shape) in enumerate(shapes)
        )
        self.recvs += [Message(buffer, visitor) for buffer in buffers]
        return _Held(rows, buffers)


def _visiting_gradient(held: _Held) -> OutputGradient:
    _, dout, statistics = held.tensors
    lse, delta = statistics.transpose(0, 1).unbind(dim=-1)
    return OutputGradient(dout, lse.contiguous(), None, delta.contiguous())


def _result_shapes(q: Tensor) -> tuple[tuple[torch.dtype, torch.Size], ...]:
    """Dtype and row shape of a returned result: the output in the input dtype, the LSE in the accumulator's."""
    return (q.dtype, q.shape[1:]), (accumulation_dtype(q.dtype), q.shape[1:2])
