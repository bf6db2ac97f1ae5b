"""What each method of parallel attention computes and sends, step by step, forward and backward.

The steps follow the executors; how long their messages take is the network's matter.

Symbols: N degree, Hq, Hk heads, D head size, u neighbours that trade heads in ``ulysses_ring``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from planner.attention_heads import head_groups, trading_neighbours
from planner.attention_pass import PERMUTE_PASSES, AttentionPass, Step
from planner.attention_routes import FIRST_CHUNKS, SECOND_CHUNKS, Route
from planner.attention_shards import KernelWork, Shards
from planner.attention_work import AttentionWork, FloatArray, IntArray

# Of one tensor that all ranks trade: its parts by rank, the own part, and the order of the rows.
OPERATIONS_OF_TRADE = 3


@dataclass(frozen=True)
class _Stream:
    """Key heads that go around the ring together."""

    route: Route
    num_key_heads: int
    num_heads: int
    part: int | None = None


def local_steps(call: AttentionPass) -> list[Step]:
    """Steps of a group of one."""
    own = KernelWork(np.array([call.shards.documents]), np.ones(1), np.zeros(1))
    return [Step(call.kernel_load(own, call.num_heads), call.silence())]


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
    hops = call.kernel_load(call.shards.pairs(), call.num_heads)
    key_sums = call.merge_load(2 * call.shards.keys.needed.T, call.num_key_heads)
    steps = []
    for hop in range(degree + 1):
        messages, load = call.silence(), _own_load(call, hop, last_exchange=True)
        visitors = route.visitors(hop)
        if hop + 1 < degree:
            _send(messages, visitors, route.visitors(hop + 1), route.outbound[:, hop + 1] * out_bytes)
        if hop >= 2:
            _send(messages, route.visitors(hop - 1), owners, route.touched[:, hop - 1] * back_bytes)
            load += call.merge_load(route.touched[:, hop - 1], call.num_heads, num_operations=1)
        if 0 < hop < degree:
            load[:, visitors] += hops[:, owners, visitors]
            if call.backward:
                load[:, visitors] += key_sums[:, owners, visitors]
        steps.append(Step(load, messages))
    return steps


def all_gather_steps(call: AttentionPass) -> list[Step]:
    """Steps of gathering keys by groups of heads; in the backward their gradients go home one group later.

    Whole documents are computed while the first group comes, or the last gradients go home.
    """
    groups = head_groups(call.num_heads, call.num_key_heads, call.head_groups)
    needed = call.shards.keys.needed
    gathers = [needed * (2 * call.row_bytes(key_heads)) for key_heads, _ in groups]
    work = call.shards.gathered(apart=call.whole_apart)
    gathers_then_silence = [*gathers[1:], call.silence()]
    apart = call.kernel_load(call.shards.apart(), call.num_heads, num_picks=0) if call.whole_apart else call.idle()
    steps = [Step(call.idle() if call.backward else apart, gathers[0])]

    def kernel(num_heads: int) -> FloatArray:
        # Keys and values are picked in one operation, and put back in one.
        return call.kernel_load(work, num_heads, num_picks=2 if call.backward else 1)

    if not call.backward:
        kernels = [kernel(heads) for _, heads in groups]
        return steps + [Step(*both) for both in zip(kernels, gathers_then_silence, strict=True)]
    widening = call.wide_bytes / call.element_bytes
    # Both sums of each other rank, and widening them.
    operations = 2 * call.degree
    returned = [
        call.merge_load(2 * needed.sum(axis=1), key_heads, num_operations=operations) for key_heads, _ in groups
    ]
    for index, (_, heads) in enumerate(groups):
        load, messages = kernel(heads), gathers_then_silence[index]
        if index:
            load, messages = load + returned[index - 1], messages + gathers[index - 1].T * widening
        steps.append(Step(load, messages))
    return [*steps, Step(apart, gathers[-1].T * widening), Step(returned[-1], call.silence())]


def ulysses_steps(call: AttentionPass) -> list[Step]:
    """Steps of trading tokens for heads, whole documents on a share of the heads, and trading back."""
    degree = call.degree
    own = KernelWork(np.full(degree, call.shards.documents), np.ones(degree), np.zeros(degree))
    kernel = Step(call.kernel_load(own, call.num_heads // degree), call.silence())
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
    hops = [call.kernel_load(call.shards.pairs(stream.part), stream.num_heads) for stream in streams]
    touched_queries = call.shards.queries.needed
    steps = []
    for hop in range(degree + 1 if call.backward else degree):
        messages, load = call.silence(), _own_load(call, hop, last_exchange=call.backward)
        for stream, kernels in zip(streams, hops, strict=True):
            route, row = stream.route, 2 * stream.num_key_heads * call.head_size
            visitors = route.visitors(hop)
            if hop + 1 < degree:
                rows = route.outbound[:, hop + 1]
                _send(messages, visitors, route.visitors(hop + 1), rows * (row * call.element_bytes))
            if call.backward and hop >= 2:
                rows = (route.touched if straight_home else route.collected)[:, hop - 1]
                targets = owners if straight_home else visitors
                _send(messages, route.visitors(hop - 1), targets, rows * (row * sum_bytes))
                load[:, targets] += call.merge_load(2 * rows, stream.num_key_heads, num_operations=2)
            if 0 < hop < degree:
                load[:, visitors] += kernels[:, visitors, owners]
                rows = np.where(kernels[0] > 0, touched_queries, 0.0)[visitors, owners]
                load[:, visitors] += call.merge_load(rows, stream.num_heads)
        steps.append(Step(load, messages))
    return steps


def _at_every_place(step: Step, factor: int) -> Step:
    """A step among groups of `factor` neighbours: ranks at the same place in their groups exchange messages."""
    same_place: FloatArray = np.eye(factor)
    messages: FloatArray = np.kron(step.messages, same_place).astype(np.float64)
    return Step(np.repeat(step.load, factor, axis=1), messages)


def _own_load(call: AttentionPass, hop: int, *, last_exchange: bool) -> FloatArray:
    """Load of each rank's own rows: all at hop 0, or half there and half at the last exchange, hop N."""
    if hop not in (0, call.degree):
        return call.idle()
    first, *last = head_groups(call.num_heads, call.num_key_heads, 2)
    if not (call.hides_last_return and last_exchange):
        first, last = (call.num_key_heads, call.num_heads), []
    work = call.shards.pairs()
    own = KernelWork(np.diag(work.padded_pairs), np.diag(work.num_calls), np.diag(work.picked_rows))
    return sum((call.kernel_load(own, heads) for _, heads in ([first] if hop == 0 else last)), call.idle())


def _between_trades(call: AttentionPass, factor: int, inner: list[Step]) -> list[Step]:
    """Put the all-to-alls of `factor` neighbours before and after some steps, exposed, with a permuting copy each."""
    queries = call.shards.query_rows * call.row_bytes(call.num_heads)
    # Key heads are copied where there are fewer than ranks.
    keys = call.shards.key_rows * call.row_bytes(max(call.num_key_heads, factor))
    before, after = ([queries], [queries, keys, keys]) if call.backward else ([queries, keys, keys], [queries])
    ranks = np.arange(call.degree)
    neighbours = (ranks[:, None] // factor == ranks // factor) & (ranks[:, None] != ranks)

    def steps(tensors: list[FloatArray], *, home: bool) -> list[Step]:
        # All tensors travel in one exchange.
        local_bytes: FloatArray = np.sum(tensors, axis=0)
        messages: FloatArray = np.where(neighbours, local_bytes[:, None] / factor, 0.0).astype(np.float64)
        operations = OPERATIONS_OF_TRADE * len(tensors)
        copy = Step(call.copy_load(PERMUTE_PASSES * local_bytes, num_operations=operations), call.silence())
        return [copy, Step(call.idle(), messages.T if home else messages)]

    return [*steps(before, home=False), *inner, *steps(after, home=True)]


def _send(messages: FloatArray, sources: IntArray, targets: IntArray, num_bytes: FloatArray) -> None:
    """Add one message of each owner's rows."""
    np.add.at(messages, (sources, targets), num_bytes)
