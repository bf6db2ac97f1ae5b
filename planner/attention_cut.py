"""How packed documents are cut over the ranks of a group: `zigzag_cut`. The layout of the executors is made from it too.

A document that is cut has 2N chunks, and rank r holds chunks r and 2N-1-r. Cutting it makes every rank read it in two
short segments and send its keys, so as few documents as possible are cut: the longest. The others stay whole, each on
one rank, and what they leave uneven the chunks even out: of a rank's two chunks the second sees more keys, so their sum
levels the tokens of ranks and their ratio the causal work.

All ranks compute the cut on their own, and it must be the same to the row: plain Python numbers only, whose results do
not depend on the processor, as those of vectorised sums may.

Symbols: N degree, L tokens of a document.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

# How far the share of a rank in the tokens of the cut documents may be from 1/N, in 1/N.
_MOST_UNEVEN_SHARE = 0.1
# No chunk is shorter than this part of an equal one.
_LEAST_CHUNK = 0.25
# Part of a rank's pairs from which its whole documents are worth a kernel call of their own.
_LEAST_WORK_APART = 0.25
# Work of the busiest rank over the mean: in causal attention, and where queries see all of their documents.
_MOST_CAUSAL_WORK = 1.02
_MOST_FULL_WORK = 1.05


@dataclass(frozen=True)
class ZigzagCut:
    """Which rank holds how many rows of every document.

    Attributes:
        chunk_rows: ``int64 [documents, 2N]``; rank r holds chunks r and 2N-1-r. Zeros where a document stays whole.
        whole_rank: ``int64 [documents]``: the rank that holds all of it, or -1 where it is cut.
        lengths: ``int64 [documents]``.
    """

    chunk_rows: IntArray
    whole_rank: IntArray
    lengths: IntArray

    @property
    def degree(self) -> int:
        """Ranks that documents are cut for."""
        return int(self.chunk_rows.shape[1]) // 2

    @property
    def is_cut(self) -> NDArray[np.bool_]:
        """``[documents]``: whether a document is cut."""
        return self.whole_rank < 0

    @cached_property
    def whole_rows(self) -> IntArray:
        """``int64 [N, documents]``: rows of whole documents on each rank."""
        on_rank = self.whole_rank == np.arange(self.degree)[:, None]
        return np.where(on_rank, self.lengths, 0)

    @cached_property
    def rows(self) -> IntArray:
        """``int64 [N, documents]``: rows of each document on each rank."""
        first, second = np.split(self.chunk_rows, 2, axis=1)
        return np.ascontiguousarray((first + second[:, ::-1]).T + self.whole_rows)

    def coarsened(self, factor: int) -> ZigzagCut:
        """Return the cut of groups of `factor` neighbouring ranks that hold their rows together.

        Args:
            factor: A divisor of the degree.
        """
        documents, chunks = self.chunk_rows.shape
        joined = self.chunk_rows.reshape(documents, chunks // factor, factor).sum(axis=2)
        whole_rank = np.where(self.is_cut, -1, self.whole_rank // factor)
        return ZigzagCut(joined, whole_rank, self.lengths)


def works_apart(whole_pairs: FloatArray | float, all_pairs: FloatArray | float) -> NDArray[np.bool_]:
    """Say whether a rank that gathers keys computes its whole documents in a kernel call of their own.

    They need no keys of other ranks, so the call hides what is on the way; documents that are cut take another one.

    Args:
        whole_pairs: Pairs of a query and a key in whole documents.
        all_pairs: In all of the rank's work.
    """
    apart: NDArray[np.bool_] = np.asarray(whole_pairs) > _LEAST_WORK_APART * np.asarray(all_pairs)
    return apart


def zigzag_cut(lengths: Sequence[int], degree: int) -> ZigzagCut:
    """Cut as few of the longest documents as leave all ranks level in tokens, to the row, and in work.

    Where no number of them does: `even_cut`.

    Args:
        lengths: Tokens of every document, each at least 1.
        degree: Ranks of the group; 1 cuts nothing.
    """
    tokens = [int(length) for length in lengths]
    if degree == 1:
        return _as_arrays(tokens, 1, [0] * len(tokens), {})
    longest_first = sorted(range(len(tokens)), key=lambda document: -tokens[document])
    num_long = sum(length >= 2 * degree for length in tokens)
    num_cut = 1
    while num_cut < num_long:
        found = _uneven_cut(tokens, degree, longest_first[:num_cut], longest_first[num_cut:])
        if found is not None:
            return found
        # Steps of half as much again: each try takes as long as there are documents.
        num_cut += max(1, num_cut // 2)
    return even_cut(tokens, degree)


def even_cut(lengths: Sequence[int], degree: int) -> ZigzagCut:
    """Cut every document into nearly equal chunks but for those with fewer than 2N tokens.

    Those go, longest first, to the rank that holds least; remainders likewise, so ranks stay level.

    Args:
        lengths: As in `zigzag_cut`.
        degree: Ranks of the group, at least 2.
    """
    tokens = [int(length) for length in lengths]
    num_chunks = 2 * degree
    short = [document for document, length in enumerate(tokens) if length < num_chunks]
    whole_rank, loads = _dealt(tokens, degree, sorted(short, key=lambda document: -tokens[document]))
    chunks: dict[int, list[int]] = {}
    for document in range(len(tokens)):
        if whole_rank[document] >= 0:
            continue
        base, remainder = divmod(tokens[document], num_chunks)
        rows = [base] * num_chunks
        by_load = sorted(range(degree), key=loads.__getitem__)
        for extra in range(remainder):
            rank = by_load[extra % degree]
            rows[rank if extra < degree else num_chunks - 1 - rank] += 1
            loads[rank] += 1
        chunks[document] = rows
    return _as_arrays(tokens, degree, whole_rank, chunks)


def _as_arrays(
    tokens: Sequence[int], degree: int, whole_rank: Sequence[int], chunks: dict[int, list[int]]
) -> ZigzagCut:
    chunk_rows = np.zeros((len(tokens), 2 * degree), dtype=np.int64)
    for document, rows in chunks.items():
        chunk_rows[document] = rows
    return ZigzagCut(chunk_rows, np.array(whole_rank, dtype=np.int64), np.array(tokens, dtype=np.int64))


def _dealt(tokens: Sequence[int], degree: int, whole: Sequence[int]) -> tuple[list[int], list[int]]:
    """Give whole documents, longest first, to the rank that holds least: the rank of each or -1, and rows of each rank."""
    whole_rank = [-1] * len(tokens)
    heap = [(0, rank) for rank in range(degree)]
    for document in whole:
        load, rank = heapq.heappop(heap)
        whole_rank[document] = rank
        heapq.heappush(heap, (load + tokens[document], rank))
    loads = [0] * degree
    for load, rank in heap:
        loads[rank] = load
    return whole_rank, loads


def _uneven_cut(tokens: Sequence[int], degree: int, cut: Sequence[int], whole: Sequence[int]) -> ZigzagCut | None:
    """Cut these documents, all in the same proportions, so that ranks are level; `None` where that cannot be."""
    whole_rank, loads = _dealt(tokens, degree, whole)
    causal, full = _work_of_whole(tokens, degree, whole_rank)
    shares = _shares(tokens, degree, cut, loads, causal)
    if shares is None:
        return None
    first, second = shares
    bounds = [0.0]
    for share in (*first, *reversed(second)):
        bounds.append(bounds[-1] + share)
    chunks: dict[int, list[int]] = {}
    # The longest comes last, and takes what rounding left.
    for document in reversed(cut[1:]):
        length = tokens[document]
        edges = [*(round(bound * length) for bound in bounds[:-1]), length]
        chunks[document] = [after - before for before, after in pairwise(edges)]
        _add_rows(loads, chunks[document])
    chunks[cut[0]] = _last_chunks(sum(tokens), degree, loads, first, second)
    for document, rows in chunks.items():
        if min(rows) < 1:
            return None
        _add_work(causal, full, rows, tokens[document])
    if max(causal) * degree > _MOST_CAUSAL_WORK * sum(causal) or max(full) * degree > _MOST_FULL_WORK * sum(full):
        return None
    return _as_arrays(tokens, degree, whole_rank, chunks)


def _shares(
    tokens: Sequence[int], degree: int, cut: Sequence[int], loads: Sequence[int], causal: Sequence[int]
) -> tuple[list[float], list[float]] | None:
    """Shares of a document that make the first and the second chunk of each rank; `None` where they are too uneven.

    With A and B the shares of the first and second chunks of the ranks before, a rank that takes t of the document, the
    last b of it as its second chunk, sees the pairs ``((A+t-b)^2 - A^2 + (1-B)^2 - (1-B-b)^2) L^2/2``, linear in b.
    """
    total, pairs = sum(tokens), sum(length * (length + 1) // 2 for length in tokens)
    num_cut_tokens = sum(tokens[document] for document in cut)
    squares = sum(tokens[document] ** 2 for document in cut) / 2
    before_first, before_second = 0.0, 0.0
    first: list[float] = []
    second: list[float] = []
    for rank in range(degree):
        missing = total / degree - loads[rank]
        share = missing / num_cut_tokens
        if abs(share * degree - 1) > _MOST_UNEVEN_SHARE:
            return None
        late = share / 2
        if rank < degree - 1:
            # A chunk of c rows has half a pair a row more than its part of L^2/2.
            work = (pairs / degree - causal[rank] - missing / 2) / squares
            left = 1 - before_first - before_second - share
            late = (work - share * (2 * before_first + share)) / (2 * left)
        first.append(share - late)
        second.append(late)
        if min(share - late, late) < _LEAST_CHUNK / (2 * degree):
            return None
        before_first += share - late
        before_second += late
    return first, second


def _last_chunks(
    total: int, degree: int, loads: Sequence[int], first: Sequence[float], second: Sequence[float]
) -> list[int]:
    """Chunks of the last document: what each rank still misses, in about the given proportions."""
    base, extra = divmod(total, degree)
    by_load = sorted(range(degree), key=loads.__getitem__)
    missing = [base - load for load in loads]
    for rank in by_load[:extra]:
        missing[rank] += 1
    early = [round(rows * a / (a + b)) for rows, a, b in zip(missing, first, second, strict=True)]
    late = [rows - each for rows, each in zip(missing, early, strict=True)]
    return [*early, *reversed(late)]


def _add_rows(loads: list[int], chunks: Sequence[int]) -> None:
    for rank in range(len(loads)):
        loads[rank] += chunks[rank] + chunks[-1 - rank]


def _work_of_whole(tokens: Sequence[int], degree: int, whole_rank: Sequence[int]) -> tuple[list[int], list[int]]:
    """Pairs of the documents that each rank holds whole: causal ones, and all."""
    causal, full = [0] * degree, [0] * degree
    for length, rank in zip(tokens, whole_rank, strict=True):
        if rank >= 0:
            causal[rank] += length * (length + 1) // 2
            full[rank] += length * length
    return causal, full


def _add_work(causal: list[int], full: list[int], chunks: Sequence[int], length: int) -> None:
    """Add the pairs of each rank's chunks of a document."""
    stop = 0
    for place, rows in enumerate(chunks):
        start, stop = stop, stop + rows
        rank = min(place, len(chunks) - 1 - place)
        causal[rank] += (stop * (stop + 1) - start * (start + 1)) // 2
        full[rank] += rows * length
