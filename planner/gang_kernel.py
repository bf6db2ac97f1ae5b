"""Compiled loops for gang schedules: dealing sequences to the groups of lanes, and simulated annealing.

A *block* is a set of ranks that groups of one kind may run on, in `planner.gang_tables` CSR arrays. A *slot* is a group:
its block (-1: free) and the sequences assigned to it. A rank ends after the sum of its groups, which is exact where
groups with more ranks go first and blocks are nested. The objective is

    (mean over ranks of (end/reference)^p)^(1/p) * reference + weight * sum of memory overflows

a smooth stand-in for the last end. Moves, each judged by Metropolis:

    move    one sequence to another group, or to a new one
    swap    two sequences of different groups, often of similar length
    reform  a group on another block or kind, two groups exchanged, one split in two, or two merged
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from planner.anneal_kernel import _below, _over, _power, _random, _root
from planner.compiled import compiled

Array = Any


@compiled
def deal_lanes(
    places: Array,
    kind: int,
    first_block: int,
    num_lanes: int,
    tokens: Array,
    share_s: Array,
    fixed_s: Array,
    max_tokens: Array,
    blocks: Any,
    end: Array,
    assign: Array,
    block: Array,
    held: Array,
    num_bins: int,
) -> int:
    """Deal sequences to groups of one kind: each to the lane that ends earliest with it, there to the fullest group.

    A lane is a block; a group that can hold the sequence costs nothing more, a new one its fixed seconds.

    Args:
        places: Sequences to deal, longest first.
        kind: Of all lanes.
        first_block: Block of the first lane.
        num_lanes: Blocks of that kind.
        end: [ranks] when each is free; written.
        assign: [sequences]; written: the slot of each.
        block: [slots]; written.
        held: [slots] tokens; written.
        num_bins: Slots in use.

    Returns:
        Slots in use now; -1 if a sequence fits no group of the kind or slots run out.
    """
    begun = num_bins
    lane_end = np.zeros(num_lanes)
    best_bin = np.empty(num_lanes, dtype=np.int64)
    for lane in range(num_lanes):
        b = first_block + lane
        for x in range(blocks.start[b], blocks.start[b + 1]):
            lane_end[lane] = max(lane_end[lane], end[blocks.ranks[x]])
    for i in places:
        if tokens[i] > max_tokens[kind]:
            return -1
        best_bin[:] = -1
        for g in range(begun, num_bins):
            lane = block[g] - first_block
            if held[g] + tokens[i] <= max_tokens[kind] and (best_bin[lane] < 0 or held[g] > held[best_bin[lane]]):
                best_bin[lane] = g
        best, best_s = 0, np.inf
        for lane in range(num_lanes):
            end_s = lane_end[lane] + share_s[kind, i] + (fixed_s[kind] if best_bin[lane] < 0 else 0.0)
            if end_s < best_s:
                best, best_s = lane, end_s
        g = best_bin[best]
        if g < 0:
            if num_bins == block.size:
                return -1
            g = num_bins
            num_bins += 1
            block[g], held[g] = first_block + best, 0
        held[g] += tokens[i]
        assign[i] = g
        lane_end[best] = best_s
    for lane in range(num_lanes):
        b = first_block + lane
        for x in range(blocks.start[b], blocks.start[b + 1]):
            end[blocks.ranks[x]] = lane_end[lane]
    return num_bins


@compiled
def load_slots(
    assign: Array,
    block: Array,
    tokens: Array,
    share_s: Array,
    fixed_s: Array,
    max_tokens: Array,
    blocks: Any,
    load: Array,
    held: Array,
    members: Array,
    end: Array,
) -> tuple[float, int]:
    """Write seconds (without the fixed part), tokens and members of the slots and ends of the ranks; free empty slots.

    Returns:
        The last end, and how many groups overflow their memory.
    """
    load[:] = 0.0
    held[:] = 0
    members[:] = 0
    end[:] = 0.0
    for i in range(assign.size):
        g = assign[i]
        load[g] += share_s[blocks.kind[block[g]], i]
        held[g] += tokens[i]
        members[g] += 1
    overfull = 0
    for g in range(block.size):
        if members[g] == 0:
            block[g] = -1
            continue
        b = block[g]
        k = blocks.kind[b]
        if held[g] > max_tokens[k]:
            overfull += 1
        for x in range(blocks.start[b], blocks.start[b + 1]):
            end[blocks.ranks[x]] += load[g] + fixed_s[k]
    return end.max(), overfull


@compiled
def _shift(
    b: int,
    delta: float,
    blocks: Any,
    end: Array,
    power: Array,
    unit: float,
    squarings: int,
    undo_rank: Array,
    undo: Array,
    top: int,
) -> tuple[int, float]:
    """Lengthen every rank of a block; return the new top of the undo stack and the change of the sum of powers."""
    change = 0.0
    for x in range(blocks.start[b], blocks.start[b + 1]):
        r = blocks.ranks[x]
        undo_rank[top], undo[top, 0], undo[top, 1] = r, end[r], power[r]
        top += 1
        end[r] += delta
        p = _power(max(0.0, end[r]) * unit, squarings)
        change += p - power[r]
        power[r] = p
    return top, change


@compiled
def _block_near(b: int, kind: int, blocks: Any, random: Array) -> int:
    """Return the block of `kind` that lies where `b` does, as far as blocks are in the order of their ranks."""
    k = blocks.kind[b]
    num, other = blocks.num[k], blocks.num[kind]
    share = (b - blocks.first[k] + (_random(random) if other > num else 0.0)) / num
    return int(blocks.first[kind] + min(other - 1, int(share * other + 1e-9)))


@compiled
def anneal_gang(
    assign: Array,
    block: Array,
    tokens: Array,
    share_s: Array,
    fixed_s: Array,
    max_tokens: Array,
    blocks: Any,
    kinds: Array,
    load: Array,
    held: Array,
    members: Array,
    end: Array,
    reference_s: float,
    squarings: int,
    temperature_s: float,
    memory_weight_s: float,
    reform_share: float,
    steps: int,
    random: Array,
) -> None:
    """Make `steps` proposals at one temperature; assign, block, load, held, members and end are changed.

    Args:
        kinds: Kinds that groups may become.
        reference_s: Seconds that powers are taken relative to, about the last end.
        squarings: p = 2^squarings.
        temperature_s: Metropolis temperature.
        memory_weight_s: Seconds that an overflow of a whole capacity costs.
        reform_share: Share of the proposals that change groups.
        steps: Proposals.
        random: One uint64, the generator's state.
    """
    n, num_slots, num_ranks = assign.size, block.size, end.size
    unit = 1.0 / reference_s
    power = np.empty(num_ranks)
    undo_rank, undo = np.empty(4 * num_ranks, dtype=np.int64), np.empty((4 * num_ranks, 2))
    live, place = np.empty(num_slots, dtype=np.int64), np.full(num_slots, -1, dtype=np.int64)
    free = np.empty(num_slots, dtype=np.int64)
    num_live, num_free = 0, 0
    for g in range(num_slots):
        if block[g] < 0:
            free[num_free] = g
            num_free += 1
        else:
            live[num_live], place[g] = g, num_live
            num_live += 1
    new_block, new_load = np.zeros(2, dtype=np.int64), np.zeros(2)
    new_held, new_members = np.zeros(2, dtype=np.int64), np.zeros(2, dtype=np.int64)
    total, old_s = 0.0, 0.0
    for step in range(steps):
        if step % 512 == 0:
            # Sums of such powers lose digits quickly.
            total = 0.0
            for r in range(num_ranks):
                power[r] = _power(end[r] * unit, squarings)
                total += power[r]
            old_s = reference_s * _root(total / num_ranks, squarings)
        top, change_power, change_over = 0, 0.0, 0.0
        if _random(random) < reform_share:
            g = live[_below(random, num_live)] if _random(random) < 0.5 else assign[_below(random, n)]
            h, num_new = -1, 1
            bg = block[g]
            kg = blocks.kind[bg]
            way = _random(random)
            if way < 0.15:
                new_block[0] = blocks.first[kg] + _below(random, blocks.num[kg])
                if new_block[0] == bg:
                    continue
            elif way < 0.3:
                h = live[_below(random, num_live)]
                if h == g or block[h] == bg or blocks.kind[block[h]] != kg:
                    continue
                # Exchange: only where they run changes.
                delta = load[h] - load[g]
                top, more = _shift(bg, delta, blocks, end, power, unit, squarings, undo_rank, undo, top)
                top, less = _shift(block[h], -delta, blocks, end, power, unit, squarings, undo_rank, undo, top)
                new_s = reference_s * _root(max(0.0, total + more + less) / num_ranks, squarings)
                if new_s <= old_s or _random(random) < math.exp((old_s - new_s) / temperature_s):
                    block[g], block[h] = block[h], bg
                    total, old_s = total + more + less, new_s
                else:
                    for t in range(top - 1, -1, -1):
                        end[undo_rank[t]], power[undo_rank[t]] = undo[t, 0], undo[t, 1]
                continue
            elif way < 0.45:
                k = kinds[_below(random, kinds.size)]
                if k == kg:
                    continue
                new_block[0] = _block_near(bg, k, blocks, random)
            elif way < 0.65:
                if members[g] < 2 or num_free == 0:
                    continue
                num_new = 2
                k = kinds[_below(random, kinds.size)] if _random(random) < 0.8 else kg
                new_block[0] = _block_near(bg, k, blocks, random)
                new_block[1] = _block_near(bg, k, blocks, random)
                if _random(random) < 0.3:
                    new_block[1] = blocks.first[k] + _below(random, blocks.num[k])
            else:
                h = live[_below(random, num_live)] if _random(random) < 0.5 else assign[_below(random, n)]
                if h == g:
                    continue
                if way < 0.85:
                    new_block[0] = bg
                else:
                    new_block[0] = _block_near(bg, kinds[_below(random, kinds.size)], blocks, random)
            for q in range(2):
                new_load[q], new_held[q], new_members[q] = 0.0, 0, 0
            k0 = blocks.kind[new_block[0]]
            k1 = blocks.kind[new_block[1]] if num_new == 2 else k0
            for i in range(n):
                if assign[i] == g or (h >= 0 and assign[i] == h):
                    q, k = 0, k0
                    if num_new == 2 and new_load[0] + share_s[k0, i] > new_load[1] + share_s[k1, i]:
                        q, k = 1, k1
                    new_load[q] += share_s[k, i]
                    new_held[q] += tokens[i]
                    new_members[q] += 1
            top, change = _shift(bg, -load[g] - fixed_s[kg], blocks, end, power, unit, squarings, undo_rank, undo, top)
            change_power += change
            change_over -= _over(held[g], max_tokens[kg])
            if h >= 0:
                kh = blocks.kind[block[h]]
                top, change = _shift(
                    block[h], -load[h] - fixed_s[kh], blocks, end, power, unit, squarings, undo_rank, undo, top
                )
                change_power += change
                change_over -= _over(held[h], max_tokens[kh])
            for q in range(num_new):
                if new_members[q] > 0:
                    k = k0 if q == 0 else k1
                    top, change = _shift(
                        new_block[q],
                        new_load[q] + fixed_s[k],
                        blocks,
                        end,
                        power,
                        unit,
                        squarings,
                        undo_rank,
                        undo,
                        top,
                    )
                    change_power += change
                    change_over += _over(new_held[q], max_tokens[k])
            new_s = reference_s * _root(max(0.0, total + change_power) / num_ranks, squarings)
            worse_s = new_s - old_s + memory_weight_s * change_over
            if not (worse_s <= 0.0 or _random(random) < math.exp(-worse_s / temperature_s)):
                for t in range(top - 1, -1, -1):
                    end[undo_rank[t]], power[undo_rank[t]] = undo[t, 0], undo[t, 1]
                continue
            total, old_s = total + change_power, new_s
            second = -1
            if num_new == 2 and new_members[1] > 0:
                num_free -= 1
                second = free[num_free]
                live[num_live], place[second] = second, num_live
                num_live += 1
                block[second], load[second] = new_block[1], new_load[1]
                held[second], members[second] = new_held[1], new_members[1]
            end0, end1 = 0.0, 0.0
            for i in range(n):
                if assign[i] == g or (h >= 0 and assign[i] == h):
                    if num_new == 2 and end0 + share_s[k0, i] > end1 + share_s[k1, i]:
                        end1 += share_s[k1, i]
                        assign[i] = -1 - second
                    else:
                        end0 += share_s[k0, i]
                        assign[i] = g
            if second >= 0:
                for i in range(n):
                    if assign[i] < 0:
                        assign[i] = -1 - assign[i]
            block[g], load[g], held[g], members[g] = new_block[0], new_load[0], new_held[0], new_members[0]
            if h >= 0:
                block[h], load[h], held[h], members[h] = -1, 0.0, 0, 0
                num_live -= 1
                moved = live[num_live]
                live[place[h]], place[moved] = moved, place[h]
                place[h] = -1
                free[num_free] = h
                num_free += 1
            continue
        i = _below(random, n)
        g = assign[i]
        bg = block[g]
        kg = blocks.kind[bg]
        j, fresh = -1, False
        if _random(random) < 0.5:
            if _random(random) < 0.04:
                if num_free == 0 or members[g] == 1:
                    continue
                fresh = True
                h = free[num_free - 1]
                k = kg if _random(random) < 0.5 else kinds[_below(random, kinds.size)]
                bh = blocks.first[k] + _below(random, blocks.num[k])
            else:
                h = live[_below(random, num_live)]
                if h == g:
                    continue
                bh = block[h]
            kh = blocks.kind[bh]
            delta_g = -share_s[kg, i] - (fixed_s[kg] if members[g] == 1 else 0.0)
            delta_h = share_s[kh, i] + (fixed_s[kh] if fresh else 0.0)
            more = tokens[i]
        else:
            reach = _below(random, 3)
            if reach == 0:
                j = _below(random, n)
            elif reach == 1:
                j = i + _below(random, 65) - 32
            else:
                j = i + _below(random, 17) - 8
            if j < 0 or j >= n:
                continue
            h = assign[j]
            if h == g:
                continue
            bh = block[h]
            kh = blocks.kind[bh]
            delta_g = share_s[kg, j] - share_s[kg, i]
            delta_h = share_s[kh, i] - share_s[kh, j]
            more = tokens[i] - tokens[j]
        held_h = 0 if fresh else held[h]
        cap_g, cap_h = max_tokens[kg], max_tokens[kh]
        change_over = (
            _over(held[g] - more, cap_g) + _over(held_h + more, cap_h) - _over(held[g], cap_g) - _over(held_h, cap_h)
        )
        if bg == bh:
            top, change_power = _shift(bg, delta_g + delta_h, blocks, end, power, unit, squarings, undo_rank, undo, top)
        else:
            top, less = _shift(bg, delta_g, blocks, end, power, unit, squarings, undo_rank, undo, top)
            top, change = _shift(bh, delta_h, blocks, end, power, unit, squarings, undo_rank, undo, top)
            change_power = less + change
        new_s = reference_s * _root(max(0.0, total + change_power) / num_ranks, squarings)
        worse_s = new_s - old_s + memory_weight_s * change_over
        if not (worse_s <= 0.0 or _random(random) < math.exp(-worse_s / temperature_s)):
            for t in range(top - 1, -1, -1):
                end[undo_rank[t]], power[undo_rank[t]] = undo[t, 0], undo[t, 1]
            continue
        total, old_s = total + change_power, new_s
        if fresh:
            num_free -= 1
            live[num_live], place[h] = h, num_live
            num_live += 1
            block[h], load[h], held[h], members[h] = bh, 0.0, 0, 0
        load[g] += delta_g + (fixed_s[kg] if j < 0 and members[g] == 1 else 0.0)
        load[h] += delta_h - (fixed_s[kh] if fresh else 0.0)
        held[g] -= more
        held[h] += more
        assign[i] = h
        if j >= 0:
            assign[j] = g
            continue
        members[g] -= 1
        members[h] += 1
        if members[g] == 0:
            block[g], load[g], held[g] = -1, 0.0, 0
            num_live -= 1
            moved = live[num_live]
            live[place[g]], place[moved] = moved, place[g]
            place[g] = -1
            free[num_free] = g
            num_free += 1
