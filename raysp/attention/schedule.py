"""Which rows of queries meet which rows of keys, block by block. Pure: no torch.distributed, no tensors that travel.

For every pair (query rank, key rank) the schedule lists blocks. A block is one kernel call: slices of both ranks'
local rows, cut into segments (one per document), either full or square causal. Over all pairs the blocks cover the
attention mask exactly once, so partial results merge and gradients add.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from raysp.attention.layout import Part, SequenceLayout


@dataclass(frozen=True)
class Rows:
    """Half-open range of local rows."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def index(self) -> slice:
        """The range as an index."""
        return slice(self.start, self.stop)

    def relative_to(self, outer: Rows) -> slice:
        """This range as an index into a tensor that holds only the rows ``outer``."""
        return slice(self.start - outer.start, self.stop - outer.start)

    def hull(self, other: Rows) -> Rows:
        """Smallest range that holds both; an empty range adds nothing."""
        if not len(self) or not len(other):
            return self if len(self) else other
        return Rows(min(self.start, other.start), max(self.stop, other.stop))


NO_ROWS = Rows(0, 0)


@dataclass(frozen=True)
class Segments:
    """Segment bounds of one kernel call, relative to its first row. No segment is empty in a schedule.

    Attributes:
        cu_q: Cumulative query rows, ``[segments + 1]``, from 0.
        cu_k: Cumulative key rows, likewise.
    """

    cu_q: tuple[int, ...]
    cu_k: tuple[int, ...]
    _on_device: dict[torch.device, tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def max_q(self) -> int:
        """Longest query segment."""
        return max((b - a for a, b in zip(self.cu_q, self.cu_q[1:], strict=False)), default=0)

    @property
    def max_k(self) -> int:
        """Longest key segment."""
        return max((b - a for a, b in zip(self.cu_k, self.cu_k[1:], strict=False)), default=0)

    def pieces(self) -> Iterator[tuple[slice, slice]]:
        """Query rows and key rows of each segment that has both."""
        bounds = zip(self.cu_q, self.cu_q[1:], self.cu_k, self.cu_k[1:], strict=False)
        for q_start, q_stop, k_start, k_stop in bounds:
            if q_stop > q_start and k_stop > k_start:
                yield slice(q_start, q_stop), slice(k_start, k_stop)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Both bounds as int32 tensors on ``device``, copied there once."""
        if device not in self._on_device:
            self._on_device[device] = (
                torch.tensor(self.cu_q, dtype=torch.int32, device=device),
                torch.tensor(self.cu_k, dtype=torch.int32, device=device),
            )
        return self._on_device[device]


@dataclass(frozen=True)
class Block:
    """One kernel call: query rows of one rank against key rows of one rank.

    Attributes:
        queries: Local rows of the query rank.
        keys: Local rows of the key rank.
        segments: Documents inside both ranges, in the same order.
        causal: Each segment is square and a query sees keys up to its own row; otherwise it sees all of its segment.
    """

    queries: Rows
    keys: Rows
    segments: Segments
    causal: bool


def pair_blocks(
    layout: SequenceLayout, query_rank: int, key_rank: int, *, causal: bool, key_part: int | None = None
) -> tuple[Block, ...]:
    """List the blocks of one pair of ranks; empty where no query of the one sees a key of the other.

    Args:
        layout: The cut of the documents.
        query_rank: Group rank that owns the queries.
        key_rank: Group rank that owns the keys.
        causal: Causal inside each document; otherwise every token of a document sees every other.
        key_part: Only keys of this part of the key rank (``SequenceLayout.parts``).

    Returns:
        Blocks in an order that depends on the layout alone.
    """
    key = ("blocks", query_rank, key_rank, causal, key_part)
    return layout.memo(key, lambda: _build_blocks(layout, query_rank, key_rank, causal, key_part))


def needed_rows(blocks: tuple[Block, ...], *, side: str) -> Rows:
    """Smallest range of rows that the blocks read: ``side`` is ``"queries"`` or ``"keys"``."""
    rows = NO_ROWS
    for block in blocks:
        rows = rows.hull(block.queries if side == "queries" else block.keys)
    return rows


def document_block(layout: SequenceLayout, *, causal: bool) -> Block:
    """The whole micro-batch in natural order as one block: what a rank that holds all tokens computes."""

    def build() -> Block:
        bounds = tuple(int(b) for b in np.cumsum([0, *layout.lengths]))
        everything = Rows(0, bounds[-1])
        return Block(everything, everything, Segments(bounds, bounds), causal)

    return layout.memo(("document_block", causal), build)


def _build_blocks(
    layout: SequenceLayout, query_rank: int, key_rank: int, causal: bool, key_part: int | None
) -> tuple[Block, ...]:
    blocks: list[Block] = []
    for queries in layout.parts(query_rank):
        for index, keys in enumerate(layout.parts(key_rank)):
            if key_part is None or index == key_part:
                blocks += _part_blocks(queries, keys, causal)
    return _fuse(blocks)


def _part_blocks(queries: Part, keys: Part, causal: bool) -> list[Block]:
    _, q_index, k_index = np.intersect1d(queries.documents, keys.documents, assume_unique=True, return_indices=True)
    blocks: list[Block] = []
    kinds: list[tuple[np.ndarray, bool]] = [(np.ones(len(q_index), dtype=bool), False)]
    if causal:
        full = keys.stops[k_index] <= queries.starts[q_index]
        diagonal = (keys.starts[k_index] == queries.starts[q_index]) & (keys.stops[k_index] == queries.stops[q_index])
        # A layout's pieces are equal or disjoint, so nothing else can carry work.
        kinds = [(full, False), (diagonal, True)]
    for chosen, block_is_causal in kinds:
        q_chosen, k_chosen = q_index[chosen], k_index[chosen]
        if not len(q_chosen):
            continue
        # A kernel call needs rows without gaps on both sides.
        gaps = np.flatnonzero((np.diff(q_chosen) != 1) | (np.diff(k_chosen) != 1)) + 1
        for q_run, k_run in zip(np.split(q_chosen, gaps), np.split(k_chosen, gaps), strict=True):
            cu_q = queries.rows[q_run[0] : q_run[-1] + 2]
            cu_k = keys.rows[k_run[0] : k_run[-1] + 2]
            segments = Segments(_from_zero(cu_q), _from_zero(cu_k))
            blocks.append(
                Block(Rows(int(cu_q[0]), int(cu_q[-1])), Rows(int(cu_k[0]), int(cu_k[-1])), segments, block_is_causal)
            )
    return blocks


def _from_zero(bounds: np.ndarray) -> tuple[int, ...]:
    return tuple(int(bound) for bound in bounds - bounds[0])


def _fuse(blocks: list[Block]) -> tuple[Block, ...]:
    """Join blocks of one document that lie side by side: fewer, larger kernel calls."""
    fused = _join_causal(blocks)
    for pass_over_keys in (True, False):
        joined: list[Block] = []
        for block in fused:
            if joined and (union := _joined(joined[-1], block, pass_over_keys)) is not None:
                joined[-1] = union
            else:
                joined.append(block)
        fused = joined
    return tuple(fused)


def _joined(first: Block, second: Block, over_keys: bool) -> Block | None:
    if first.causal or second.causal or len(first.segments.cu_q) != 2 or len(second.segments.cu_q) != 2:
        return None
    if over_keys and first.queries == second.queries and first.keys.stop == second.keys.start:
        return _full(first.queries, first.keys.hull(second.keys))
    if not over_keys and first.keys == second.keys and first.queries.stop == second.queries.start:
        return _full(first.queries.hull(second.queries), first.keys)
    return None


def _full(queries: Rows, keys: Rows) -> Block:
    return Block(queries, keys, Segments((0, len(queries)), (0, len(keys))), False)


def _join_causal(blocks: list[Block]) -> list[Block]:
    """[first x first causal, second x first full, second x second causal] of one document is one causal square."""
    for index in range(len(blocks) - 2):
        first, middle, last = blocks[index : index + 3]
        if (
            (first.causal, middle.causal, last.causal) == (True, False, True)
            and len(first.segments.cu_q) == len(middle.segments.cu_q) == len(last.segments.cu_q) == 2
            and middle.keys == first.keys == first.queries
            and middle.queries == last.queries == last.keys
            and first.queries.stop == last.queries.start
        ):
            rows = Rows(first.queries.start, last.queries.stop)
            bounds = (0, len(rows))
            return [*blocks[:index], Block(rows, rows, Segments(bounds, bounds), True), *blocks[index + 3 :]]
    return blocks
