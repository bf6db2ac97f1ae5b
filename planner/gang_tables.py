"""The sets of ranks that groups may run on under per-step, as arrays; and plans from search states.

A *block* is such a set, for one kind: those that `Cluster.place` gives to as many groups of the kind as find ranks. With
powers of two and nodes of powers of two, any two blocks are disjoint or one inside the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from planner.baselines import homogeneous_shape
from planner.gang_schedule import GangGroup, GangPlan, best_order
from planner.problem import IntArray, Problem
from planner.search_tables import SearchTables


class BlockTables(NamedTuple):
    """Blocks, those of one kind side by side.

    Attributes:
        start: By block, its first place in `ranks`; one more at the end.
        ranks: Ranks of all blocks.
        kind: By block.
        first: By kind, its first block.
        num: By kind, its blocks; 0 where the cluster has no place for it.
    """

    start: IntArray
    ranks: IntArray
    kind: IntArray
    first: IntArray
    num: IntArray


@dataclass
class GangState:
    """A plan in the making: the slot of every sequence, longest first, and the block of every slot (-1: free)."""

    assign: IntArray
    block: IntArray

    def copy(self) -> GangState:
        """Return a state that shares nothing."""
        return GangState(self.assign.copy(), self.block.copy())


@dataclass(frozen=True)
class GangTables:
    """Arrays of one problem: those of every search, and the blocks."""

    problem: Problem
    search: SearchTables
    blocks: BlockTables

    @classmethod
    def of(cls, problem: Problem) -> GangTables:
        """Build the arrays."""
        search = SearchTables.of(problem)
        start: list[int] = [0]
        ranks: list[int] = []
        kinds: list[int] = []
        first: list[int] = []
        num: list[int] = []
        for k, kind in enumerate(problem.kinds):
            count = int(homogeneous_shape(search, k)[k])
            places = problem.cluster.place([kind] * count)
            while places is None:
                count //= 2
                places = problem.cluster.place([kind] * count)
            first.append(len(kinds))
            num.append(count)
            for block in places:
                ranks += block
                start.append(len(ranks))
                kinds.append(k)
        arrays = (np.asarray(values, dtype=np.int64) for values in (start, ranks, kinds, first, num))
        return cls(problem, search, BlockTables(*arrays))

    def groups(self, state: GangState) -> list[GangGroup]:
        """Return the groups of a state."""
        members: dict[int, list[int]] = {}
        for position, slot in enumerate(state.assign.tolist()):
            members.setdefault(slot, []).append(int(self.search.ids[position]))
        groups = []
        for slot, sequences in sorted(members.items()):
            b = int(state.block[slot])
            ranks = self.blocks.ranks[self.blocks.start[b] : self.blocks.start[b + 1]]
            groups.append(GangGroup(int(self.blocks.kind[b]), tuple(ranks.tolist()), tuple(sequences)))
        return groups

    def plan(self, state: GangState) -> tuple[GangPlan, float]:
        """Return the plan of a state, and the seconds of the step."""
        return best_order(self.problem, self.groups(state))
