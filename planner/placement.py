"""Which ranks a group gets: groups in descending degree, ranks from 0 on.

With degrees that are powers of two every group starts at a multiple of its degree, so a group never straddles a node
that it could fit into. Ranks left over are idle in that micro-batch and appear in no group.
"""

from __future__ import annotations

from collections.abc import Sequence


def place(degrees: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the ranks of each group, in step with `degrees`, which must be descending."""
    placed: list[tuple[int, ...]] = []
    start = 0
    for degree in degrees:
        placed.append(tuple(range(start, start + degree)))
        start += degree
    return placed
