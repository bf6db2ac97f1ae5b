"""What every pair of ranks has to do, and which rows of each rank the others need.

Everything is counted from the chunks of `planner.attention_cut`, which the executors use too. With a window the rows inside
it are counted, without the gaps that an executor may send along.

Symbols: N degree, D documents that are cut, W window, n0 `KernelRate.efficient_rows`; *padded pairs* are
pairs as if each segment had n0 more rows on both sides, which is the time of a kernel in units of one pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from planner.attention_cut import ZigzagCut, works_apart
from planner.attention_routes import FIRST_CHUNKS, SECOND_CHUNKS, Bundles
from planner.attention_work import AttentionWork, FloatArray, IntArray, visible_pairs


@dataclass(frozen=True)
class KernelWork:
    """Work of kernel calls; arrays of one shape.

    Attributes:
        padded_pairs: See the module.
        num_calls: Kernel calls for them.
        picked_rows: Key rows that have to be brought into the order of the call.
    """

    padded_pairs: FloatArray
    num_calls: FloatArray
    picked_rows: FloatArray


class Shards:
    """What one cut of `work` asks of every rank and pair of ranks.

    Args:
        work: The call.
        efficient_rows: n0.
        merged: Cut for ``degree`` ranks, of which each `merged` neighbours hold their rows together and count as one.
    """

    def __init__(self, work: AttentionWork, efficient_rows: float, merged: int = 1) -> None:
        self.degree = work.degree // merged
        self.window = work.window
        self.num_documents = len(work.lengths)
        self._causal = work.causal
        self._n0 = efficient_rows
        self._cut = work.cut.coarsened(merged)
        self._key_cut = self._cut if work.key_cut is work.cut else work.key_cut.coarsened(merged)

    @cached_property
    def query_rows(self) -> FloatArray:
        """``[N]``: query rows of each rank."""
        return _row_sums(self._cut.rows)

    @cached_property
    def key_rows(self) -> FloatArray:
        """``[N]``: key rows of each rank."""
        return _row_sums(self._key_cut.rows)

    @cached_property
    def keys(self) -> Bundles:
        """Keys that the queries of other ranks see."""
        if not self._causal:
            return _full_bundles(self._key_cut, self._cut)
        return self._causal_bundles(self._seen[1].T)

    @cached_property
    def queries(self) -> Bundles:
        """Queries that see keys of other ranks."""
        if not self._causal:
            return _full_bundles(self._cut, self._key_cut)
        return self._causal_bundles(self._seen[0])

    @cached_property
    def documents(self) -> float:
        """Padded pairs of all documents where each is one segment."""
        queries, keys = self._cut.lengths.astype(np.float64), self._key_cut.lengths.astype(np.float64)
        return float(self._padded(self._visible(queries, keys), queries, keys).sum())

    def pairs(self, part: int | None = None) -> KernelWork:
        """Return the work of each query rank (row) on the keys of each rank (column).

        Args:
            part: Only keys of this part; `None`: all.
        """
        if not self._causal:
            padded = self._full_sides(self._cut.rows) @ self._full_sides(self._key_rows_of(part)).T
            return KernelWork(padded, (padded > 0).astype(np.float64), np.zeros(padded.shape))
        return self._causal_pairs(part) if self.window is None else self._windowed_pairs(part)

    def gathered(self, *, apart: bool = True) -> KernelWork:
        """Return the work of each rank, ``[N]``, where all keys of a query piece are one segment, in one call.

        Args:
            apart: Without what `apart` returns.
        """
        if not self._causal:
            padded = self._full_sides(self._cut.rows) @ (self._key_cut.lengths + self._n0)
            read = self.keys.needed.sum(axis=0) + self.key_rows
        else:
            keys = self._stops
            if self.window is not None:
                keys = np.minimum(keys, self._chunks + self.window - 1)
            padded = self._by_query_rank(self._padded(self._chunk_pairs, self._chunks, keys).sum(axis=1))
            padded += self._whole_pairs
            read = self._by_query_rank(keys.sum(axis=1)) + _row_sums(self._cut.whole_rows)
        if apart:
            padded = np.where(self._is_apart & ~self._has_cut_rows, 0.0, padded - self._is_apart * self._whole_pairs)
            read = read - self._is_apart * _row_sums(self._cut.whole_rows)
        return KernelWork(padded, (padded > 0).astype(np.float64), read)

    def apart(self) -> KernelWork:
        """Return the work of each rank, ``[N]``, on whole documents that a rank computes without gathered keys."""
        padded = np.where(self._is_apart, self._whole_pairs, 0.0)
        return KernelWork(padded, (padded > 0).astype(np.float64), np.zeros(padded.shape))

    @cached_property
    def _chunks(self) -> FloatArray:
        """``[2N, D]``: rows of each chunk."""
        return self._cut.chunk_rows[self._cut.is_cut].T.astype(np.float64)

    @cached_property
    def _stops(self) -> FloatArray:
        """``[2N, D]``: one past the last position of each chunk."""
        stops: FloatArray = np.cumsum(self._chunks, axis=0)
        return stops

    @cached_property
    def _starts(self) -> FloatArray:
        """``[2N, D]``: first position of each chunk."""
        return self._stops - self._chunks

    @cached_property
    def _chunk_pairs(self) -> FloatArray:
        """``[2N, D]``: causal pairs of each chunk's queries with all keys that they see."""
        return self._visible(self._stops) - self._visible(self._starts)

    @cached_property
    def _ranks(self) -> IntArray:
        """``int64 [2N]``: the rank of each chunk."""
        chunks = np.arange(2 * self.degree)
        return np.minimum(chunks, 2 * self.degree - 1 - chunks)

    @cached_property
    def _is_apart(self) -> NDArray[np.bool_]:
        """``[N]``: see `planner.attention_cut.works_apart`; only where queries and keys are the same tokens."""
        if self._cut is not self._key_cut:
            return np.zeros(self.degree, dtype=bool)
        rows = self._cut.whole_rows.astype(np.float64)
        whole = _row_sums(self._visible(rows, rows))
        if self._causal:
            cut = self._by_query_rank(self._chunk_pairs.sum(axis=1))
        else:
            cut = _row_sums((self._cut.rows - self._cut.whole_rows) * self._cut.lengths)
        return works_apart(whole, whole + cut)

    @cached_property
    def _has_cut_rows(self) -> NDArray[np.bool_]:
        """``[N]``: whether a rank holds rows of documents that are cut."""
        return _row_sums(self._cut.rows - self._cut.whole_rows) > 0

    @cached_property
    def _whole_pairs(self) -> FloatArray:
        """``[N]``: padded pairs of the documents that each rank holds whole."""
        rows = self._cut.whole_rows.astype(np.float64)
        return _row_sums(self._padded(self._visible(rows, rows), rows, rows))

    def _seen_rows(self, chunk: int) -> tuple[FloatArray, FloatArray]:
        """``[2N, D]`` each: rows of a query chunk that see something of each key chunk, and keys of each that it sees."""
        reach = np.inf if self.window is None else self.window - 1
        is_before = np.arange(2 * self.degree)[:, None] < chunk
        start, stop = self._starts[chunk], self._stops[chunk]
        queries = np.clip(np.minimum(stop, self._stops + reach) - start, 0.0, None)
        keys = np.clip(self._stops - np.maximum(self._starts, start - reach), 0.0, None)
        return np.where(is_before, queries, 0.0), np.where(is_before, keys, 0.0)

    @cached_property
    def _seen(self) -> tuple[FloatArray, FloatArray]:
        """``[2N, 2N]`` each, by query chunk and key chunk: share of the query rows that see keys, and of the keys seen."""
        num_chunks = 2 * self.degree
        rows = self._chunks.sum(axis=1)
        queries, keys = np.zeros((num_chunks, num_chunks)), np.zeros((num_chunks, num_chunks))
        for chunk in range(num_chunks):
            seeing, seen = self._seen_rows(chunk)
            queries[chunk], keys[chunk] = seeing.sum(axis=1), seen.sum(axis=1)
        return queries / np.maximum(rows, 1.0)[:, None], keys / np.maximum(rows, 1.0)

    def _visible(self, queries: FloatArray, keys: FloatArray | None = None) -> FloatArray:
        if keys is not None and not self._causal:
            return queries * keys
        return visible_pairs(queries, self.window)

    def _padded(self, pairs: FloatArray, queries: FloatArray, keys: FloatArray) -> FloatArray:
        # A segment has a row at least; less is a chunk's fraction, or the rounding of one.
        padded = pairs * (1 + self._n0 / np.maximum(queries, 1.0)) * (1 + self._n0 / np.maximum(keys, 1.0))
        return np.where((queries > 0) & (keys > 0), padded, 0.0)

    def _causal_bundles(self, share_by_chunk: FloatArray) -> Bundles:
        """One bundle for each chunk (row), from the share of its rows that each chunk of the other side (column) needs."""
        degree = self.degree
        chunks = np.arange(2 * degree)
        share = np.maximum(share_by_chunk[:, :degree], share_by_chunk[:, degree:][:, ::-1])
        share[chunks, self._ranks] = 0.0
        return Bundles(self._ranks, chunks // degree, self._chunks.sum(axis=1), share)

    def _by_query_rank(self, by_chunk: FloatArray) -> FloatArray:
        """Sums over the two chunks of each rank, along the first axis."""
        return by_chunk[: self.degree] + by_chunk[self.degree :][::-1]

    def _is_of_part(self, part: int | None) -> FloatArray:
        """``[2N, 1]``: 1 for a chunk of the part, 0 for others."""
        chunks = np.arange(2 * self.degree)[:, None]
        return np.ones(chunks.shape) if part is None else (chunks // self.degree == part).astype(np.float64)

    def _causal_pairs(self, part: int | None) -> KernelWork:
        """Keys of one rank that a query chunk sees are one segment."""
        num_chunks, is_of_part = 2 * self.degree, self._is_of_part(part)
        padded, read = np.zeros((num_chunks, self.degree)), np.zeros((num_chunks, self.degree))
        for chunk in range(num_chunks):
            queries, rank = self._chunks[chunk], self._ranks[chunk]
            keys = self._by_query_rank(self._chunks * is_of_part * (np.arange(num_chunks)[:, None] < chunk))
            pairs = keys * queries
            keys[rank] += queries * is_of_part[chunk]
            pairs[rank] += queries * (queries + 1) / 2 * is_of_part[chunk]
            padded[chunk] = self._padded(pairs, np.broadcast_to(queries, keys.shape), keys).sum(axis=1)
            read[chunk] = keys.sum(axis=1)
        padded, read = self._by_query_rank(padded), self._by_query_rank(read)
        if part != SECOND_CHUNKS:
            padded += np.diag(self._whole_pairs)
            read += np.diag(self._cut.whole_rows.sum(axis=1))
        # The two chunks of a single document lie side by side.
        picked = read if self._cut.is_cut.sum() > 1 else np.zeros(read.shape)
        return KernelWork(padded, (padded > 0).astype(np.float64), picked)

    def _windowed_pairs(self, part: int | None) -> KernelWork:
        """Where a window ends inside keys, each pair of pieces is a call of its own."""
        num_chunks, is_of_part = 2 * self.degree, self._is_of_part(part)[:, 0]
        padded, calls = np.zeros((num_chunks, num_chunks)), np.zeros((num_chunks, num_chunks))
        for chunk in range(num_chunks):
            start, stop = self._starts[chunk], self._stops[chunk]
            pairs = self._pairs_before(stop, self._stops) - self._pairs_before(start, self._stops)
            pairs -= self._pairs_before(stop, self._starts) - self._pairs_before(start, self._starts)
            queries, keys = self._seen_rows(chunk)
            queries[chunk], keys[chunk] = self._chunks[chunk], self._chunks[chunk]
            padded[chunk] = self._padded(pairs, queries, keys).sum(axis=1)
            is_banded = (pairs > 0) & (stop - self._starts > (self.window or np.inf))
            calls[chunk] = is_banded.sum(axis=1) + ((pairs > 0) & ~is_banded).any(axis=1)
        padded, calls = (
            self._by_query_rank(self._by_query_rank((values * is_of_part).T).T) for values in (padded, calls)
        )
        if part != SECOND_CHUNKS:
            padded += np.diag(self._whole_pairs)
            calls += np.diag((self._whole_pairs > 0).astype(np.float64))
        return KernelWork(padded, calls, np.zeros(padded.shape))

    def _pairs_before(self, query: FloatArray, key: FloatArray) -> FloatArray:
        """Pairs of a document's queries before a position with its keys before another."""
        return self._visible(np.broadcast_to(query, key.shape)) - self._visible(np.maximum(query - key, 0.0))

    def _key_rows_of(self, part: int | None) -> IntArray:
        """``[N, documents]``: key rows of each rank, or those of a part."""
        if part is None:
            return self._key_cut.rows
        first, second = np.split(self._key_cut.chunk_rows, 2, axis=1)
        return first.T + self._key_cut.whole_rows if part == FIRST_CHUNKS else second[:, ::-1].T

    def _full_sides(self, rows: IntArray) -> FloatArray:
        """``[N, documents]``: rows of each rank, padded."""
        return rows + self._n0 * (rows > 0)


def _row_sums(values: FloatArray | IntArray) -> FloatArray:
    sums: FloatArray = values.sum(axis=1).astype(np.float64)
    return sums


def _full_bundles(own: ZigzagCut, other: ZigzagCut) -> Bundles:
    """Rows that move where all of a document's queries see all of its keys."""
    degree = own.degree
    ranks, chunks = np.arange(degree), np.arange(2 * degree)
    everyone = other.is_cut
    owners = [np.minimum(chunks, 2 * degree - 1 - chunks), ranks]
    parts = [chunks // degree, np.zeros(degree, dtype=np.int64)]
    rows = [own.chunk_rows[everyone].sum(axis=0), own.whole_rows[:, everyone].sum(axis=1)]
    shares = [np.ones((3 * degree, degree))]
    # A document that is whole on the other side is needed by one rank only, and by none where that is the owner.
    for_one = np.stack([own.rows[:, other.whole_rank == rank].sum(axis=1) for rank in ranks])
    needer, owner = np.nonzero(for_one)
    if len(needer):
        owners.append(owner)
        parts.append(np.zeros(len(owner), dtype=np.int64))
        rows.append(for_one[needer, owner])
        shares.append((needer[:, None] == ranks).astype(np.float64))
    bundles = Bundles(
        np.concatenate(owners), np.concatenate(parts), np.concatenate(rows).astype(np.float64), np.concatenate(shares)
    )
    bundles.share[np.arange(len(bundles.owner)), bundles.owner] = 0.0
    return bundles
