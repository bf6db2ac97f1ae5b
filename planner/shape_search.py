"""Hill climbing over the shape of a micro-batch: which degrees its groups have.

A shape is a partition of the ranks into allowed degrees; ranks left over become groups of one, which cost nothing while
empty. Moves split one group or merge several; every shape is judged by dealing the sequences to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from planner.balance import MIN_GAIN, Balanced, Shape, Shares, deal, relieve
from planner.problem import Problem


def homogeneous_shape(num_ranks: int, degree: int) -> Shape:
    """Return as many groups of `degree` as fit; the other ranks stay idle."""
    return (degree,) * (num_ranks // degree)


def filled_shape(groups: Sequence[int], num_ranks: int, degrees: Sequence[int]) -> Shape:
    """Return `groups` and, on the ranks they leave, the largest allowed groups that fit; descending."""
    shape, left = list(groups), num_ranks - sum(groups)
    for degree in reversed(degrees):
        count, left = divmod(left, degree)
        shape += [degree] * count
    return tuple(sorted(shape, reverse=True))


def neighbour_shapes(shape: Shape, degrees: Sequence[int]) -> Iterator[Shape]:
    """Yield the shapes one split, merge or shift away; small steps first, each shape once.

    - split: a group of d becomes groups of an allowed e < d, the rest filled up.
    - merge: the groups of degree at most d, largest first, join to one of an allowed e that they sum to exactly.
    - shift: a rank goes from one group to another (only where consecutive degrees are allowed).
    """
    seen = {shape}
    for candidate in _unfiltered_neighbours(shape, degrees):
        if candidate not in seen:
            seen.add(candidate)
            yield candidate


def climb(
    problem: Problem,
    shares: Shares,
    starts: Sequence[Shape],
    expired: Callable[[], bool],
) -> Balanced | None:
    """Find a good shape for one micro-batch: best start, then the first better neighbour until there is none.

    Args:
        problem: The batch.
        shares: The micro-batch.
        starts: Shapes to begin with.
        expired: Says that time is over; the best so far is returned.

    Returns:
        The best balanced groups found, or `None` if LPT could fill none of the shapes within memory.
    """
    judged: set[Shape] = set()
    best: Balanced | None = None
    for shape in starts:
        if shape not in judged:
            judged.add(shape)
            best = deal(shares, shape, _cutoff_s(best)) or best
    if best is None:
        return None
    improved = True
    while improved and not expired():
        improved = False
        for shape in neighbour_shapes(best.shape, problem.degrees):
            if shape in judged:
                continue
            judged.add(shape)
            better = deal(shares, shape, _cutoff_s(best))
            if better is not None:
                best, improved = better, True
                break
            if expired():
                break
    return relieve(problem, best)


def _cutoff_s(best: Balanced | None) -> float:
    return math.inf if best is None else best.makespan_s * (1 - MIN_GAIN)


def _unfiltered_neighbours(shape: Shape, degrees: Sequence[int]) -> Iterator[Shape]:
    present = sorted(set(shape))
    allowed = set(degrees)
    # The steps between neighbouring degrees come first: they are the likeliest to help.
    for distance in range(1, len(degrees)):
        for index, small in enumerate(degrees):
            large = degrees[index + distance] if index + distance < len(degrees) else None
            if large is None:
                break
            if large in present:
                yield _split(shape, large, small, degrees)
            if small in present:
                merged = _merge(shape, small, large)
                if merged is not None:
                    yield merged
    for giver in present:
        for taker in present:
            two = giver != taker or shape.count(giver) > 1
            if two and giver - 1 in allowed and taker + 1 in allowed:
                yield _replaced(shape, (giver, taker), (giver - 1, taker + 1))


def _split(shape: Shape, large: int, small: int, degrees: Sequence[int]) -> Shape:
    pieces = filled_shape((small,) * (large // small), large, degrees)
    return _replaced(shape, (large,), pieces)


def _merge(shape: Shape, start: int, target: int) -> Shape | None:
    taken: list[int] = []
    missing = target
    for degree in shape:
        if degree <= start and degree <= missing:
            taken.append(degree)
            missing -= degree
    return _replaced(shape, taken, (target,)) if missing == 0 and len(taken) > 1 else None


def _replaced(shape: Shape, removed: Sequence[int], added: Sequence[int]) -> Shape:
    result = list(shape)
    for degree in removed:
        result.remove(degree)
    return tuple(sorted([*result, *added], reverse=True))
