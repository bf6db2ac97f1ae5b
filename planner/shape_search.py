"""Hill climbing over the shape of a micro-batch: which degrees its groups have.

A shape is a partition of the ranks into allowed degrees; ranks left over become groups of one, which cost nothing while
empty. Moves split one group or merge several; every shape is judged by dealing the sequences to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from planner.balance import MIN_GAIN, Balanced, Shape, Shares, deal, relieve
from planner.problem import Problem

# Moves and swaps seldom gain more than this on an LPT deal.
_WITHIN_REACH = 1.05


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
    *,
    degrees: Sequence[int],
    num_climbs: int = 1,
) -> Balanced | None:
    """Find a good shape for one micro-batch, judging shapes by LPT: to the first better neighbour until there is none.

    Args:
        problem: The batch.
        shares: The micro-batch.
        starts: Shapes to begin with.
        expired: Says that time is over; the best so far is returned.
        degrees: Degrees that moves may use, ascending, starting with 1.
        num_climbs: From how many of the starts, the best ones, to climb.

    Returns:
        The best balanced groups found, or `None` if LPT could fill none of the starts within memory.
    """
    dealt = [deal(shares, shape) for shape in dict.fromkeys(starts)]
    feasible = sorted((start for start in dealt if start is not None), key=lambda start: start.makespan_s)
    if not feasible:
        return None

    def dealt_better(shape: Shape, best: Balanced) -> Balanced | None:
        return deal(shares, shape, best.makespan_s * (1 - MIN_GAIN))

    peaks = [_uphill(start, dealt_better, degrees, expired) for start in feasible[:num_climbs]]
    return min((relieve(problem, peak) for peak in peaks), key=lambda peak: peak.makespan_s)


def polish(problem: Problem, shares: Shares, best: Balanced, expired: Callable[[], bool]) -> Balanced:
    """Climb on from `best`, judging shapes after moves and swaps: slower than `climb`, and finer. Never worse."""

    def relieved_better(shape: Shape, best: Balanced) -> Balanced | None:
        near = deal(shares, shape, best.makespan_s * _WITHIN_REACH)
        better = None if near is None else relieve(problem, near)
        return better if better is not None and better.makespan_s < best.makespan_s * (1 - MIN_GAIN) else None

    return _uphill(best, relieved_better, problem.degrees, expired)


def _uphill(
    best: Balanced,
    better_at: Callable[[Shape, Balanced], Balanced | None],
    degrees: Sequence[int],
    expired: Callable[[], bool],
) -> Balanced:
    judged = {best.shape}
    improved = True
    while improved:
        improved = False
        for shape in neighbour_shapes(best.shape, degrees):
            if expired():
                return best
            if shape in judged:
                continue
            judged.add(shape)
            better = better_at(shape, best)
            if better is not None:
                best, improved = better, True
                break
    return best


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
