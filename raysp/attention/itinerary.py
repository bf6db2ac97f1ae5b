"""How shards travel around a ring: which rank holds whose rows at which hop. Pure.

A shard of owner x leaves in direction d and visits rank (x + d*t) mod N at hop t = 1..N-1. What no remaining visitor
needs stays behind (``outbound``), which gives the causal zigzag ring its 0.75; what visitors give back travels with
the ring, or straight home, over the rows touched so far (``touched``, ``collected``).

Symbols: N degree, d direction (+1 or -1), t hop, side: whose rows travel, ``"queries"`` or ``"keys"``.
"""

from __future__ import annotations

from dataclasses import dataclass

from raysp.attention.layout import SequenceLayout
from raysp.attention.schedule import NO_ROWS, Block, Rows, needed_rows, pair_blocks


@dataclass(frozen=True)
class Itinerary:
    """The travel plan of one moving side around the whole ring, equal on every rank.

    Attributes:
        layout: The cut of the documents.
        direction: +1 sends to the next group rank, -1 to the previous.
        side: Whose rows travel; the other side stays.
        causal: Causal inside each document.
        key_part: Only blocks with keys of this part, where two streams share the keys.
    """

    layout: SequenceLayout
    direction: int
    side: str
    causal: bool
    key_part: int | None = None

    def visitor(self, owner: int, hop: int) -> int:
        """Rank where the owner's shard is at this hop; the owner itself at 0 and N."""
        return (owner + self.direction * hop) % self.layout.degree

    def owner(self, group_rank: int, hop: int) -> int:
        """Whose shard this rank holds at this hop."""
        return (group_rank - self.direction * hop) % self.layout.degree

    def blocks(self, owner: int, hop: int) -> tuple[Block, ...]:
        """Work of the visitor at this hop."""
        visitor = self.visitor(owner, hop)
        query_rank, key_rank = (owner, visitor) if self.side == "queries" else (visitor, owner)
        return pair_blocks(self.layout, query_rank, key_rank, causal=self.causal, key_part=self.key_part)

    def touched(self, owner: int, hop: int) -> Rows:
        """Rows of the owner that the visitor at this hop uses, and gives something back for."""
        return needed_rows(self.blocks(owner, hop), side=self.side)

    def outbound(self, owner: int, hop: int) -> Rows:
        """Rows of the owner that arrive at this hop: what this and all later visitors use."""
        return self._hulls(owner)[0][hop]

    def collected(self, owner: int, hop: int) -> Rows:
        """Rows of the owner for which visitors up to and with this hop have something to give back."""
        return self._hulls(owner)[1][hop]

    def rows_moved(self, *, with_return: bool) -> int:
        """Rows that all ranks together send, as a measure to choose a direction by.

        Args:
            with_return: Count the ring's way home of collected rows, twice: sums are kept in a wider dtype.
        """
        degree = self.layout.degree
        moved = 0
        for owner in range(degree):
            outbound, collected = self._hulls(owner)
            moved += sum(len(rows) for rows in outbound[1:degree])
            if with_return:
                moved += 2 * sum(len(rows) for rows in collected[1:degree])
        return moved

    def _hulls(self, owner: int) -> tuple[list[Rows], list[Rows]]:
        key = ("hulls", owner, self.direction, self.side, self.causal, self.key_part)
        return self.layout.memo(key, lambda: self._build_hulls(owner))

    def _build_hulls(self, owner: int) -> tuple[list[Rows], list[Rows]]:
        degree = self.layout.degree
        outbound, collected = [NO_ROWS] * (degree + 1), [NO_ROWS] * (degree + 1)
        for hop in range(1, degree):
            collected[hop] = collected[hop - 1].hull(self.touched(owner, hop))
        for hop in range(degree - 1, 0, -1):
            outbound[hop] = outbound[hop + 1].hull(self.touched(owner, hop))
        return outbound, collected


def least_itinerary(layout: SequenceLayout, *, side: str, causal: bool, with_return: bool) -> Itinerary:
    """Choose the direction that moves fewer rows; on a tie the shards go to the next rank.

    Causal zigzag: keys going backwards meet first the ranks that need all of them, then those that need half, so half
    of the trip is trimmed; sums collected on the way are trimmed going forwards.
    """

    def build() -> Itinerary:
        both = [Itinerary(layout, direction, side, causal) for direction in (1, -1)]
        return min(both, key=lambda itinerary: itinerary.rows_moved(with_return=with_return))

    return layout.memo(("itinerary", side, causal, with_return), build)
