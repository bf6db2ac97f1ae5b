"""How shards travel around a ring: which rank holds whose rows at which hop. Pure.

A shard of owner x leaves in direction d and visits rank (x + d*t) mod N at hop t = 1..N-1. What no remaining visitor
needs stays behind (``outbound``), which gives the causal zigzag ring its 0.75 and a window its few hops; what visitors
give back travels with the ring, or straight home, over the rows touched so far (``touched``, ``collected``).

Symbols: N degree, d direction (+1 or -1), t hop, side: whose rows travel, ``"queries"`` or ``"keys"``.
"""

from __future__ import annotations

from dataclasses import dataclass

from raysp.attention.blocks import NO_ROWS, Block, Rows
from raysp.attention.schedule import Schedule


@dataclass(frozen=True)
class Itinerary:
    """The travel plan of one moving side around the whole ring, equal on every rank.

    Attributes:
        schedule: The work of the micro-batch.
        direction: +1 sends to the next group rank, -1 to the previous.
        side: Whose rows travel; the other side stays.
        key_part: Only blocks with keys of this part, where two streams share the keys.
    """

    schedule: Schedule
    direction: int
    side: str
    key_part: int | None = None

    def visitor(self, owner: int, hop: int) -> int:
        """Rank where the owner's shard is at this hop; the owner itself at 0 and N."""
        return (owner + self.direction * hop) % self.schedule.degree

    def owner(self, group_rank: int, hop: int) -> int:
        """Whose shard this rank holds at this hop."""
        return (group_rank - self.direction * hop) % self.schedule.degree

    def blocks(self, owner: int, hop: int) -> tuple[Block, ...]:
        """Work of the visitor at this hop."""
        query_rank, key_rank = self._pair(owner, hop)
        return self.schedule.pair(query_rank, key_rank, self.key_part)

    def touched(self, owner: int, hop: int) -> Rows:
        """Rows of the owner that the visitor at this hop uses, and gives something back for."""
        return self._hulls(owner)[2][hop]

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
        degree = self.schedule.degree
        moved = 0
        for owner in range(degree):
            outbound, collected, _ = self._hulls(owner)
            moved += sum(len(rows) for rows in outbound[1:degree])
            if with_return:
                moved += 2 * sum(len(rows) for rows in collected[1:degree])
        return moved

    def _pair(self, owner: int, hop: int) -> tuple[int, int]:
        visitor = self.visitor(owner, hop)
        return (owner, visitor) if self.side == "queries" else (visitor, owner)

    def _hulls(self, owner: int) -> tuple[list[Rows], list[Rows], list[Rows]]:
        key = ("hulls", owner, self.direction, self.side, self.key_part)
        return self.schedule.memo(key, lambda: self._build_hulls(owner))

    def _build_hulls(self, owner: int) -> tuple[list[Rows], list[Rows], list[Rows]]:
        degree = self.schedule.degree
        touched = [NO_ROWS] * (degree + 1)
        for hop in range(1, degree):
            query_rank, key_rank = self._pair(owner, hop)
            touched[hop] = self.schedule.rows_used(query_rank, key_rank, side=self.side, key_part=self.key_part)
        outbound, collected = [NO_ROWS] * (degree + 1), [NO_ROWS] * (degree + 1)
        for hop in range(1, degree):
            collected[hop] = collected[hop - 1].hull(touched[hop])
        for hop in range(degree - 1, 0, -1):
            outbound[hop] = outbound[hop + 1].hull(touched[hop])
        return outbound, collected, touched


def least_itinerary(schedule: Schedule, *, side: str, with_return: bool, key_part: int | None = None) -> Itinerary:
    """Choose the direction that moves fewer rows; on a tie the shards go to the next rank.

    Causal zigzag: keys going backwards meet first the ranks that need all of them, then those that need half, so half
    of the trip is trimmed; sums collected on the way are trimmed going forwards.
    """

    def build() -> Itinerary:
        both = [Itinerary(schedule, direction, side, key_part) for direction in (1, -1)]
        return min(both, key=lambda itinerary: itinerary.rows_moved(with_return=with_return))

    return schedule.memo(("itinerary", side, with_return, key_part), build)
