"""What every pair of ranks has to do, and which rows of each rank the others need.

Everything is counted in equal chunks of L/2N tokens, which are exact up to a row of remainder; rows that move without a
window are exact. With a window the rows inside it are counted, without the gaps that an executor may send along.

Symbols: N degree, L tokens of a document, c rows of a chunk, W window, n0 `KernelRate.efficient_rows`; *padded pairs* are
pairs as if each segment had n0 more rows on both sides, which is the time of a kernel in units of one pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from planner.attention_work import AttentionWork, FloatArray, IntArray, ZigzagCut, visible_pairs

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


@dataclass(frozen=True)
class KernelWork:
    """Work of kernel calls; arrays of one shape.

    Attributes:
        padded_pairs: See the module.
        num_calls: Kernel calls for them.
    """

    padded_pairs: FloatArray
    num_calls: FloatArray


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
        self._key_cut = work.key_cut.coarsened(merged)

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
        return self._causal_bundles(self._seen_share.T)

    @cached_property
    def queries(self) -> Bundles:
        """Queries that see keys of other ranks."""
        if not self._causal:
            return _full_bundles(self._cut, self._key_cut)
        return self._causal_bundles(self._seen_share)

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
        if self.window is not None:
            return self._windowed_pairs(part)
        work = self._causal_pairs() if self._causal else self._full_pairs()
        if part is None:
            return work
        share = np.full((self.degree, self.degree), 0.5)
        if self._causal:
            # Ranks before the query rank give their first chunks only.
            ranks = np.arange(self.degree)
            share[ranks[:, None] > ranks] = 1.0 if part == FIRST_CHUNKS else 0.0
        return KernelWork(work.padded_pairs * share, np.where(share > 0, work.num_calls, 0.0))

    def gathered(self) -> KernelWork:
        """Return the work of each rank, ``[N]``, where all keys of a query piece are one segment, in one call."""
        if not self._causal:
            padded = self._full_sides(self._cut) @ (self._key_cut.lengths + self._n0)
        else:
            chunks, places = self._chunks, np.arange(2 * self.degree)[:, None]
            pairs = self._visible((places + 1) * chunks) - self._visible(places * chunks)
            keys = (places + 1) * chunks
            if self.window is not None:
                keys = np.minimum(keys, chunks + self.window - 1)
            by_chunk = self._padded(pairs, chunks, keys).sum(axis=1)
            padded = by_chunk[: self.degree] + by_chunk[self.degree :][::-1] + self._whole_pairs
        return KernelWork(padded, (padded > 0).astype(np.float64))

    @cached_property
    def _chunks(self) -> FloatArray:
        """Rows of a chunk of each document that is cut."""
        chunks: FloatArray = self._cut.lengths[self._cut.is_cut] / (2 * self.degree)
        return chunks

    @cached_property
    def _whole_pairs(self) -> FloatArray:
        """``[N]``: padded pairs of the documents that each rank holds whole."""
        rows = self._cut.whole_rows.astype(np.float64)
        return _row_sums(self._padded(self._visible(rows, rows), rows, rows))

    @cached_property
    def _seen_rows(self) -> FloatArray:
        """``[2N, cut documents]``: keys of a chunk that the queries of the chunk d later see, and the other way round."""
        behind = np.arange(2 * self.degree)[:, None]
        if self.window is None:
            return np.broadcast_to(self._chunks, (2 * self.degree, len(self._chunks)))
        rows = np.clip(self.window - 1 - (behind - 1) * self._chunks, 0.0, self._chunks)
        return np.where(behind == 0, self._chunks, rows)

    @cached_property
    def _seen_share(self) -> FloatArray:
        """``[2N, 2N]``: share of the rows of key chunk (column) that query chunk (row) sees, and the other way round."""
        all_rows = float(self._chunks.sum())
        behind = _chunks_behind(self.degree)
        shares = self._seen_rows.sum(axis=1) / all_rows if all_rows else np.zeros(2 * self.degree)
        return np.where(behind > 0, shares[behind], 0.0)

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
        owner = np.minimum(chunks, 2 * degree - 1 - chunks)
        share[chunks, owner] = 0.0
        rows = self._cut.chunk_rows.sum(axis=0).astype(np.float64)
        return Bundles(owner, chunks // degree, rows, share)

    def _causal_pairs(self) -> KernelWork:
        """Keys of one rank that a query chunk sees are one segment."""
        chunks = self._chunks
        squares, triangles = chunks**2, chunks * (chunks + 1) / 2
        one_chunk = float(self._padded(squares, chunks, chunks).sum())
        two_chunks = float(self._padded(2 * squares, chunks, 2 * chunks).sum())
        ranks = np.arange(self.degree)
        padded = np.where(ranks[:, None] > ranks, 2 * one_chunk, two_chunks)
        own = self._padded(triangles, chunks, chunks) + self._padded(squares + triangles, chunks, 2 * chunks)
        np.fill_diagonal(padded, own.sum() + self._whole_pairs)
        return KernelWork(padded, (padded > 0).astype(np.float64))

    def _windowed_pairs(self, part: int | None) -> KernelWork:
        """Where a window ends inside keys, each pair of pieces is a call of its own."""
        chunks, num_chunks = self._chunks, 2 * self.degree
        visible = self._visible(np.arange(num_chunks + 1)[:, None] * chunks)
        before = np.concatenate([visible[:1], visible[:-2]])
        pairs = np.maximum(visible[1:] - 2 * visible[:-1] + before, 0.0)
        pairs[0] = visible[1]
        rows = self._seen_rows
        padded = self._padded(pairs, rows, rows).sum(axis=1)
        banded = (np.arange(1, num_chunks + 1)[:, None] * chunks > (self.window or np.inf)) & (pairs > 0)
        calls = banded.sum(axis=1) + (~banded & (pairs > 0)).any(axis=1)
        padded_pairs, num_calls = (self._by_ranks(values.astype(np.float64), part) for values in (padded, calls))
        if part != SECOND_CHUNKS:
            padded_pairs += np.diag(self._whole_pairs)
            num_calls += np.diag((self._whole_pairs > 0).astype(np.float64))
        return KernelWork(padded_pairs, num_calls)

    def _by_ranks(self, by_distance: FloatArray, part: int | None) -> FloatArray:
        """``[N, N]`` from values by how many chunks the keys are behind the queries."""
        behind = _chunks_behind(self.degree)
        by_chunk = np.where(behind >= 0, by_distance[behind], 0.0)
        by_query_rank = by_chunk[: self.degree] + by_chunk[self.degree :][::-1]
        first, second = by_query_rank[:, : self.degree], by_query_rank[:, self.degree :][:, ::-1]
        parts: tuple[FloatArray, ...] = (first.copy(), second.copy())
        return parts[0] + parts[1] if part is None else parts[part]

    def _full_pairs(self) -> KernelWork:
        padded = self._full_sides(self._cut) @ self._full_sides(self._key_cut).T
        return KernelWork(padded, (padded > 0).astype(np.float64))

    def _full_sides(self, cut: ZigzagCut) -> FloatArray:
        """``[N, documents]``: rows of each rank, padded."""
        return cut.rows + self._n0 * (cut.rows > 0)


def _row_sums(values: FloatArray | IntArray) -> FloatArray:
    sums: FloatArray = values.sum(axis=1).astype(np.float64)
    return sums


def _chunks_behind(degree: int) -> IntArray:
    """``[2N, 2N]``: how many chunks the key chunk (column) is before the query chunk (row)."""
    chunks = np.arange(2 * degree)
    return chunks[:, None] - chunks


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
