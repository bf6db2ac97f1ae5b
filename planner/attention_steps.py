"""What each method of parallel attention computes and sends, step by step, forward and backward.

A step is what happens at the same time: kernels and copies of every rank, and the messages between them. The steps
follow the executors; how long their messages take is the network's matter.

Symbols: N degree, Hq, Hk heads, D head size, u neighbours that trade heads in ``ulysses_ring``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from planner.attention_rates import KernelRate
from planner.attention_shards import FIRST_CHUNKS, SECOND_CHUNKS, KernelWork, Route, Shards
from planner.attention_work import AttentionWork, FloatArray, IntArray

HEAD_GROUPS = 1
# Sums over ranks, the log-sum-exp and delta are fp32, or as wide as the inputs where those are wider.
SUM_BYTES = 4
# Read the sum, read the new part, write the sum.
MERGE_PASSES = 3
# Read the one, write the other.
PERMUTE_PASSES = 2


@dataclass(frozen=True)
class Step:
    """What happens at the same time.

    Attributes:
        compute_s: ``[N]``, kernels and copies of each rank.
        messages: ``[N, N]``, bytes from the rank of the row to the rank of the column.
    """

    compute_s: FloatArray
    messages: FloatArray


@dataclass(frozen=True)
class _Stream:
    """Key heads that go around the ring together."""

    route: Route
    num_key_heads: int
    num_heads: int
    part: int | None = None


@dataclass(frozen=True)
class AttentionPass:
    """The forward or the backward of one call on shards.

    Attributes:
        shards: Who holds what.
        num_heads: Hq.
        num_key_heads: Hk.
        head_size: D.
        element_bytes: Of one number of q, k, v.
        rate: Of every rank.
        backward: Which of the two.
        hides_last_return: Half of the work on own rows is kept for the last exchange of a ring, which hides it.
        head_groups: Groups of key heads that an all-gather moves one after the other.
    """

    shards: Shards
    num_heads: int
    num_key_heads: int
    head_size: int
    element_bytes: int
    rate: KernelRate
    backward: bool
    hides_last_return: bool
    head_groups: int = HEAD_GROUPS

    @property
    def degree(self) -> int:
        """Ranks, each with a shard."""
        return self.shards.degree

    @property
    def wide_bytes(self) -> int:
        """Bytes of one number of a sum."""
        return max(SUM_BYTES, self.element_bytes)

    def idle(self) -> FloatArray:
        """No seconds, for each rank."""
        return np.zeros(self.degree)

    def silence(self) -> FloatArray:
        """No messages."""
        return np.zeros((self.degree, self.degree))

    def kernel_s(self, work: KernelWork, num_heads: int) -> FloatArray:
        """Return the seconds of kernel calls on `num_heads` query heads."""
        pair_s = self.rate.pair_s(self.head_size, backward=self.backward)
        return work.num_calls * self.rate.launch_s + work.padded_pairs * (num_heads * pair_s)

    def merge_s(self, rows: FloatArray, num_heads: int) -> FloatArray:
        """Return the seconds of adding rows of `num_heads` heads to a sum."""
        # With two ranks a row is merged once, and kept in the element type.
        number_bytes = self.element_bytes if self.degree == 2 else self.wide_bytes
        return self.rate.copy_s(MERGE_PASSES * rows * (num_heads * self.head_size * number_bytes))

    def row_bytes(self, num_heads: int) -> int:
        """Bytes of a row of one tensor of `num_heads` heads."""
        return num_heads * self.head_size * self.element_bytes


def head_groups(num_heads: int, num_key_heads: int, num_groups: int) -> list[tuple[int, int]]:
    """Cut the key heads into nearly equal runs; return the key heads and the query heads of each."""
    num_groups = min(num_groups, num_key_heads)
    bounds = [num_key_heads * index // num_groups for index in range(num_groups + 1)]
    per_key = num_heads // num_key_heads
    return [(stop - start, (stop - start) * per_key) for start, stop in itertools.pairwise(bounds)]


def heads_divide(degree: int, num_heads: int, num_key_heads: int) -> bool:
    """Say whether each rank can have an equal share of the heads."""
    return num_heads % degree == 0 and (num_key_heads % degree == 0 or degree % num_key_heads == 0)


def trading_neighbours(degree: int, num_heads: int, num_key_heads: int) -> int | None:
    """Return u, the largest part of a group, smaller than itself, whose ranks can share out the heads; `None`: no."""
    for factor in range(degree - 1, 1, -1):
        if degree % factor == 0 and heads_divide(factor, num_heads, num_key_heads):
            return factor
    return None


def local_steps(call: AttentionPass) -> list[Step]:
    """Steps of a group of one."""
    own = KernelWork(np.array([call.shards.documents]), np.ones(1))
    return [Step(call.kernel_s(own, call.num_heads), call.silence())]


def ring_steps(call: AttentionPass) -> list[Step]:
    """Steps of the ring; with a window first and second chunks each go the way on which they are done sooner."""
    keys, heads = call.shards.keys, (call.num_key_heads, call.num_heads)
    if call.shards.window is None:
        return _key_ring_steps(call, [_Stream(keys.least_route(with_return=call.backward), *heads)])
    parts = (FIRST_CHUNKS, SECOND_CHUNKS)
    return _key_ring_steps(
        call, [_Stream(keys.of_part(part).least_route(with_return=False), *heads, part) for part in parts]
    )


def bidirectional_ring_steps(call: AttentionPass) -> list[Step]:
    """Steps of the ring with half of the key heads each way; a single one is halved by chunks."""
    keys = call.shards.keys
    if call.num_key_heads == 1:
        ways = ((FIRST_CHUNKS, 1), (SECOND_CHUNKS, -1))
        return _key_ring_steps(
            call, [_Stream(keys.of_part(part).route(direction), 1, call.num_heads, part) for part, direction in ways]
        )
    halves = head_groups(call.num_heads, call.num_key_heads, 2)
    return _key_ring_steps(
        call, [_Stream(keys.route(direction), *half) for direction, half in zip((1, -1), halves, strict=True)]
    )


def token_ring_steps(call: AttentionPass) -> list[Step]:
    """Steps of TokenRing: queries go around, results straight back."""
    degree, owners = call.degree, np.arange(call.degree)
    route = call.shards.queries.least_route(with_return=False)
    row, statistic = call.row_bytes(call.num_heads), call.num_heads * call.wide_bytes
    # Forward: q out, (out, lse) back. Backward: (q, dout, lse, delta) out, dq back.
    out_bytes, back_bytes = (2 * row + 2 * statistic, row) if call.backward else (row, row + statistic)
    hop_s = call.kernel_s(call.shards.pairs(), call.num_heads)
    key_sums_s = call.merge_s(2 * call.shards.keys.needed.T, call.num_key_heads)
    steps = []
    for hop in range(degree + 1):
        messages, compute_s = call.silence(), _own_work_s(call, hop, last_exchange=True)
        visitors = route.visitors(hop)
        if hop + 1 < degree:
            _send(messages, visitors, route.visitors(hop + 1), route.outbound[:, hop + 1] * out_bytes)
        if hop >= 2:
            _send(messages, route.visitors(hop - 1), owners, route.touched[:, hop - 1] * back_bytes)
            compute_s += call.merge_s(route.touched[:, hop - 1], call.num_heads)
        if 0 < hop < degree:
            compute_s[visitors] += hop_s[owners, visitors]
            if call.backward:
                compute_s[visitors] += key_sums_s[owners, visitors]
        steps.append(Step(compute_s, messages))
    return steps


def all_gather_steps(call: AttentionPass) -> list[Step]:
    """Steps of gathering keys by groups of heads; in the backward their gradients go home one group later."""
    groups = head_groups(call.num_heads, call.num_key_heads, call.head_groups)
    needed = call.shards.keys.needed
    # Keys and values are picked in the order of the call; in the backward their gradients are put back.
    rows = PERMUTE_PASSES * (needed.sum(axis=0) + call.shards.key_rows)
    picked_s = [
        call.rate.copy_s(2 * rows * call.row_bytes(key_heads) * (2 if call.backward else 1)) for key_heads, _ in groups
    ]
    gathers = [needed * (2 * call.row_bytes(key_heads)) for key_heads, _ in groups]
    work = call.shards.gathered()
    gathers_then_silence = [*gathers[1:], call.silence()]
    steps = [Step(call.idle(), gathers[0])]
    if not call.backward:
        kernels = (call.kernel_s(work, heads) + picked for (_, heads), picked in zip(groups, picked_s, strict=True))
        return steps + [Step(*both) for both in zip(kernels, gathers_then_silence, strict=True)]
    widening = call.wide_bytes / call.element_bytes
    returned_s = [call.merge_s(2 * needed.sum(axis=1), key_heads) for key_heads, _ in groups]
    for index, (_, heads) in enumerate(groups):
        compute_s, messages = call.kernel_s(work, heads) + picked_s[index], gathers_then_silence[index]
        if index:
            compute_s, messages = compute_s + returned_s[index - 1], messages + gathers[index - 1].T * widening
        steps.append(Step(compute_s, messages))
    return [*steps, Step(call.idle(), gathers[-1].T * widening), Step(returned_s[-1], call.silence())]


def ulysses_steps(call: AttentionPass) -> list[Step]:
    """Steps of trading tokens for heads, whole documents on a share of the heads, and trading back."""
    degree = call.degree
    own = KernelWork(np.full(degree, call.shards.documents), np.ones(degree))
    kernel = Step(call.kernel_s(own, call.num_heads // degree), call.silence())
    return _between_trades(call, degree, [kernel])


def ulysses_ring_steps(call: AttentionPass, work: AttentionWork) -> list[Step]:
    """Steps of trading among u neighbours, a ring across their groups, and trading back."""
    factor = trading_neighbours(work.degree, work.num_heads, work.num_key_heads)
    if factor is None:
        raise ValueError(f"no part of a group of {work.degree} can share its heads; ask `why_not` first.")
    inner = replace(
        call,
        shards=Shards(work, call.rate.efficient_rows, merged=factor),
        num_heads=work.num_heads // factor,
        num_key_heads=max(1, work.num_key_heads // factor),
    )
    return _between_trades(call, factor, [_at_every_place(step, factor) for step in ring_steps(inner)])


METHOD_STEPS: dict[str, Callable[[AttentionPass, AttentionWork], list[Step]]] = {
    "ring": lambda call, work: ring_steps(call),
    "bidirectional_ring": lambda call, work: bidirectional_ring_steps(call),
    "token_ring": lambda call, work: token_ring_steps(call),
    "all_gather": lambda call, work: all_gather_steps(call),
    "ulysses": lambda call, work: ulysses_steps(call),
    "ulysses_ring": ulysses_ring_steps,
}


def _key_ring_steps(call: AttentionPass, streams: list[_Stream]) -> list[Step]:
    degree, owners = call.degree, np.arange(call.degree)
    # Under a window sums go straight home. Sums of one document that a single kernel call made travel as it gave them.
    straight_home = call.shards.window is not None
    is_single = degree == 2 and call.shards.num_documents == 1 and not straight_home
    sum_bytes = call.element_bytes if is_single else call.wide_bytes
    hops_s = [call.kernel_s(call.shards.pairs(stream.part), stream.num_heads) for stream in streams]
    touched_queries = call.shards.queries.needed
    steps = []
    for hop in range(degree + 1 if call.backward else degree):
        messages, compute_s = call.silence(), _own_work_s(call, hop, last_exchange=call.backward)
        for stream, hop_s in zip(streams, hops_s, strict=True):
            route, row = stream.route, 2 * stream.num_key_heads * call.head_size
            visitors = route.visitors(hop)
            if hop + 1 < degree:
                rows = route.outbound[:, hop + 1]
                _send(messages, visitors, route.visitors(hop + 1), rows * (row * call.element_bytes))
            if call.backward and hop >= 2:
                rows = (route.touched if straight_home else route.collected)[:, hop - 1]
                targets = owners if straight_home else visitors
                _send(messages, route.visitors(hop - 1), targets, rows * (row * sum_bytes))
                compute_s[targets] += call.merge_s(2 * rows, stream.num_key_heads)
            if 0 < hop < degree:
                compute_s[visitors] += hop_s[visitors, owners]
                rows = np.where(hop_s > 0, touched_queries, 0.0)[visitors, owners]
                compute_s[visitors] += call.merge_s(rows, stream.num_heads)
        steps.append(Step(compute_s, messages))
    return steps


def _at_every_place(step: Step, factor: int) -> Step:
    """A step among groups of `factor` neighbours: ranks at the same place in their groups exchange messages."""
    same_place: FloatArray = np.eye(factor)
    messages: FloatArray = np.kron(step.messages, same_place).astype(np.float64)
    return Step(np.repeat(step.compute_s, factor), messages)


def _own_work_s(call: AttentionPass, hop: int, *, last_exchange: bool) -> FloatArray:
    """Seconds of each rank's own rows: all at hop 0, or half there and half at the last exchange, hop N."""
    if hop not in (0, call.degree):
        return call.idle()
    first, *last = head_groups(call.num_heads, call.num_key_heads, 2)
    if not (call.hides_last_return and last_exchange):
        first, last = (call.num_key_heads, call.num_heads), []
    work = call.shards.pairs()
    own = KernelWork(np.diag(work.padded_pairs), np.diag(work.num_calls))
    return sum((call.kernel_s(own, heads) for _, heads in ([first] if hop == 0 else last)), call.idle())


def _between_trades(call: AttentionPass, factor: int, inner: list[Step]) -> list[Step]:
    """Put the all-to-alls of `factor` neighbours before and after some steps, exposed, with a permuting copy each."""
    queries = call.shards.query_rows * call.row_bytes(call.num_heads)
    # Key heads are copied where there are fewer than ranks.
    keys = call.shards.key_rows * call.row_bytes(max(call.num_key_heads, factor))
    before, after = ([queries], [queries, keys, keys]) if call.backward else ([queries, keys, keys], [queries])
    ranks = np.arange(call.degree)
    neighbours = (ranks[:, None] // factor == ranks // factor) & (ranks[:, None] != ranks)

    def steps(local_bytes: FloatArray, *, home: bool) -> list[Step]:
        messages: FloatArray = np.where(neighbours, local_bytes[:, None] / factor, 0.0).astype(np.float64)
        copy = Step(call.rate.copy_s(PERMUTE_PASSES * local_bytes), call.silence())
        return [copy, Step(call.idle(), messages.T if home else messages)]

    to_heads = [step for local_bytes in before for step in steps(local_bytes, home=False)]
    to_tokens = [step for local_bytes in after for step in steps(local_bytes, home=True)]
    return [*to_heads, *inner, *to_tokens]


def _send(messages: FloatArray, sources: IntArray, targets: IntArray, num_bytes: FloatArray) -> None:
    """Add one message of each owner's rows."""
    np.add.at(messages, (sources, targets), num_bytes)
