"""Cutting a batch into micro-batches: sorted by length, contiguous, the largest number of tokens as small as possible.

Similar lengths meet in one micro-batch, so its groups finish together. How many micro-batches is tried from outside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


def split_contiguous(lengths: Sequence[int] | np.ndarray, count: int) -> list[slice]:
    """Cut `lengths` into at most `count` contiguous runs with the smallest possible maximum of tokens.

    Args:
        lengths: Tokens of every sequence, in the order to cut (usually descending).
        count: Micro-batches wanted, at least 1; fewer come back where the maximum needs fewer.

    Returns:
        Slices that cover every index once, in order, none empty.
    """
    ends = np.cumsum(np.asarray(lengths, dtype=np.int64))
    low, high = max(int(np.max(lengths)), -(-int(ends[-1]) // count)), int(ends[-1])
    while low < high:
        middle = (low + high) // 2
        if len(_greedy_runs(ends, middle, count)) <= count:
            high = middle
        else:
            low = middle + 1
    return _greedy_runs(ends, high, count)


def candidate_counts(minimum: int, num_sequences: int, *, num_tried: int = 4) -> Iterator[int]:
    """Yield micro-batch counts: a few from `minimum` up, then doubling to one sequence per micro-batch.

    The last count always yields a plan, since every sequence fits a group alone; callers stop when they have enough.
    """
    count = min(minimum, num_sequences)
    for _ in range(num_tried):
        if count >= num_sequences:
            break
        yield count
        count += 1
    while count < num_sequences:
        yield count
        count *= 2
    yield num_sequences


def _greedy_runs(ends: np.ndarray[tuple[int, ...], np.dtype[np.int64]], limit: int, count: int) -> list[slice]:
    runs: list[slice] = []
    start, used = 0, 0
    # One run beyond `count` already says that the limit is too low.
    while start < len(ends) and len(runs) <= count:
        stop = int(np.searchsorted(ends, used + limit, side="right"))
        runs.append(slice(start, stop))
        start, used = stop, int(ends[stop - 1])
    return runs
