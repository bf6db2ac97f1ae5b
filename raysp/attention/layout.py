"""Where every token of a packed micro-batch lives: which rank, which local row.

A layout is a value: all its sizes follow from the lengths, so ranks know each other's shapes without asking. Index
maps are built on first use and kept with the layout, which all layers of a micro-batch share.

Symbols: N degree, L length of one document; a *part* is a slice of a rank's rows that moves and is masked as one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from planner.attention_cut import zigzag_cut
from raysp.errors import InputError

ORDERS = ("zigzag", "contiguous")

_T = TypeVar("_T")


@dataclass(frozen=True)
class Part:
    """Pieces of documents stored one after the other in a rank's rows, documents ascending.

    Attributes:
        documents: ``int64 [pieces]``, ids.
        starts: ``int64 [pieces]``, first position of each piece inside its document.
        stops: ``int64 [pieces]``, one past the last.
        rows: ``int64 [pieces + 1]``, local row where each piece begins; the last entry is the end of the part.
    """

    documents: np.ndarray
    starts: np.ndarray
    stops: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True)
class SequenceLayout:
    """How documents are cut over the ranks of one SP group.

    ``zigzag`` cuts the longest documents into 2N chunks and gives rank r chunks r and 2N-1-r, which levels causal work.
    The others stay whole, each on one rank, as many as leave all ranks level in tokens, to the row, and in work
    (``planner.attention_cut``). Each rank stores all first chunks, then all second chunks, then whole documents. In cross
    attention, whose key lengths the layout of the queries does not know, ranks may differ more in work. ``contiguous``
    cuts the concatenation of the documents into N nearly equal runs. At degree 1 the local order is the natural one.

    Args:
        lengths: Tokens of every document, each at least 1.
        degree: Ranks of the group, at least 1.
        order: ``"zigzag"`` or ``"contiguous"``.
        merged: Cut for ``degree * merged`` ranks, of which each ``merged`` neighbours count as one; see ``coarsened``.

    Raises:
        InputError: A document without tokens, no document, a degree below 1 or an unknown order.
    """

    lengths: tuple[int, ...]
    degree: int
    order: str = "zigzag"
    merged: int = 1
    _memo: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __init__(self, lengths: Sequence[int], degree: int, order: str = "zigzag", merged: int = 1) -> None:
        object.__setattr__(self, "lengths", tuple(int(length) for length in lengths))
        object.__setattr__(self, "degree", int(degree))
        object.__setattr__(self, "order", order)
        object.__setattr__(self, "merged", int(merged))
        object.__setattr__(self, "_memo", {})
        self._check()

    def __reduce__(self) -> tuple[Any, ...]:
        return SequenceLayout, (self.lengths, self.degree, self.order, self.merged)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return sum(self.lengths)

    def local_tokens(self, group_rank: int) -> int:
        """Rows that this rank holds; may be 0 where there are fewer tokens than ranks."""
        parts = self.parts(group_rank)
        return int(parts[-1].rows[-1])

    def token_indices(self, group_rank: int) -> Tensor:
        """Global token (in the joined documents) of each local row, int64 ``[local_tokens]``. Read only."""
        return self.memo(("token_indices", group_rank), lambda: self._row_values(group_rank, self._document_starts()))

    def positions(self, group_rank: int) -> Tensor:
        """Position inside its document of each local row, int64 ``[local_tokens]``. Read only."""
        zeros = np.zeros(len(self.lengths), dtype=np.int64)
        return self.memo(("positions", group_rank), lambda: self._row_values(group_rank, zeros))

    def parts(self, group_rank: int) -> tuple[Part, ...]:
        """The rank's rows as parts, in storage order; a part may be empty.

        Raises:
            InputError: The rank is not in the group.
        """
        if not 0 <= group_rank < self.degree:
            raise InputError(
                f"group rank {group_rank} is outside a group of degree {self.degree}; expected 0 to {self.degree - 1}. "
                "Pass the rank inside the group, not the global rank."
            )
        return self.memo("parts", self._all_parts)[group_rank]

    def coarsened(self, factor: int) -> SequenceLayout:
        """Return the layout of groups of ``factor`` neighbouring ranks that hold their rows together.

        Rank r of it holds the tokens of ranks ``factor*r`` to ``factor*r + factor - 1``, document pieces joined.

        Raises:
            InputError: ``factor`` does not divide the degree.
        """
        if factor < 1 or self.degree % factor:
            raise InputError(
                f"a layout of degree {self.degree} cannot be coarsened by {factor}; expected a divisor of the degree."
            )
        key = ("coarsened", factor)
        return self.memo(
            key, lambda: SequenceLayout(self.lengths, self.degree // factor, self.order, self.merged * factor)
        )

    def memo(self, key: Any, build: Callable[[], _T]) -> _T:
        """Return what ``build`` made for ``key``, making it once per layout object."""
        if key not in self._memo:
            self._memo[key] = build()
        made: _T = self._memo[key]
        return made

    def _check(self) -> None:
        if self.order not in ORDERS:
            raise InputError(f"order {self.order!r} is unknown; expected one of {', '.join(ORDERS)}.")
        if self.degree < 1 or self.merged < 1:
            raise InputError(f"degree is {self.degree}, merged {self.merged}; expected at least 1 each.")
        if not self.lengths:
            raise InputError("the layout has no documents; expected at least one. An idle rank needs a dummy token.")
        for document, length in enumerate(self.lengths):
            if length < 1:
                raise InputError(
                    f"document {document} has {length} tokens; expected at least 1. Drop empty documents first."
                )

    def _document_starts(self) -> np.ndarray:
        return np.array([0, *accumulate(self.lengths)][:-1], dtype=np.int64)

    def _row_values(self, group_rank: int, document_offsets: np.ndarray) -> Tensor:
        pieces = [
            np.arange(start, stop, dtype=np.int64) + document_offsets[document]
            for part in self.parts(group_rank)
            for document, start, stop in zip(part.documents, part.starts, part.stops, strict=True)
        ]
        return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *pieces]))

    def _all_parts(self) -> tuple[tuple[Part, ...], ...]:
        cut = _zigzag_pieces if self.order == "zigzag" else _contiguous_pieces
        by_rank = cut(self.lengths, self.degree * self.merged)
        groups = [by_rank[first : first + self.merged] for first in range(0, len(by_rank), self.merged)]
        return tuple(_as_parts(group[0] if len(group) == 1 else _joined(group)) for group in groups)


_Piece = tuple[int, int, int]  # document, start, stop


def _joined(ranks: Sequence[Sequence[Sequence[_Piece]]]) -> list[list[_Piece]]:
    """Parts of neighbouring ranks as those of one: pieces of one document that touch become one piece."""
    parts: list[list[_Piece]] = []
    for pieces_of_ranks in zip(*ranks, strict=True):
        joined: list[_Piece] = []
        for document, start, stop in sorted(piece for pieces in pieces_of_ranks for piece in pieces):
            if joined and joined[-1][0] == document and joined[-1][2] == start:
                joined[-1] = (document, joined[-1][1], stop)
            else:
                joined.append((document, start, stop))
        parts.append(joined)
    return parts


def _as_parts(pieces_of_parts: Sequence[Sequence[_Piece]]) -> tuple[Part, ...]:
    parts: list[Part] = []
    row = 0
    for pieces in pieces_of_parts:
        table = np.array(pieces, dtype=np.int64).reshape(len(pieces), 3)
        documents, starts, stops = table[:, 0], table[:, 1], table[:, 2]
        rows = row + np.concatenate([[0], np.cumsum(stops - starts)]).astype(np.int64)
        parts.append(Part(documents, starts, stops, rows))
        row = int(rows[-1])
    return tuple(parts)


def _contiguous_pieces(lengths: Sequence[int], degree: int) -> list[list[list[_Piece]]]:
    ends = list(accumulate(lengths))
    total = ends[-1]
    pieces: list[list[list[_Piece]]] = []
    document = 0
    for rank in range(degree):
        token, stop = rank * total // degree, (rank + 1) * total // degree
        run: list[_Piece] = []
        while token < stop:
            while ends[document] <= token:
                document += 1
            start = ends[document] - lengths[document]
            piece_stop = min(stop, ends[document])
            run.append((document, token - start, piece_stop - start))
            token = piece_stop
        pieces.append([run])
    return pieces


def _zigzag_pieces(lengths: Sequence[int], degree: int) -> list[list[list[_Piece]]]:
    cut = zigzag_cut(lengths, degree)
    pieces: list[list[list[_Piece]]] = [[[], [], []] for _ in range(degree)]
    for document, (rank, rows) in enumerate(zip(cut.whole_rank.tolist(), cut.chunk_rows.tolist(), strict=True)):
        if rank >= 0:
            pieces[rank][2].append((document, 0, lengths[document]))
            continue
        bounds = [0, *accumulate(rows)]
        for chunk in range(2 * degree):
            holder, part = (chunk, 0) if chunk < degree else (2 * degree - 1 - chunk, 1)
            pieces[holder][part].append((document, bounds[chunk], bounds[chunk + 1]))
    return pieces
