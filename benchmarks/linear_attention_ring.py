"""The baseline of linear attention over shards: what ring attention does, send the rows around instead of their state.

Every rank passes the keys and values of all ranks on around the ring, N - 1 hops, and computes the states of the ranks before
it by itself; backward the queries and output gradients go round. Exact for one document over all ranks, like
``lasp2``, at a cost that grows with the length: the "Ring Attention" that LASP-2 (arXiv:2502.07563) compares itself with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from raysp.attention.merge import accumulation_dtype
from raysp.comm import Communicator, Message, exchange
from raysp.linear_attention.operator import LocalInputs, LocalOperator
from raysp.linear_attention.rates import MakeOperator
from raysp.linear_attention.scans import applied

Rows = Sequence[Tensor | None]


class RingLinearAttention(torch.autograd.Function):
    """One document, equal shares: ``apply(q, k, v, log_decay, beta, rule, scale, group, make)`` -> output."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, rule: str, scale: float,
        group: Communicator, make: MakeOperator,
    ) -> Tensor:  # fmt: skip
        """Chain the states of earlier ranks, nearest first, as their rows arrive."""
        rows = [q, k, v, log_decay, beta]
        mine = _operator(rows, rule, scale, make)
        state = _state_like(q, v)
        factor: Tensor | None = None
        # Queries stay at home forward; keys, values and gates travel.
        for source, arrived in _around([None, *rows[1:]], group, step=1):
            if source > group.group_rank:
                continue
            reached, transition = _operator([q, *arrived[1:]], rule, scale, make).outgoing(None, with_transition=True)
            state = state + (reached if factor is None else applied(factor, reached, transposed=False))
            factor = _product(factor, transition)
        out, _ = mine.output(state.unsqueeze(0))
        ctx.save_for_backward(q, k, v, log_decay, beta, state)
        ctx.rest = (rule, scale, group, make)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        """Chain the state gradients of later ranks, nearest first, from their rows."""
        *rows, state = ctx.saved_tensors
        rule, scale, group, make = ctx.rest
        needed = rows if rule == "delta" else [rows[0], None, None, rows[3], None]
        gradient = torch.zeros_like(state)
        factor: Tensor | None = None
        for source, (*arrived, arrived_dout) in _around([*needed, dout.contiguous()], group, step=-1):
            if source < group.group_rank:
                continue
            whole = [theirs if theirs is not None else ours for theirs, ours in zip(arrived, rows, strict=True)]
            operator = _operator(whole, rule, scale, make)
            reached = operator.incoming_gradient(arrived_dout, None)
            _, transition = operator.outgoing(None, with_transition=True)
            gradient = gradient + (reached if factor is None else applied(factor, reached, transposed=True))
            factor = _product(transition, factor)
        gradients = _operator(rows, rule, scale, make).gradients(state.unsqueeze(0), dout, gradient.unsqueeze(0))
        return gradients.q, gradients.k, gradients.v, gradients.log_decay, gradients.beta, None, None, None, None


def _operator(rows: Sequence[Any], rule: str, scale: float, make: MakeOperator) -> LocalOperator:
    q, k, v, log_decay, beta = rows
    return make(LocalInputs(q, k, v, log_decay, beta, rule, scale, (q.shape[0],)))


def _state_like(q: Tensor, v: Tensor) -> Tensor:
    return q.new_zeros(q.shape[1], q.shape[2], v.shape[2], dtype=accumulation_dtype(q.dtype))


def _product(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left * right if left.dim() == 2 else left @ right


def _around(rows: Rows, group: Communicator, *, step: int) -> Any:
    """Pass rows on ``N - 1`` times; yields the rank they are of, and them."""
    target, source = ((group.group_rank + turn) % group.degree for turn in (step, -step))
    here = [None if tensor is None else tensor.contiguous() for tensor in rows]
    for hop in range(1, group.degree):
        there = [None if tensor is None else torch.empty_like(tensor) for tensor in here]
        sends = [Message(tensor, target) for tensor in here if tensor is not None]
        recvs = [Message(tensor, source) for tensor in there if tensor is not None]
        exchange(sends, recvs, group).wait()
        here = there
        yield (group.group_rank - step * hop) % group.degree, here
