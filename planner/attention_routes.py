"""Rows that ranks need of each other, and their way around a ring.

Symbols: N degree, B bundles of rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from planner.attention_work import FloatArray, IntArray

# Which of a rank's chunks: its first ones travel apart from its second ones in some methods.
FIRST_CHUNKS, SECOND_CHUNKS = 0, 1


@dataclass(frozen=True)
class Route:
    """Rows of every owner on their way around the ring, ``[N, N + 1]`` by owner and hop; 0 at hops 0 and N.

    Attributes:
        direction: +1 sends to the next rank, -1 to the previous.
        outbound: Rows that arrive at a hop: what this and all later visitors need.
        collected: Rows that visitors up to and with this hop used.
        touched: Rows that the visitor at this hop uses.
    """

    direction: int
    outbound: FloatArray
    collected: FloatArray
    touched: FloatArray

    def visitors(self, hop: int) -> IntArray:
        """Return the rank where each owner's rows are at a hop, ``[N]``; the owner itself at 0 and N."""
        degree = len(self.outbound)
        return (np.arange(degree) + self.direction * hop) % degree


@dataclass(frozen=True)
class Bundles:
    """Rows that others need, bundled where the same ranks need them; of what two ranks need, one needs a part.

    Attributes:
        owner: ``int64 [B]``.
        part: ``int64 [B]``, `SECOND_CHUNKS` or, for all others, `FIRST_CHUNKS`.
        rows: ``[B]``.
        share: ``[B, N]``, share of the rows that each rank needs, 0 to 1; 0 for the owner.
    """

    owner: IntArray
    part: IntArray
    rows: FloatArray
    share: FloatArray

    def of_part(self, part: int) -> Bundles:
        """Return the bundles of a part."""
        kept = self.part == part
        return Bundles(self.owner[kept], self.part[kept], self.rows[kept], self.share[kept])

    @cached_property
    def needed(self) -> FloatArray:
        """``[N, N]``: rows of the owner (row) that a rank (column) needs."""
        return self._by_owner(self.share)

    def route(self, direction: int) -> Route:
        """Return the way around the ring in a direction, +1 or -1."""
        degree = self.share.shape[1]
        visitors = (self.owner[:, None] + direction * np.arange(degree + 1)) % degree
        touched = np.take_along_axis(self.share, visitors, axis=1)
        outbound = np.maximum.accumulate(touched[:, ::-1], axis=1)[:, ::-1].copy()
        outbound[:, 0] = 0.0
        collected = np.maximum.accumulate(touched, axis=1)
        collected[:, degree] = 0.0
        return Route(direction, self._by_owner(outbound), self._by_owner(collected), self._by_owner(touched))

    def least_route(self, *, with_return: bool) -> Route:
        """Return the direction that moves fewer rows; +1 on a tie.

        Args:
            with_return: Count the rows collected on the way too, twice: sums are kept in a wider type.
        """
        routes = [self.route(direction) for direction in (1, -1)]
        weight = 2.0 if with_return else 0.0
        # A rounded sum must not decide a tie.
        return min(routes, key=lambda route: round(float((route.outbound + weight * route.collected).sum()), 3))

    def _by_owner(self, shares: FloatArray) -> FloatArray:
        summed = np.zeros((self.share.shape[1], shares.shape[1]))
        np.add.at(summed, self.owner, self.rows[:, None] * shares)
        return summed
