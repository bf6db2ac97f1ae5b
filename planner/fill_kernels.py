"""Compiled filling of groups: longest processing time first (LPT), hill climbing over shapes, moves and swaps.

Arrays are those of `planner.search_tables`. A *shape* is how many groups of each kind a micro-batch has.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from planner.compiled import compiled

Array = Any


@compiled
def packs(counts: Array, degree: Array, num_ranks: int, packing: Any) -> bool:
    """Say whether a shape finds ranks; may say no where a cleverer packing exists, as `Cluster.place` may."""
    total = 0
    for k in range(counts.size):
        total += counts[k] * degree[k]
    if total > num_ranks:
        return False
    if packing.only_sum:
        return True
    num_nodes = packing.num_gpus.size
    free = packing.num_gpus.copy()
    rest_of = np.zeros(counts.size, dtype=np.int64)
    for k in packing.order:
        for _ in range(counts[k]):
            if packing.spans[k]:
                # Whole nodes first; what is missing comes from what the others leave.
                rest = degree[k]
                for node in range(num_nodes):
                    if packing.serves[k, node] and free[node] == packing.num_gpus[node] and free[node] <= rest:
                        rest -= free[node]
                        free[node] = 0
                rest_of[k] += rest
                continue
            best = -1
            for node in range(num_nodes):
                if packing.serves[k, node] and free[node] >= degree[k] and (best < 0 or free[node] < free[best]):
                    best = node
            if best < 0:
                return False
            free[best] -= degree[k]
    for k in packing.order:
        for node in range(num_nodes):
            if packing.serves[k, node] and rest_of[k] > 0:
                taken = min(free[node], rest_of[k])
                free[node] -= taken
                rest_of[k] -= taken
        if rest_of[k] > 0:
            return False
    return True


@compiled
def deal(
    first: int, last: int, shape: Array, tokens: Array, share_s: Array, fixed_s: Array, max_tokens: Array, assign: Array
) -> tuple[float, float]:
    """Deal the sequences first..last-1, longest first, each to the group that ends earliest with it and can hold it.

    A sequence that fits nowhere goes where it overflows least.

    Args:
        shape: Kind of every group.
        assign: Written: the group of each of these sequences.

    Returns:
        Seconds of the slowest group, and the sum of the overflows as shares of the groups' capacity.
    """
    num_groups = shape.size
    load = np.empty(num_groups)
    held = np.zeros(num_groups, dtype=np.int64)
    for g in range(num_groups):
        load[g] = fixed_s[shape[g]]
    slowest, overflow = 0.0, 0.0
    for i in range(first, last):
        best, best_s, least, least_over = -1, np.inf, -1, np.inf
        for g in range(num_groups):
            k = shape[g]
            if held[g] + tokens[i] <= max_tokens[k]:
                end_s = load[g] + share_s[k, i]
                if end_s < best_s:
                    best, best_s = g, end_s
            else:
                over = (held[g] + tokens[i]) / max_tokens[k] - 1.0
                if over < least_over:
                    least, least_over = g, over
        if best < 0:
            best = least
            best_s = load[best] + share_s[shape[best], i]
            overflow += min(least_over, tokens[i] / max_tokens[shape[best]])
        load[best] = best_s
        held[best] += tokens[i]
        assign[i] = best
        slowest = max(slowest, best_s)
    return slowest, overflow


@compiled
def expand(counts: Array) -> Array:
    """Return the kind of every group of a shape given as counts by kind, largest kinds first."""
    shape = np.empty(counts.sum(), dtype=np.int64)
    filled = 0
    for k in range(counts.size - 1, -1, -1):
        for _ in range(counts[k]):
            shape[filled] = k
            filled += 1
    return shape


@compiled
def climb(
    first: int,
    last: int,
    counts: Array,
    ladder: Array,
    degree: Array,
    num_ranks: int,
    packing: Any,
    tokens: Array,
    share_s: Array,
    fixed_s: Array,
    max_tokens: Array,
    assign: Array,
    overflow_weight: float,
) -> float:
    """Climb from a shape to better ones by splits and merges along a ladder of kinds, each judged by `deal`.

    Args:
        first: First sequence of the micro-batch.
        last: One past its last sequence.
        counts: Groups by kind; written: the best shape found.
        ladder: Kinds of ascending degree that moves may use.
        assign: Written: the groups of the best shape.
        overflow_weight: How many makespans an overflow of one capacity counts.

    Returns:
        ``makespan * (1 + overflow_weight * overflow)`` of the best shape.
    """
    trial = assign.copy()
    slowest, overflow = deal(first, last, expand(counts), tokens, share_s, fixed_s, max_tokens, assign)
    best = slowest * (1.0 + overflow_weight * overflow)
    improved = True
    while improved:
        improved = False
        for low in range(ladder.size - 1):
            for high in range(low + 1, min(ladder.size, low + 3)):
                small, large = ladder[low], ladder[high]
                pieces = degree[large] // degree[small]
                for merging in range(2):
                    changed = counts.copy()
                    if merging == 1:
                        if counts[small] < pieces or pieces * degree[small] != degree[large]:
                            continue
                        changed[small] -= pieces
                        changed[large] += 1
                    else:
                        if counts[large] < 1:
                            continue
                        changed[large] -= 1
                        changed[small] += pieces
                    if not packs(changed, degree, num_ranks, packing):
                        continue
                    slowest, overflow = deal(first, last, expand(changed), tokens, share_s, fixed_s, max_tokens, trial)
                    value = slowest * (1.0 + overflow_weight * overflow)
                    if value < best * (1.0 - 1e-9):
                        best = value
                        counts[:] = changed
                        assign[first:last] = trial[first:last]
                        improved = True
    return best


@compiled
def relieve(
    first: int,
    last: int,
    shape: Array,
    tokens: Array,
    share_s: Array,
    fixed_s: Array,
    max_tokens: Array,
    assign: Array,
    max_rounds: int,
) -> float:
    """Move a sequence off the slowest group, or swap one of its sequences, while that makes the slower of two faster.

    Returns:
        Seconds of the slowest group.
    """
    num_groups = shape.size
    load = np.zeros(num_groups)
    held = np.zeros(num_groups, dtype=np.int64)
    used = np.zeros(num_groups, dtype=np.int64)
    for i in range(first, last):
        g = assign[i]
        load[g] += share_s[shape[g], i]
        held[g] += tokens[i]
        used[g] += 1
    for _ in range(max_rounds):
        slow, slow_s = -1, -1.0
        for g in range(num_groups):
            if used[g] > 0 and load[g] + fixed_s[shape[g]] > slow_s:
                slow, slow_s = g, load[g] + fixed_s[shape[g]]
        best_s, best_i, best_j, best_g = slow_s * (1.0 - 1e-9), -1, -1, -1
        k = shape[slow]
        for i in range(first, last):
            if assign[i] != slow:
                continue
            without_s = slow_s - share_s[k, i]
            for g in range(num_groups):
                if g == slow or held[g] + tokens[i] > max_tokens[shape[g]]:
                    continue
                after_s = max(without_s, load[g] + fixed_s[shape[g]] + share_s[shape[g], i])
                if after_s < best_s:
                    best_s, best_i, best_j, best_g = after_s, i, -1, g
            for j in range(first, last):
                g = assign[j]
                if g == slow or share_s[k, j] >= share_s[k, i]:
                    continue
                other = shape[g]
                more = tokens[i] - tokens[j]
                if held[slow] - more > max_tokens[k] or held[g] + more > max_tokens[other]:
                    continue
                after_s = max(
                    without_s + share_s[k, j], load[g] + fixed_s[other] - share_s[other, j] + share_s[other, i]
                )
                if after_s < best_s:
                    best_s, best_i, best_j, best_g = after_s, i, j, g
        if best_i < 0:
            return slow_s
        g = best_g
        load[slow] -= share_s[k, best_i]
        load[g] += share_s[shape[g], best_i]
        held[slow] -= tokens[best_i]
        held[g] += tokens[best_i]
        assign[best_i] = g
        if best_j >= 0:
            load[slow] += share_s[k, best_j]
            load[g] -= share_s[shape[g], best_j]
            held[slow] += tokens[best_j]
            held[g] -= tokens[best_j]
            assign[best_j] = slow
        else:
            used[slow] -= 1
            used[g] += 1
    slowest = 0.0
    for g in range(num_groups):
        if used[g] > 0:
            slowest = max(slowest, load[g] + fixed_s[shape[g]])
    return slowest


@compiled
def pack_until(
    time_s: float,
    waiting: Array,
    ladder: Array,
    degree: Array,
    num_ranks: int,
    packing: Any,
    tokens: Array,
    share_s: Array,
    fixed_s: Array,
    max_tokens: Array,
    shape: Array,
    group_of: Array,
) -> int:
    """Fill one micro-batch that ends at `time_s`: each waiting sequence, longest first, goes to the fullest group that
    still ends in time and holds it, else to a new group of the least degree that does, else it keeps waiting.

    Args:
        waiting: Sequences in descending length.
        ladder: Kinds of ascending degree that new groups may have.
        shape: Written: the kind of every group.
        group_of: Written: by place in `waiting`, the group, -1 for those that wait on.

    Returns:
        The number of groups.
    """
    num_groups = 0
    load, held = np.zeros(shape.size), np.zeros(shape.size, dtype=np.int64)
    counts = np.zeros(degree.size, dtype=np.int64)
    for place in range(waiting.size):
        i = waiting[place]
        group_of[place] = -1
        best, least_room = -1, np.inf
        for g in range(num_groups):
            k = shape[g]
            if held[g] + tokens[i] > max_tokens[k]:
                continue
            room_s = time_s - load[g] - share_s[k, i]
            if 0.0 <= room_s * degree[k] < least_room:
                best, least_room = g, room_s * degree[k]
        if best < 0 and num_groups < shape.size:
            for k in ladder:
                if tokens[i] > max_tokens[k] or fixed_s[k] + share_s[k, i] > time_s:
                    continue
                counts[k] += 1
                if packs(counts, degree, num_ranks, packing):
                    best = num_groups
                    shape[best], load[best] = k, fixed_s[k]
                    num_groups += 1
                else:
                    counts[k] -= 1
                break
        if best >= 0:
            load[best] += share_s[shape[best], i]
            held[best] += tokens[i]
            group_of[place] = best
    return num_groups
