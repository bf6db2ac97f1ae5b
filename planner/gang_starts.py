"""First plans under per-step: lanes of one degree, each sequence on the degree that suits it, per-layer plans.

All deal with `deal_lanes`: to the lane that ends first, groups with more ranks before those with fewer, so that nobody
waits. No clock is asked.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from planner.errors import InfeasibleError
from planner.gang_kernel import anneal_gang, deal_lanes, load_slots
from planner.gang_tables import GangState, GangTables
from planner.problem import Draft, FloatArray, IntArray

# Slots beyond those in use, so that a group can be split.
_SPARE_SLOTS = 16
_EVENING_STEPS = 20_000


def lanes_of(tables: GangTables, kind: int) -> GangState | None:
    """Return lanes of one kind, each with its own number of groups; `None` if the kind cannot hold a sequence."""
    return dealt(tables, np.full(len(tables.search.tokens), kind, dtype=np.int64))


def dealt(tables: GangTables, kind_of: IntArray) -> GangState | None:
    """Return a state in which every sequence is in a group of the kind given for it; `None` if one does not fit."""
    search, blocks = tables.search, tables.blocks
    n = len(search.tokens)
    end = np.zeros(search.num_ranks)
    assign, block, held = np.zeros(n, dtype=np.int64), np.full(n, -1, dtype=np.int64), np.zeros(n, dtype=np.int64)
    num_bins = 0
    for k in sorted(set(kind_of.tolist()), key=lambda k: (-search.degree[k], k)):
        if blocks.num[k] == 0:
            return None
        num_bins = deal_lanes(
            np.flatnonzero(kind_of == k),
            k,
            int(blocks.first[k]),
            int(blocks.num[k]),
            search.tokens,
            search.share_s,
            search.fixed_s,
            search.max_tokens,
            blocks,
            end,
            assign,
            block,
            held,
            num_bins,
        )
        if num_bins < 0:
            return None
    return GangState(assign, _with_spare(block[:num_bins], n))


def suited(tables: GangTables, alone_s: float, *, sharing: bool = True) -> GangState | None:
    """Return a state in which every sequence is on the kind that spends least on it, alone at most `alone_s` long.

    ``d * (share(s) + fixed * fill)`` is what a sequence costs; where none is fast enough, the fastest counts. `fill` is
    its share of the group's tokens, or with `sharing` false one part of as many like it as the group holds.
    """
    search = tables.search
    holds = search.max_tokens[:, None] >= search.tokens
    holds &= tables.blocks.num[:, None] > 0
    fixed_s = search.fixed_s[:, None]
    fill = np.minimum(1.0, search.tokens / np.maximum(1, search.max_tokens)[:, None])
    if not sharing:
        fill = 1 / np.maximum(1, np.maximum(1, search.max_tokens)[:, None] // search.tokens)
    cost_s = search.degree[:, None] * (search.share_s + fixed_s * fill)
    time_s = np.where(holds, search.share_s + fixed_s, math.inf)
    fast = time_s <= np.maximum(alone_s, time_s.min(axis=0))
    return dealt(tables, np.argmin(np.where(fast & holds, cost_s, math.inf), axis=0))


def of_draft(tables: GangTables, draft: Draft) -> GangState:
    """Return the groups of a draft on blocks: more ranks first, then the longest, each where it can start first.

    What micro-batch a group was in does not count: heavy groups meet ranks that are free early.
    """
    problem, blocks = tables.problem, tables.blocks
    groups = [(group, problem.group_time_s(group)) for micro_batch in draft for group in micro_batch]
    groups.sort(key=lambda item: (-problem.degrees[item[0].kind], -item[1], item[0].sequences))
    position = np.empty(len(tables.search.ids), dtype=np.int64)
    position[tables.search.ids] = np.arange(len(position))
    end = np.zeros(problem.num_ranks)
    assign = np.zeros(len(position), dtype=np.int64)
    block = np.zeros(len(groups), dtype=np.int64)
    for slot, (group, time_s) in enumerate(groups):
        first = int(blocks.first[group.kind])
        bounds = blocks.start[first : first + int(blocks.num[group.kind]) + 1].tolist()
        ranks = [blocks.ranks[low:high] for low, high in itertools.pairwise(bounds)]
        starts = [float(end[found].max()) for found in ranks]
        best = min(range(len(ranks)), key=starts.__getitem__)
        end[ranks[best]] = starts[best] + time_s
        block[slot] = first + best
        assign[position[list(group.sequences)]] = slot
    return GangState(assign, _with_spare(block, len(position)))


def evened(tables: GangTables, state: GangState, kinds: Sequence[int], seed: int = 1) -> GangState:
    """Return the state after a fixed number of moves and swaps that make the last end earlier, or as it was."""
    search = tables.search
    load, held, members, end = scratch(tables, len(state.block))
    arrays = (search.tokens, search.share_s, search.fixed_s, search.max_tokens, tables.blocks)
    tried = state.copy()
    last_end_s, _ = load_slots(tried.assign, tried.block, *arrays, load, held, members, end)
    before_s = last_end_s
    random = np.asarray([seed * 2_654_435_761 + 1], dtype=np.uint64)
    allowed = np.asarray(kinds, dtype=np.int64)
    for share in (1e-4, 1e-6):
        anneal_gang(
            tried.assign,
            tried.block,
            *arrays,
            allowed,
            load,
            held,
            members,
            end,
            max(last_end_s, 1e-30),
            6,
            max(last_end_s, 1e-30) * share,
            max(last_end_s, 1e-30) * 100.0,
            0.0,
            _EVENING_STEPS // 2,
            random,
        )
        last_end_s, overfull = load_slots(tried.assign, tried.block, *arrays, load, held, members, end)
    return tried if overfull == 0 and last_end_s < before_s else state


def static_lanes(tables: GangTables, degree: int) -> tuple[GangState, float]:
    """Return the best lanes of one degree over its kinds, and the seconds of the step.

    Raises:
        InfeasibleError: The longest sequence does not fit a group of this degree.
    """
    problem = tables.problem
    best: GangState | None = None
    best_s = math.inf
    for k in problem.kinds_of_degree(degree):
        state = lanes_of(tables, k)
        if state is None:
            continue
        for candidate in (state, evened(tables, state, [k])):
            step_time_s = tables.plan(candidate)[1]
            if step_time_s < best_s:
                best, best_s = candidate, step_time_s
    if best is None:
        longest = problem.descending[0]
        raise InfeasibleError(
            f"sequence {longest} has {problem.lengths[longest]} tokens, which a group of static degree {degree} (at "
            f"most {max(problem.max_tokens[k] for k in problem.kinds_of_degree(degree))} tokens with sync "
            f"{problem.sync}) cannot hold; use a larger degree or more ranks."
        )
    return best, best_s


def lanes_floor_s(tables: GangTables, degree: int) -> float:
    """Return a lower bound of lanes of one degree.

    On ``n`` lanes of a kind with fixed seconds ``f``, where memory forces ``G`` groups, lanes in use have at least one
    group each and end no earlier than their mean: ``sum(share(s))/n + f * max(1, G/n)``. The longest sequence takes its
    group at least ``share(s) + f``.

    On GPUs better than a kind asks for, a group may be faster than its kind; then the bound is 0.
    """
    problem, search = tables.problem, tables.search
    if not problem.cluster.is_uniform:
        return 0.0
    num_tokens, floors_s = sum(problem.lengths), []
    for k in problem.kinds_of_degree(degree):
        lanes, groups = max(1, int(tables.blocks.num[k])), -(-num_tokens // max(1, problem.max_tokens[k]))
        mean_s = float(search.share_s[k].sum()) / lanes + problem.fixed_s[k] * max(1.0, groups / lanes)
        floors_s.append(max(mean_s, float(search.share_s[k].max()) + problem.fixed_s[k]))
    return min(floors_s) + problem.step_fixed_s


def scratch(tables: GangTables, num_slots: int) -> tuple[FloatArray, IntArray, IntArray, FloatArray]:
    """Return arrays for load, held tokens and members of the slots, and for the ends of the ranks."""
    held, members = np.zeros((2, num_slots), dtype=np.int64)
    return np.zeros(num_slots), held, members, np.zeros(tables.search.num_ranks)


def _with_spare(block: IntArray, num_sequences: int) -> IntArray:
    size = max(len(block), min(num_sequences, 2 * len(block) + _SPARE_SLOTS))
    return np.concatenate([block, np.full(size - len(block), -1, dtype=np.int64)])
