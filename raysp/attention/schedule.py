"""Which rows of queries meet which rows of keys, block by block. Pure: nothing here communicates.

A block is one kernel call: a range of the query rank's rows, and of the key rank's rows a range or a pick from one, cut
into segments (one for each piece of a document). Over all pairs of ranks the blocks cover the mask exactly once, so
partial results merge and gradients add. Every method takes its work from here; they differ in what travels.

The usual hop is a single block. Where a window ends inside a pair of pieces the pieces become blocks of their own,
because flash kernels take one window for all segments of a call.

Symbols: T rows, N degree, W window; a *piece* is a run of one document on one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import numpy as np

from planner.attention_cut import works_apart
from planner.attention_work import visible_pairs
from raysp.attention.blocks import NO_ROWS, Block, Pick, Rows, Segments
from raysp.attention.layout import Part, SequenceLayout
from raysp.attention.mask import CAUSAL, FULL, DocumentMask, SegmentMask

_T = TypeVar("_T")


@dataclass(frozen=True)
class GatheredRows:
    """What one rank reads when it gathers keys: its own rows first, then of every other rank what it needs.

    Attributes:
        from_rank: For each group rank the rows of its shard that are read.
        offsets: Where they begin in the buffer, one entry more than ranks; the own rank's rows come first.
        blocks: Work of the rank on the buffer.
        apart: Work on its whole documents, on own key rows as they lie: those behind the ones in the buffer.
    """

    from_rank: tuple[Rows, ...]
    offsets: tuple[int, ...]
    blocks: tuple[Block, ...]
    apart: tuple[Block, ...]

    def cover(self, num_rows: int) -> bool:
        """Whether each of the rank's query rows is in a block; no row is in two."""
        return sum(len(block.queries) for block in (*self.blocks, *self.apart)) == num_rows


class Schedule:
    """All work of one micro-batch: a layout of the queries, one of the keys, and a mask.

    Made once and kept with the query layout; see ``schedule_of``.
    """

    def __init__(self, layout: SequenceLayout, key_layout: SequenceLayout, mask: DocumentMask) -> None:
        self.layout = layout
        self.key_layout = key_layout
        self.mask = mask
        self.degree = layout.degree
        self._memo: dict[Any, Any] = {}

    def memo(self, key: Any, build: Callable[[], _T]) -> _T:
        """Return what ``build`` made for ``key``, making it once."""
        if key not in self._memo:
            self._memo[key] = build()
        made: _T = self._memo[key]
        return made

    def pair(self, query_rank: int, key_rank: int, key_part: int | None = None) -> tuple[Block, ...]:
        """Blocks of one pair of ranks; empty where no query of the one sees a key of the other.

        Args:
            query_rank: Group rank that owns the queries.
            key_rank: Group rank that owns the keys.
            key_part: Only keys of this part of the key rank (``SequenceLayout.parts``).
        """

        def build() -> tuple[Block, ...]:
            parts, places = self._key_parts(key_rank, key_part)
            return _pair_blocks(self.layout.parts(query_rank), parts, places, self.mask)

        return self.memo(("pair", query_rank, key_rank, key_part), build)

    def rows_used(self, query_rank: int, key_rank: int, *, side: str, key_part: int | None = None) -> Rows:
        """Smallest range of rows that the blocks of a pair read, without forming the blocks.

        Args:
            query_rank: As in ``pair``.
            key_rank: As in ``pair``.
            side: ``"queries"`` or ``"keys"``: whose rows.
            key_part: As in ``pair``.
        """
        parts, places = self._key_parts(key_rank, key_part)
        rows = NO_ROWS
        for part in self.layout.parts(query_rank):
            seen = _seen(part, parts, places, self.mask)
            if not len(seen.piece):
                continue
            if side == "queries":
                first = part.rows[seen.piece]
                low, high = first, first + seen.query_high - part.starts[seen.piece]
            else:
                low, high = seen.row + seen.key_low - seen.start, seen.row + seen.stop - seen.start
            rows = rows.hull(Rows(int(low.min()), int(high.max())))
        return rows

    def _key_parts(self, key_rank: int, key_part: int | None) -> tuple[tuple[Part, ...], tuple[np.ndarray, ...]]:
        parts = self.key_layout.parts(key_rank)
        places = self.memo(
            ("places", key_rank), lambda: tuple(_piece_places(part, len(self.key_layout.lengths)) for part in parts)
        )
        chosen = slice(None) if key_part is None else slice(key_part, key_part + 1)
        return parts[chosen], places[chosen]

    def whole(self) -> Block:
        """All documents in natural order as one block: what a rank that holds all tokens computes."""

        def build() -> Block:
            cu_q, cu_k = (tuple(accumulate(x.lengths, initial=0)) for x in (self.layout, self.key_layout))
            return Block(Rows(0, cu_q[-1]), Rows(0, cu_k[-1]), Segments(cu_q, cu_k), self.mask.whole_segment)

        return self.memo("whole", build)

    def gathered(self, group_rank: int, *, apart: bool = True) -> GatheredRows:
        """The work of one rank on keys that it gathers from all.

        Args:
            group_rank: Which.
            apart: Whether its whole documents may be a call of their own; what it needs of other ranks stays the same.
        """
        return self.memo(("gathered", group_rank, apart), lambda: self._gather(group_rank, apart=apart))

    def _gather(self, group_rank: int, *, apart: bool) -> GatheredRows:
        num_own, is_apart = self.key_layout.local_tokens(group_rank), apart and self._is_apart(group_rank)
        whole = self.layout.parts(group_rank)[-1]
        own = Rows(0, int(whole.rows[0]) if is_apart else num_own)
        from_rank = tuple(
            own if rank == group_rank else self.rows_used(group_rank, rank, side="keys") for rank in range(self.degree)
        )
        order = [group_rank, *(rank for rank in range(self.degree) if rank != group_rank)]
        starts = dict(zip(order, accumulate((len(from_rank[rank]) for rank in order), initial=0), strict=False))
        offsets = (*(starts[rank] for rank in range(self.degree)), sum(len(rows) for rows in from_rank))
        place = np.full(self.key_layout.num_tokens, -1, dtype=np.int64)
        for rank in range(self.degree):
            tokens = self.key_layout.token_indices(rank).numpy()[from_rank[rank].index]
            place[tokens] = np.arange(starts[rank], starts[rank] + len(tokens))
        whole_blocks: tuple[Block, ...] = ()
        if is_apart:
            bounds = tuple((whole.rows - whole.rows[0]).tolist())
            rows = Rows(own.stop, num_own)
            whole_blocks = (Block(rows, rows, Segments(bounds, bounds), self.mask.whole_segment),)
        parts = self.layout.parts(group_rank)[: -1 if is_apart else None]
        return GatheredRows(from_rank, offsets, self._gathered_blocks(parts, place, offsets[-1]), whole_blocks)

    def _is_apart(self, group_rank: int) -> bool:
        """Whether the rank's whole documents, which a zigzag layout has in its last part, are a call of their own."""
        if self.key_layout is not self.layout or self.layout.order != "zigzag":
            return False
        pairs = [self._num_pairs(part) for part in self.layout.parts(group_rank)]
        return bool(works_apart(pairs[-1], sum(pairs)))

    def _num_pairs(self, part: Part) -> float:
        """Pairs of a part's queries with all the keys that they see."""
        starts, stops = part.starts.astype(np.float64), part.stops.astype(np.float64)
        if not self.mask.causal:
            return float(((stops - starts) * np.array(self.layout.lengths)[part.documents]).sum())
        window = self.mask.window
        return float((visible_pairs(stops, window) - visible_pairs(starts, window)).sum())

    def _gathered_blocks(self, parts: Sequence[Part], place: np.ndarray, num_rows: int) -> tuple[Block, ...]:
        """All keys of each query piece in natural order: one kernel call for everything. Picks count from row 0."""
        first_tokens = np.concatenate([[0], np.cumsum(self.key_layout.lengths)])
        reads: list[_Reads] = []
        for index, part in enumerate(parts):
            for piece in range(len(part.documents)):
                document, start, stop = (int(x[piece]) for x in (part.documents, part.starts, part.stops))
                low, high = 0, self.key_layout.lengths[document]
                if self.mask.causal:
                    low, high = max(0, start - (self.mask.window or start + 1) + 1), stop
                tokens = np.arange(first_tokens[document] + low, first_tokens[document] + high)
                reads.append(_Reads(part.rows[piece], part.rows[piece + 1], place[tokens], min(index, 1)))
        everything = Rows(0, num_rows)
        return tuple(
            block
            if block.pick is None
            else replace(block, keys=everything, pick=Pick(block.pick.index + block.keys.start, block.pick.cut))
            for block in _call(reads, self.mask.whole_segment)
        )


def schedule_of(layout: SequenceLayout, mask: DocumentMask, key_layout: SequenceLayout | None = None) -> Schedule:
    """Find or make the schedule of a layout.

    Args:
        layout: Of the queries; it keeps the schedule.
        mask: What a token sees of its document.
        key_layout: Of the keys; the queries' own by default.
    """
    keys = layout if key_layout is None or key_layout == layout else key_layout
    return layout.memo(("schedule", None if keys is layout else keys, mask), lambda: Schedule(layout, keys, mask))


@dataclass(frozen=True)
class _Reads:
    """Key rows that one query piece reads; ``side`` is 0 or 1: pieces of one side share no keys."""

    q_start: int
    q_stop: int
    keys: np.ndarray
    side: int


def _piece_places(part: Part, num_documents: int) -> np.ndarray:
    """``int64 [documents]``: which piece of the part each document has, or -1."""
    places = np.full(num_documents, -1, dtype=np.int64)
    places[part.documents] = np.arange(len(part.documents))
    return places


@dataclass(frozen=True)
class _Seen:
    """Key pieces that the pieces of one query part see, ``int64 [matches]`` each, ordered by query piece and position.

    Attributes:
        piece: Index of the query piece.
        start: First position of the key piece.
        stop: One past its last.
        row: Its first key row.
        key_low: First position that some query of the piece sees.
        query_high: One past the last position of a query that sees some key.
    """

    piece: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    row: np.ndarray
    key_low: np.ndarray
    query_high: np.ndarray


def _seen(part: Part, key_parts: Sequence[Part], places: Sequence[np.ndarray], mask: DocumentMask) -> _Seen:
    """Match pieces by document; ``places[i][document]`` is the document's piece of ``key_parts[i]``, or -1."""
    columns: list[np.ndarray] = []
    for keys, place in zip(key_parts, places, strict=True):
        found = place[part.documents]
        piece = np.flatnonzero(found >= 0)
        index = found[piece]
        columns.append(np.stack([piece, keys.starts[index], keys.stops[index], keys.rows[index]]))
    table = np.concatenate(columns, axis=1)
    q_start, q_stop = part.starts[table[0]], part.stops[table[0]]
    key_low, query_high, visible = table[1], q_stop, np.ones(len(q_stop), dtype=bool)
    if mask.causal:
        # A layout's pieces are equal or disjoint: one that ends after the query piece begins after it too.
        visible = table[2] <= q_stop
    if mask.window is not None:
        key_low = np.maximum(table[1], q_start - mask.window + 1)
        query_high = np.minimum(q_stop, table[2] - 1 + mask.window)
        visible &= (key_low < table[2]) & (query_high > q_start)
    order = np.lexsort((table[1], table[0]))
    order = order[visible[order]]
    piece, start, stop, row = table[:, order]
    return _Seen(piece, start, stop, row, key_low[order], query_high[order])


def _pair_blocks(
    query_parts: Sequence[Part], key_parts: Sequence[Part], places: Sequence[np.ndarray], mask: DocumentMask
) -> tuple[Block, ...]:
    """Runs of query pieces that lie side by side and share a mask become one block each."""
    diagonal: list[_Reads] = []
    before: list[_Reads] = []
    banded: list[Block] = []
    for side, part in enumerate(query_parts):
        seen = _seen(part, key_parts, places, mask)
        bounds = np.flatnonzero(np.diff(seen.piece, prepend=-1, append=-1))
        for first, last in pairwise(bounds.tolist()):
            piece = int(seen.piece[first])
            rows = Rows(int(part.rows[piece]), int(part.rows[piece + 1]))
            q_start, q_stop = int(part.starts[piece]), int(part.stops[piece])
            if mask.window is not None and q_stop - 1 - int(seen.start[first]) >= mask.window:
                banded += _banded_blocks(rows, q_start, seen, range(first, last), mask.window)
                continue
            keys = np.concatenate(
                [
                    np.arange(row, row + stop - start)
                    for start, stop, row in zip(
                        seen.start[first:last], seen.stop[first:last], seen.row[first:last], strict=True
                    )
                ]
            )
            reads = _Reads(rows.start, rows.stop, keys, min(side, 1))
            (diagonal if mask.causal and int(seen.stop[last - 1]) == q_stop else before).append(reads)
    return (*_call(diagonal, CAUSAL), *_call(before, FULL), *banded)


def _banded_blocks(rows: Rows, q_start: int, seen: _Seen, matches: range, window: int) -> list[Block]:
    """Blocks of one query piece whose view ends inside its keys, one for each key piece; rows without keys are cut."""
    blocks: list[Block] = []
    for match in matches:
        start, stop, row = int(seen.start[match]), int(seen.stop[match]), int(seen.row[match])
        low, high = int(seen.key_low[match]), int(seen.query_high[match])
        keys = Rows(row + low - start, row + stop - start)
        queries = Rows(rows.start, rows.start + high - q_start)
        if stop == q_start + len(rows):
            mask = SegmentMask(left=window - 1, right=0)
        else:
            # The last query is `high - stop` behind the diagonal of these keys.
            mask = FULL if high - 1 - low < window else SegmentMask(left=window - 1 + stop - high)
        blocks.append(_dense(queries, keys, mask))
    return blocks


def _dense(queries: Rows, keys: Rows, mask: SegmentMask) -> Block:
    return Block(queries, keys, Segments((0, len(queries)), (0, len(keys))), mask)


def _call(reads: Sequence[_Reads], mask: SegmentMask) -> tuple[Block, ...]:
    """Join pieces into kernel calls: one for each run of query rows without a gap."""
    runs: list[list[_Reads]] = []
    for each in sorted(reads, key=lambda each: each.q_start):
        if not runs or runs[-1][-1].q_stop != each.q_start:
            runs.append([])
        runs[-1].append(each)
    return tuple(_run_block(_joined(run, mask), mask) for run in runs)


def _joined(run: Sequence[_Reads], mask: SegmentMask) -> list[_Reads]:
    """Join neighbours that are one segment: the same keys, or a causal square that grows."""
    joined: list[_Reads] = []
    for each in run:
        last = joined[-1] if joined else None
        if last is not None and _is_one_segment(last, each, mask):
            joined[-1] = _Reads(last.q_start, each.q_stop, each.keys, each.side)
        else:
            joined.append(each)
    return joined


def _is_one_segment(first: _Reads, second: _Reads, mask: SegmentMask) -> bool:
    if mask.is_full:
        return np.array_equal(first.keys, second.keys)
    return (
        mask.is_causal
        and len(first.keys) == first.q_stop - first.q_start
        and len(second.keys) == second.q_stop - first.q_start
        and np.array_equal(first.keys, second.keys[: len(first.keys)])
    )


def _run_block(run: Sequence[_Reads], mask: SegmentMask) -> Block:
    index = np.concatenate([each.keys for each in run])
    queries = Rows(run[0].q_start, run[-1].q_stop)
    keys = Rows(int(index.min()), int(index.max()) + 1)
    segments = Segments(
        tuple(accumulate((each.q_stop - each.q_start for each in run), initial=0)),
        tuple(accumulate((len(each.keys) for each in run), initial=0)),
    )
    if np.array_equal(index, np.arange(keys.start, keys.stop)):
        return Block(queries, keys, segments, mask)
    cut = sum(len(each.keys) for each in run if each.side == 0)
    return Block(queries, keys, segments, mask, Pick(index - keys.start, cut))
