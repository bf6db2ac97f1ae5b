"""What programs that bound a step count instead of single groups and sequences: merged kinds and buckets of lengths.

A bucket's sequences count as a mixture of its shortest and its longest length, so that tokens are exact; their times are
the chord between the two, lowered until it is below all of them. Dual feasible functions say how many sequences share a
group at most.

Source: Fekete and Schepers, "New classes of fast lower bounds for bin packing problems" (2001).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.problem import FloatArray, IntArray, Problem

_MAX_LONG_BUCKETS = 24
# So many kinds are told apart; beyond, kinds of similar degree are merged.
_MAX_KINDS = 16


@dataclass(frozen=True)
class MergedKind:
    """One kind, or several merged into one that is at least as good as each."""

    work: FloatArray  # [sequences] rank-seconds
    time: FloatArray  # [sequences] seconds
    fixed_s: float
    least_degree: int
    most_degree: int
    max_tokens: int
    tokens_per_rank: float
    pool: frozenset[int]


@dataclass(frozen=True)
class Bucket:
    """Sequences of similar length as a mixture of two lengths."""

    members: IntArray
    tokens: FloatArray
    num_short: float
    num_long: float

    @property
    def short_tokens(self) -> float:
        """Its shortest length."""
        return float(self.tokens[0])

    @property
    def long_tokens(self) -> float:
        """Its longest length."""
        return float(self.tokens[-1])


def dual_feasible(share: FloatArray) -> list[FloatArray]:
    """Return values of dual feasible functions: where shares of a bin sum to at most 1, so do these.

    Args:
        share: Shares of a bin that items take, above 0 and at most 1.
    """
    found = []
    for parts in range(1, 7):
        # On a whole number the function is less than above it, so rounding goes down: never more than the true value.
        found.append(np.maximum(np.floor((parts + 1) * share - 1e-9), 0.0) / parts)
    for small in (0.2, 0.25, 0.3, 0.34, 0.4, 0.45):
        # Items above 1 - small fill the bin, those below small count as nothing.
        found.append(np.where(share > 1 - small + 1e-9, 1.0, np.where(share < small + 1e-9, 0.0, share)))
    return found


def chord(bucket: Bucket, kind: MergedKind) -> tuple[float, float, float]:
    """Return the rank-seconds of the bucket's two lengths, and the least seconds of its sequences.

    The chord over the two is lowered until it is below the work of every sequence.
    """
    work, tokens = kind.work[bucket.members], bucket.tokens
    least_s = float(kind.time[bucket.members].min())
    if bucket.num_long == 0:
        return float(work.min()), 0.0, least_s
    share = (tokens - tokens[0]) / (tokens[-1] - tokens[0])
    chord = work[0] + (work[-1] - work[0]) * share
    lowered = max(0.0, float(np.max(chord - work)))
    return float(work[0]) - lowered, float(work[-1]) - lowered, least_s


def merged_kinds(problem: Problem) -> list[MergedKind]:
    groups: dict[object, list[int]] = {}
    nodes = problem.cluster.nodes
    pools = [frozenset(n for n, node in enumerate(nodes) if node.serves(kind)) for kind in problem.kinds]
    apart = len(problem.kinds) <= _MAX_KINDS
    for k, degree in enumerate(problem.degrees):
        groups.setdefault(k if apart else (degree.bit_length(), pools[k]), []).append(k)
    degrees, max_tokens = problem.degrees, problem.max_tokens
    return [
        MergedKind(
            work=np.min([problem.share_s[k] * degrees[k] for k in same], axis=0),
            time=np.min([problem.share_s[k] for k in same], axis=0),
            fixed_s=min(problem.fixed_s[k] for k in same),
            least_degree=min(degrees[k] for k in same),
            most_degree=max(degrees[k] for k in same),
            max_tokens=max(max_tokens[k] for k in same),
            tokens_per_rank=max(max_tokens[k] / degrees[k] for k in same),
            pool=pools[same[0]],
        )
        for same in groups.values()
    ]


def buckets_of(tokens: IntArray, capacities: Sequence[int]) -> list[Bucket]:
    """Cut the lengths at the capacities of groups, finely above the smallest and coarsely below a part of it."""
    least = max(1, min(capacities))
    distinct = np.unique(tokens[tokens > least])
    if len(distinct) <= _MAX_LONG_BUCKETS:
        edges = set(distinct.tolist())
    else:
        edges = set(np.geomspace(distinct[0], distinct[-1], _MAX_LONG_BUCKETS).astype(np.int64).tolist())
    edges |= {capacity + 1 for capacity in capacities if capacity < tokens.max()}
    edges |= {int(least / parts) + 1 for parts in (2, 3, 4, 6, 9, 14, 25, 60, 200)} | {1}
    bounds = np.asarray(sorted(edges), dtype=np.int64)
    place = np.searchsorted(bounds, tokens, side="right")
    buckets = []
    for index in np.unique(place):
        members = np.flatnonzero(place == index)
        members = members[np.argsort(tokens[members], kind="stable")]
        inside = tokens[members].astype(np.float64)
        low, high = inside[0], inside[-1]
        num_long = float(((inside - low) / (high - low)).sum()) if high > low else 0.0
        buckets.append(Bucket(members, inside, len(members) - num_long, num_long))
    return buckets
