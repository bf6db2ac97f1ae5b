"""Deterministic shuffles: the same for a key on every machine, whatever else runs.

NumPy guarantees the raw stream of a bit generator across versions, but not what ``Generator.permutation`` makes of
it; so an order here is the stable sort of raw 64-bit draws.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# One stream per purpose, so that the split and the order of a pass never share draws.
SPLIT_STREAM = 1
PASS_STREAM = 2


def shuffled_order(count: int, *, stream: int, seed: int, index: int = 0) -> NDArray[np.int64]:
    """A permutation of ``range(count)`` that depends on the arguments alone.

    Args:
        count: Number of items, at least 0.
        stream: What the order is for (``SPLIT_STREAM``, ``PASS_STREAM``).
        seed: The user's seed, at least 0.
        index: Which order of that stream, for example the number of the pass; at least 0.

    Returns:
        int64 ``[count]``.

    Raises:
        ValueError: An argument is negative.
    """
    if min(count, stream, seed, index) < 0:
        raise ValueError(f"count={count}, stream={stream}, seed={seed}, index={index}; expected no negative number.")
    draws = np.random.PCG64(np.random.SeedSequence([stream, seed, index])).random_raw(count)
    return np.argsort(draws, kind="stable").astype(np.int64)
