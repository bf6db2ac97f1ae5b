"""The compiled inner loop of simulated annealing over whole plans: which group holds which sequence, and the shapes.

A *block* is what a group's time counts towards. Under per-layer the blocks are the micro-batches; the objective is

    sum over blocks of (sum over groups (d/N) * (T_g/reference)^p)^(1/p) * reference

a smooth stand-in for the sum of the slowest groups: the mean of powers, weighted by ranks, tends to the maximum as p
grows. Memory is a penalty, ``weight * sum max(0, tokens/capacity - 1)``. Moves, each judged by Metropolis:

    move      one sequence to another group
    swap      two sequences of different groups, often of similar length
    exchange  two groups of one kind between their micro-batches
    reform    one or two groups of a micro-batch become one or two of other kinds, their sequences dealt anew

Powers are repeated squares, so that one proposal costs some tens of nanoseconds.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from planner.compiled import compiled
from planner.fill_kernels import packs

Array = Any


@compiled
def _random(state: Array) -> float:
    """Return a number in [0, 1): xorshift64*, seeded with anything but 0."""
    x = state[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    state[0] = x
    return float((x * np.uint64(2685821657736338717)) >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@compiled
def _below(state: Array, count: int) -> int:
    return int(_random(state) * count)


@compiled
def _power(x: float, squarings: int) -> float:
    for _ in range(squarings):
        x *= x
    return x


@compiled
def _root(x: float, squarings: int) -> float:
    for _ in range(squarings):
        x = math.sqrt(x)
    return x


@compiled
def _over(tokens: float, capacity: float) -> float:
    return tokens / capacity - 1.0 if tokens > capacity else 0.0


@compiled
def load_groups(
    assign: Array, kind: Array, share_s: Array, tokens: Array, load: Array, held: Array, members: Array
) -> None:
    """Write seconds (without the fixed part), tokens and number of sequences of every slot."""
    load[:] = 0.0
    held[:] = 0
    members[:] = 0
    for i in range(assign.size):
        g = assign[i]
        load[g] += share_s[kind[g], i]
        held[g] += tokens[i]
        members[g] += 1


@compiled
def judge(
    kind: Array,
    batch: Array,
    fixed_s: Array,
    max_tokens: Array,
    num_batches: int,
    load: Array,
    held: Array,
    members: Array,
) -> tuple[float, int]:
    """Return the sum over micro-batches of the slowest group, and how many groups overflow their memory."""
    slowest = np.zeros(num_batches)
    overfull = 0
    for g in range(kind.size):
        if members[g] > 0:
            slowest[batch[g]] = max(slowest[batch[g]], load[g] + fixed_s[kind[g]])
            if held[g] > max_tokens[kind[g]]:
                overfull += 1
    return slowest.sum(), overfull


@compiled
def anneal(
    assign: Array,
    kind: Array,
    batch: Array,
    num_batches: int,
    tokens: Array,
    share_s: Array,
    fixed_s: Array,
    max_tokens: Array,
    degree: Array,
    first_kind: Array,
    num_kinds: Array,
    packing: Any,
    num_ranks: int,
    load: Array,
    held: Array,
    members: Array,
    reference_s: float,
    squarings: int,
    temperature_s: float,
    memory_weight_s: float,
    reform_share: float,
    steps: int,
    random: Array,
) -> None:
    """Make `steps` proposals at one temperature; the state (assign, kind, batch, load, held, members) is changed.

    Args:
        assign: [sequences] slot of each sequence.
        kind: [slots] kind, -1 where the slot is free.
        batch: [slots] micro-batch.
        num_batches: Micro-batches.
        reference_s: Seconds that powers are taken relative to, about a micro-batch.
        squarings: p = 2^squarings.
        temperature_s: Metropolis temperature.
        memory_weight_s: Seconds that an overflow of a whole capacity costs.
        reform_share: Share of the proposals that change a shape.
        steps: Proposals.
        random: One uint64, the generator's state.
    """
    n, num_slots, num_all_kinds = assign.size, kind.size, degree.size
    power = np.zeros(num_batches)
    counts = np.zeros((num_batches, num_all_kinds), dtype=np.int64)
    live = np.empty(num_slots, dtype=np.int64)
    place = np.full(num_slots, -1, dtype=np.int64)
    free = np.empty(num_slots, dtype=np.int64)
    num_live, num_free = 0, 0
    for g in range(num_slots):
        if kind[g] < 0:
            free[num_free] = g
            num_free += 1
            continue
        live[num_live], place[g] = g, num_live
        num_live += 1
        counts[batch[g], kind[g]] += 1
        if members[g] > 0:
            t = (load[g] + fixed_s[kind[g]]) / reference_s
            power[batch[g]] += degree[kind[g]] / num_ranks * _power(t, squarings)
    weight = degree / num_ranks
    new_load, new_held, new_members = np.zeros(2), np.zeros(2, dtype=np.int64), np.zeros(2, dtype=np.int64)
    new_kind = np.zeros(2, dtype=np.int64)
    for _ in range(steps):
        chance = _random(random)
        if chance < 0.05:
            # Exchange two groups of one kind between micro-batches.
            g, h = live[_below(random, num_live)], live[_below(random, num_live)]
            if kind[g] != kind[h] or batch[g] == batch[h]:
                continue
            k = kind[g]
            a = weight[k] * _power((load[g] + fixed_s[k]) / reference_s, squarings) if members[g] > 0 else 0.0
            b = weight[k] * _power((load[h] + fixed_s[k]) / reference_s, squarings) if members[h] > 0 else 0.0
            one, two = batch[g], batch[h]
            p1, p2 = max(0.0, power[one] - a + b), max(0.0, power[two] - b + a)
            change = reference_s * (
                _root(p1, squarings)
                + _root(p2, squarings)
                - _root(power[one], squarings)
                - _root(power[two], squarings)
            )
            if change <= 0.0 or _random(random) < math.exp(-change / temperature_s):
                power[one], power[two] = p1, p2
                batch[g], batch[h] = two, one
            continue
        if chance < 0.05 + reform_share:
            g = live[_below(random, num_live)] if _random(random) < 0.5 else assign[_below(random, n)]
            k, m = kind[g], batch[g]
            h, num_new = -1, 1
            way = _random(random)
            checked = not packing.only_sum
            if way < 0.15:
                # Another kind, or a second group on idle ranks.
                num_new = 1 if way < 0.08 else 2
                new_kind[num_new - 1] = _below(random, num_all_kinds)
                if num_new == 2:
                    if num_free == 0:
                        continue
                    new_kind[0] = k
                    h = -2
                elif new_kind[0] == k:
                    continue
                checked = True
            elif way < 0.5:
                # Split.
                if degree[k] < 2:
                    continue
                part = degree[k] // 2
                if _random(random) < 0.5 and num_kinds[degree[k] - 1] > 0:
                    part = 1 + _below(random, degree[k] - 1)
                if num_kinds[part] == 0 or num_kinds[degree[k] - part] == 0 or num_free == 0:
                    continue
                num_new = 2
                new_kind[0] = first_kind[part] + _below(random, num_kinds[part])
                rest = degree[k] - part
                new_kind[1] = first_kind[rest] + _below(random, num_kinds[rest])
                h = -2
            else:
                # Merge with a group of the same micro-batch, or shift a rank to it.
                for _ in range(8):
                    other = live[_below(random, num_live)] if _random(random) < 0.5 else assign[_below(random, n)]
                    if other != g and batch[other] == m:
                        h = other
                        break
                if h < 0:
                    continue
                total = degree[k] + degree[kind[h]]
                if way < 0.85:
                    if num_kinds[total] == 0:
                        continue
                    new_kind[0] = first_kind[total] + _below(random, num_kinds[total])
                else:
                    less = degree[k] - 1
                    if less < 1 or num_kinds[less] == 0 or num_kinds[total - less] == 0:
                        continue
                    num_new = 2
                    new_kind[0] = first_kind[less] + _below(random, num_kinds[less])
                    new_kind[1] = first_kind[total - less] + _below(random, num_kinds[total - less])
            if checked:
                counts[m, k] -= 1
                if h >= 0:
                    counts[m, kind[h]] -= 1
                for q in range(num_new):
                    counts[m, new_kind[q]] += 1
                possible = packs(counts[m], degree, num_ranks, packing)
                counts[m, k] += 1
                if h >= 0:
                    counts[m, kind[h]] += 1
                for q in range(num_new):
                    counts[m, new_kind[q]] -= 1
                if not possible:
                    continue
            for q in range(2):
                new_load[q], new_held[q], new_members[q] = 0.0, 0, 0
            for i in range(n):
                if assign[i] == g or (h >= 0 and assign[i] == h):
                    q = 0
                    if num_new == 2:
                        end0 = new_load[0] + fixed_s[new_kind[0]] + share_s[new_kind[0], i]
                        end1 = new_load[1] + fixed_s[new_kind[1]] + share_s[new_kind[1], i]
                        q = 0 if end0 <= end1 else 1
                    new_load[q] += share_s[new_kind[q], i]
                    new_held[q] += tokens[i]
                    new_members[q] += 1
            change_power, change_over = 0.0, 0.0
            if members[g] > 0:
                change_power -= weight[k] * _power((load[g] + fixed_s[k]) / reference_s, squarings)
                change_over -= _over(held[g], max_tokens[k])
            if h >= 0 and members[h] > 0:
                change_power -= weight[kind[h]] * _power((load[h] + fixed_s[kind[h]]) / reference_s, squarings)
                change_over -= _over(held[h], max_tokens[kind[h]])
            for q in range(num_new):
                if new_members[q] > 0:
                    k2 = new_kind[q]
                    change_power += weight[k2] * _power((new_load[q] + fixed_s[k2]) / reference_s, squarings)
                    change_over += _over(new_held[q], max_tokens[k2])
            p1 = max(0.0, power[m] + change_power)
            change = reference_s * (_root(p1, squarings) - _root(power[m], squarings)) + memory_weight_s * change_over
            if change > 0.0 and _random(random) >= math.exp(-change / temperature_s):
                continue
            power[m] = p1
            counts[m, k] -= 1
            if h >= 0:
                counts[m, kind[h]] -= 1
            second = h
            if num_new == 2 and h < 0:
                num_free -= 1
                second = free[num_free]
                live[num_live], place[second] = second, num_live
                num_live += 1
                batch[second] = m
            end0, end1 = fixed_s[new_kind[0]], fixed_s[new_kind[1]] if num_new == 2 else 0.0
            for i in range(n):
                if assign[i] == g or (h >= 0 and assign[i] == h):
                    if num_new == 1:
                        assign[i] = g
                        continue
                    if end0 + share_s[new_kind[0], i] <= end1 + share_s[new_kind[1], i]:
                        end0 += share_s[new_kind[0], i]
                        assign[i] = g
                    else:
                        end1 += share_s[new_kind[1], i]
                        assign[i] = -1 - second
            for i in range(n):
                if assign[i] < 0:
                    assign[i] = -1 - assign[i]
            kind[g], load[g], held[g], members[g] = new_kind[0], new_load[0], new_held[0], new_members[0]
            counts[m, new_kind[0]] += 1
            if num_new == 2:
                kind[second], load[second], held[second], members[second] = (
                    new_kind[1],
                    new_load[1],
                    new_held[1],
                    new_members[1],
                )
                counts[m, new_kind[1]] += 1
            elif h >= 0:
                kind[h], load[h], held[h], members[h] = -1, 0.0, 0, 0
                num_live -= 1
                moved = live[num_live]
                live[place[h]], place[moved] = moved, place[h]
                place[h] = -1
                free[num_free] = h
                num_free += 1
            continue
        i = _below(random, n)
        g = assign[i]
        j, kg = -1, kind[g]
        if _random(random) < 0.5:
            h = live[_below(random, num_live)]
            if h == g:
                continue
            kh = kind[h]
            load_g, load_h = load[g] - share_s[kg, i], load[h] + share_s[kh, i]
            held_g, held_h = held[g] - tokens[i], held[h] + tokens[i]
            members_g, members_h = members[g] - 1, members[h] + 1
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
            kh = kind[h]
            load_g = load[g] - share_s[kg, i] + share_s[kg, j]
            load_h = load[h] - share_s[kh, j] + share_s[kh, i]
            more = tokens[i] - tokens[j]
            held_g, held_h = held[g] - more, held[h] + more
            members_g, members_h = members[g], members[h]
        old_g = weight[kg] * _power((load[g] + fixed_s[kg]) / reference_s, squarings)
        old_h = weight[kh] * _power((load[h] + fixed_s[kh]) / reference_s, squarings) if members[h] > 0 else 0.0
        new_g = weight[kg] * _power((load_g + fixed_s[kg]) / reference_s, squarings) if members_g > 0 else 0.0
        new_h = weight[kh] * _power((load_h + fixed_s[kh]) / reference_s, squarings)
        one, two = batch[g], batch[h]
        p2 = 0.0
        if one == two:
            p1 = max(0.0, power[one] - old_g - old_h + new_g + new_h)
            change = reference_s * (_root(p1, squarings) - _root(power[one], squarings))
        else:
            p1 = max(0.0, power[one] - old_g + new_g)
            p2 = max(0.0, power[two] - old_h + new_h)
            change = reference_s * (
                _root(p1, squarings)
                + _root(p2, squarings)
                - _root(power[one], squarings)
                - _root(power[two], squarings)
            )
        cap_g, cap_h = max_tokens[kg], max_tokens[kh]
        if held_g > cap_g or held_h > cap_h or held[g] > cap_g or held[h] > cap_h:
            change += memory_weight_s * (
                _over(held_g, cap_g) + _over(held_h, cap_h) - _over(held[g], cap_g) - _over(held[h], cap_h)
            )
        if change <= 0.0 or _random(random) < math.exp(-change / temperature_s):
            power[one] = p1
            if one != two:
                power[two] = p2
            load[g], load[h] = load_g, load_h
            held[g], held[h] = held_g, held_h
            members[g], members[h] = members_g, members_h
            assign[i] = h
            if j >= 0:
                assign[j] = g
