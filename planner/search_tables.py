"""A problem as plain arrays for compiled searches, sequences in descending length; and drafts from their results.

A search state is three arrays: ``assign`` [sequences] -> group slot, ``kind`` [slots] (-1: no group) and ``batch``
[slots] -> micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from planner.problem import Draft, DraftGroup, FloatArray, IntArray, Problem

BoolArray = npt.NDArray[np.bool_]


class PackingTables(NamedTuple):
    """What a compiled check needs to say whether groups find ranks at the same time.

    Attributes:
        only_sum: Groups always find ranks if their degrees sum to at most the number of ranks.
        order: Kinds in the order in which they are packed.
        spans: By kind, whether it may lie on several nodes.
        serves: [kinds, nodes], whether the node's GPUs are as good as the kind demands.
        num_gpus: By node.
    """

    only_sum: bool
    order: IntArray
    spans: BoolArray
    serves: BoolArray
    num_gpus: IntArray


@dataclass(frozen=True)
class SearchTables:
    """Arrays of one problem.

    Attributes:
        ids: Sequence ids, longest first; all other arrays are in this order.
        tokens: Tokens of each sequence.
        share_s: Seconds each sequence adds to a group, [kinds, sequences].
        fixed_s: Seconds of a group before its first sequence, by kind.
        max_tokens: By kind.
        degree: By kind.
        first_kind: By degree from 0 to the number of ranks, the first kind of that degree.
        num_kinds: By degree, how many kinds there are; 0 where the degree is not allowed.
        packing: For the check of ranks.
        num_ranks: Ranks of the job.
    """

    ids: IntArray
    tokens: IntArray
    share_s: FloatArray
    fixed_s: FloatArray
    max_tokens: IntArray
    degree: IntArray
    first_kind: IntArray
    num_kinds: IntArray
    packing: PackingTables
    num_ranks: int

    @classmethod
    def of(cls, problem: Problem) -> SearchTables:
        """Build the arrays."""
        ids = np.asarray(problem.descending, dtype=np.int64)
        degree = np.asarray(problem.degrees, dtype=np.int64)
        first, num = np.zeros((2, problem.num_ranks + 1), dtype=np.int64)
        for k in reversed(range(len(degree))):
            first[degree[k]] = k
            num[degree[k]] += 1
        return cls(
            ids=ids,
            tokens=np.asarray(problem.lengths, dtype=np.int64)[ids],
            share_s=np.ascontiguousarray(problem.share_s[:, ids]),
            fixed_s=np.asarray(problem.fixed_s),
            max_tokens=np.asarray(problem.max_tokens, dtype=np.int64),
            degree=degree,
            first_kind=first,
            num_kinds=num,
            packing=_packing(problem),
            num_ranks=problem.num_ranks,
        )

    def draft(self, assign: IntArray, kind: IntArray, batch: IntArray) -> Draft:
        """Return the groups that have sequences, by micro-batch, as a draft with sequence ids."""
        members: dict[int, list[int]] = {}
        for position, group in enumerate(assign.tolist()):
            members.setdefault(group, []).append(int(self.ids[position]))
        micro_batches: dict[int, list[DraftGroup]] = {}
        for group, sequences in sorted(members.items()):
            micro_batches.setdefault(int(batch[group]), []).append(DraftGroup(int(kind[group]), tuple(sequences)))
        return tuple(tuple(groups) for _, groups in sorted(micro_batches.items()))

    def state(self, draft: Draft, num_slots: int) -> tuple[IntArray, IntArray, IntArray]:
        """Return the state of a draft; ranks that no group uses become empty groups where that is allowed."""
        place = np.empty(len(self.ids), dtype=np.int64)
        place[self.ids] = np.arange(len(self.ids))
        assign = np.zeros(len(self.ids), dtype=np.int64)
        kind = np.full(num_slots, -1, dtype=np.int64)
        batch = np.zeros(num_slots, dtype=np.int64)
        slot = 0
        for m, micro_batch in enumerate(draft):
            left = self.num_ranks
            for group in micro_batch:
                kind[slot], batch[slot] = group.kind, m
                assign[place[list(group.sequences)]] = slot
                left -= int(self.degree[group.kind])
                slot += 1
            if self.packing.only_sum:
                for k in reversed(range(len(self.degree))):
                    while self.degree[k] <= left:
                        kind[slot], batch[slot] = k, m
                        left -= int(self.degree[k])
                        slot += 1
        return assign, kind, batch


def _packing(problem: Problem) -> PackingTables:
    nodes, kinds = problem.cluster.nodes, problem.kinds
    serves = np.asarray([[node.serves(kind) for node in nodes] for kind in kinds])
    order = sorted(
        range(len(kinds)), key=lambda k: (not kinds[k].spans_nodes, int(serves[k].sum()), -kinds[k].degree, k)
    )
    sizes = {node.num_gpus for node in nodes[:-1]}
    powers = all(degree & (degree - 1) == 0 for degree in problem.degrees)
    aligned = powers and len(sizes) == 1 and _is_power(sizes.copy().pop()) and nodes[-1].num_gpus <= max(sizes)
    only_sum = bool(serves.all()) and (len(nodes) == 1 or aligned)
    return PackingTables(
        only_sum,
        np.asarray(order, dtype=np.int64),
        np.asarray([kind.spans_nodes for kind in kinds]),
        serves,
        np.asarray([node.num_gpus for node in nodes], dtype=np.int64),
    )


def _is_power(number: int) -> bool:
    return number & (number - 1) == 0
