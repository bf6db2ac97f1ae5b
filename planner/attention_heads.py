"""How the heads of parallel attention are shared out; the executors and the cost functions both ask here."""

from __future__ import annotations

import itertools


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
