"""What each method of linear attention over shards sends: messages, and `linear_method_bytes`, their exact sum.

Symbols as in `planner.linear_attention_work`; P state bytes, M transition bytes.

    lasp2     each rank of a chain to every later one: m(m-1)/2 P, and from those inside it (m-1)(m-2)/2 M
    lasp1     from rank to rank of a chain: (m-1) P; zeco the same in blocks of columns
    ulysses   q, k, v, decay, beta to heads and the output back: (N-1)/N of all rows where heads divide
    ring      k, v, decay, beta of every rank around the group, N-1 times

Backward, states are those of gradients and travel against the tokens, as many of them; Ulysses trades the output's
gradient and returns those of its inputs; the ring sends what states of gradients are made of: queries and output gradients,
under the delta rule the other rows too.

Initial and final states that a caller asks for are not counted: they are no part of the method.
"""

from __future__ import annotations

import numpy as np

from planner.attention_work import FloatArray
from planner.errors import PlanError
from planner.linear_attention_work import LinearAttentionWork

STATE_SCANS = ("lasp2", "lasp1", "zeco")
LINEAR_METHODS = (*STATE_SCANS, "ulysses")
# Compared with in benchmarks, never chosen.
LINEAR_BASELINES = ("ring",)


def linear_method_bytes(work: LinearAttentionWork, method: str, *, backward: bool) -> int:
    """Return the bytes that all ranks together send in one pass, to other ranks than themselves.

    Raises:
        PlanError: The method is unknown.
    """
    check_linear_method(method)
    if work.degree == 1:
        return 0
    if method == "lasp2":
        return round(float(gathered_messages(work, backward=backward).sum()))
    if method in STATE_SCANS:
        return sum(len(chain) - 1 for chain in work.chains) * work.shape.state_bytes
    if method == "ulysses":
        first, second = traded_messages(work, backward=backward)
        return round(float(first.sum() + second.sum()))
    return (work.degree - 1) * sum(work.lengths) * ring_row_bytes(work, backward=backward)


def check_linear_method(method: str) -> None:
    """Raise `PlanError` unless the method has a cost."""
    known = (*LINEAR_METHODS, *LINEAR_BASELINES)
    if method not in known:
        raise PlanError(f"linear attention method {method!r} is unknown; expected one of {', '.join(known)}.")


def head_shares(num_heads: int, degree: int) -> list[int]:
    """Return the heads that Ulysses gives each rank: dealt out one by one, so some ranks may have one less, or none."""
    return [len(range(rank, num_heads, degree)) for rank in range(degree)]


def gathered_messages(work: LinearAttentionWork, *, backward: bool) -> FloatArray:
    """Return the bytes of LASP-2's one exchange, ``[N, N]`` from the rank of the row to that of the column.

    Source:
        LASP-2 (arXiv:2502.07563), algorithms 2 and 4; packed documents keep each chain's exchange to its ranks.
    """
    shape = work.shape
    messages = np.zeros((work.degree, work.degree))
    for chain in work.chains:
        ordered = chain[::-1] if backward else chain
        for place, rank in enumerate(ordered[:-1]):
            parcel_bytes = shape.state_bytes + (shape.transition_bytes if place else 0)
            messages[rank, list(ordered[place + 1 :])] += parcel_bytes
    return messages


def traded_messages(work: LinearAttentionWork, *, backward: bool) -> tuple[FloatArray, FloatArray]:
    """Return the bytes of Ulysses' two exchanges, in the order of the pass, each ``[N, N]``.

    Source:
        DeepSpeed Ulysses (arXiv:2309.14509), with decay and beta as further rows.
    """
    shape = work.shape
    inputs = 2 * shape.key_bytes + shape.value_bytes + shape.decay_row_bytes + shape.beta_row_bytes
    shares = np.asarray(head_shares(shape.num_heads, work.degree))
    rows = work.tokens_by_rank[:, None] * shares[None, :] / shape.num_heads
    others = 1.0 - np.eye(work.degree)
    to_heads: FloatArray = rows * others
    to_tokens: FloatArray = rows.T * others
    if backward:
        return to_heads * shape.value_bytes, to_tokens * inputs
    return to_heads * inputs, to_tokens * shape.value_bytes


def ring_row_bytes(work: LinearAttentionWork, *, backward: bool) -> int:
    """Return the bytes of one token that go around the ring."""
    shape = work.shape
    gates = shape.decay_row_bytes + shape.beta_row_bytes
    if not backward:
        return shape.key_bytes + shape.value_bytes + gates
    rest = shape.key_bytes + shape.value_bytes if shape.rule == "delta" else 0
    return shape.key_bytes + shape.value_bytes + gates + rest
