"""TokenRing: keys stay, queries travel one way, results go straight back to their owner.

At every hop a rank sends the queries on, and the result of the hop before to whoever owns it, in one batch of both
directions. The backward rotates (q, dout, lse, delta) and returns dq; dk and dv stay where the keys are.

Source: TokenRing (arXiv:2412.20501). Its published code has no backward, no GQA and a wrong mask in one variant.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raysp.attention.itinerary import Itinerary, least_itinerary
from raysp.attention.merge import PartialResult, accumulation_dtype
from raysp.attention.methods.call import (
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


class TokenRing:
    """See ``raysp.attention.methods.call.Method``."""

    def forward(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Saved]:
        """Send queries around and gather their partial results."""
        route = least_itinerary(call.layout, side="queries", causal=call.causal, with_return=False)
        keys, own_rows = KeyRows(all_rows(k), k, v), all_rows(q)
        result = PartialResult(q.shape[0], q)
        held = _Held(own_rows, (q.contiguous(),))
        finished: tuple[Tensor, ...] = ()
        for hop in range(call.layout.degree + 1):
            move = _Move(call, route, hop)
            arriving = move.pass_on(held)
            returns = move.give_back(finished, _result_shapes(q))
            pending = exchange(move.sends, move.recvs, call.group)
            if hop < call.layout.degree:
                blocks, rows = _work(call, route, hop, own_rows)
                partial = result if hop == 0 else PartialResult(len(rows), q)
                attend_blocks(call, blocks, QueryRows(held.rows, held.tensors[0]), keys, partial, rows)
                finished = (partial.out.to(q.dtype), partial.lse.transpose(0, 1).contiguous())
            pending.wait()
            if returns.tensors and len(returns.rows):
                out, lse = returns.tensors
                result.add(returns.rows.index, out, lse.transpose(0, 1))
            held = arriving
        out = result.out.to(q.dtype)
        return out, (q, k, v, out, result.lse)

    def backward(self, call: AttentionCall, saved: Saved, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Send queries and their output gradients around and gather dq."""
        q, k, v, out, lse = saved
        route = least_itinerary(call.layout, side="queries", causal=call.causal, with_return=False)
        keys, own_rows = KeyRows(all_rows(k), k, v), all_rows(q)
        gradient = OutputGradient.of(dout, out, lse)
        dq, dkv = GradientSums(own_rows, q, 1), GradientSums(keys.held, k, 2)
        # lse and delta travel as one message, rows first so that a range of rows is contiguous.
        statistics = torch.stack((lse, gradient.delta), dim=-1).transpose(0, 1).contiguous()
        held = _Held(own_rows, (q.contiguous(), dout.contiguous(), statistics))
        finished: tuple[Tensor, ...] = ()
        for hop in range(call.layout.degree + 1):
            move = _Move(call, route, hop)
            arriving = move.pass_on(held)
            returns = move.give_back(finished, ((q.dtype, q.shape[1:]),))
            pending = exchange(move.sends, move.recvs, call.group)
            if hop < call.layout.degree:
                blocks, rows = _work(call, route, hop, own_rows)
                sums = dq if hop == 0 else GradientSums(rows, q, 1)
                visiting = gradient if hop == 0 else _visiting_gradient(held)
                queries = QueryRows(held.rows, held.tensors[0])
                differentiate_blocks(call, blocks, queries, visiting, keys, sums, dkv)
                finished = (sums.sums[0].to(q.dtype),)
            pending.wait()
            if returns.tensors and len(returns.rows):
                dq.add(returns.rows, returns.tensors)
            held = arriving
        return dq.sums[0], dkv.sums[0], dkv.sums[1]


@dataclass(frozen=True)
class _Held:
    """Rows of some owner and the tensors that hold them, rows first."""

    rows: Rows
    tensors: tuple[Tensor, ...]


class _Move:
    """Both directions of one hop: queries to the next rank, the last hop's results to their owner."""

    def __init__(self, call: AttentionCall, route: Itinerary, hop: int) -> None:
        self.sends: list[Message] = []
        self.recvs: list[Message] = []
        self._route = route
        self._hop = hop
        self._group_rank = call.group_rank
        self._degree = call.layout.degree

    def pass_on(self, held: _Held) -> _Held:
        """Post the held queries to the next rank; return what will be held after the exchange."""
        hop = self._hop
        if hop + 1 >= self._degree:
            return held
        leaving = self._route.outbound(self._route.owner(self._group_rank, hop), hop + 1)
        index = leaving.relative_to(held.rows) if len(leaving) else slice(0, 0)
        coming = self._route.outbound(self._route.owner(self._group_rank, hop + 1), hop + 1)
        buffers = tuple(tensor.new_empty((len(coming), *tensor.shape[1:])) for tensor in held.tensors)
        next_rank, previous_rank = self._route.visitor(self._group_rank, 1), self._route.owner(self._group_rank, 1)
        self.sends += [Message(tensor[index], next_rank) for tensor in held.tensors]
        self.recvs += [Message(buffer, previous_rank) for buffer in buffers]
        return _Held(coming, buffers)

    def give_back(self, finished: tuple[Tensor, ...], shapes: tuple[tuple[torch.dtype, torch.Size], ...]) -> _Held:
        """Post the results of the hop before to their owner; return the rows and buffers of our own results."""
        past = self._hop - 1
        if past < 1:
            return _Held(Rows(0, 0), ())
        owner, visitor = self._route.owner(self._group_rank, past), self._route.visitor(self._group_rank, past)
        self.sends += [Message(tensor, owner) for tensor in finished]
        rows = self._route.touched(self._group_rank, past)
        device = finished[0].device
        buffers = tuple(torch.empty((len(rows), *shape), dtype=dtype, device=device) for dtype, shape in shapes)
        self.recvs += [Message(buffer, visitor) for buffer in buffers]
        return _Held(rows, buffers)


def _work(call: AttentionCall, route: Itinerary, hop: int, own_rows: Rows) -> tuple[tuple[Block, ...], Rows]:
    """Blocks of this rank at this hop, and the query rows of the owner that they write."""
    if hop == 0:
        return pair_blocks(call.layout, call.group_rank, call.group_rank, causal=call.causal), own_rows
    owner = route.owner(call.group_rank, hop)
    return route.blocks(owner, hop), route.touched(owner, hop)


def _visiting_gradient(held: _Held) -> OutputGradient:
    _, dout, statistics = held.tensors
    lse, delta = statistics.transpose(0, 1).unbind(dim=-1)
    return OutputGradient(dout, lse.contiguous(), delta.contiguous(), None)


def _result_shapes(q: Tensor) -> tuple[tuple[torch.dtype, torch.Size], ...]:
    """Dtype and row shape of a returned result: the output in the input dtype, the LSE in the accumulator's."""
    return (q.dtype, q.shape[1:]), (accumulation_dtype(q.dtype), q.shape[1:2])
