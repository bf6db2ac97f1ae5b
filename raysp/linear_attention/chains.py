"""Which ranks share documents, seen from a contiguous cut; pure, built once per layout.

Documents that lie on several ranks form *chains*: the first rank of a chain holds the document's beginning, the last its
end, and those between hold nothing else. A rank is the last of at most one chain and the first of at most one, or between.
Ranks without tokens are in no chain.
"""

from __future__ import annotations

from dataclasses import dataclass

from raysp.attention.layout import SequenceLayout
from raysp.errors import InputError


@dataclass(frozen=True)
class Links:
    """From whom one rank takes states and to whom it gives them, in one direction of a scan.

    Attributes:
        sources: Ranks whose states reach this one, first of the chain first; all but the first only pass states through.
        targets: Ranks that this one's state reaches, nearest first.
        passes_through: Whether what this rank takes reaches its targets, changed by its transition, which they then need.
    """

    sources: tuple[int, ...]
    targets: tuple[int, ...]
    passes_through: bool


@dataclass(frozen=True)
class LocalPieces:
    """The pieces of documents that one rank holds, in order.

    Attributes:
        documents: Id of each piece's document.
        lengths: Tokens of each piece.
        begins: Whether each piece holds its document's first token; only that of the first can be false.
        ends: Whether each piece holds its document's last token; only that of the last can be false.
    """

    documents: tuple[int, ...]
    lengths: tuple[int, ...]
    begins: tuple[bool, ...]
    ends: tuple[bool, ...]

    @property
    def takes(self) -> bool:
        """Whether the first piece goes on from another rank."""
        return bool(self.begins) and not self.begins[0]

    @property
    def gives(self) -> bool:
        """Whether the last piece goes on on another rank."""
        return bool(self.ends) and not self.ends[-1]


def local_pieces(layout: SequenceLayout, group_rank: int) -> LocalPieces:
    """The pieces of ``group_rank``.

    Raises:
        InputError: The layout is not contiguous.
    """
    if layout.order != "contiguous" and layout.degree > 1:
        raise InputError(
            f"the layout has order {layout.order!r}; expected 'contiguous': states run along the tokens. Build it with "
            "order='contiguous', or bring the rows there with raysp.attention.relayout."
        )
    return layout.memo(("local_pieces", group_rank), lambda: _local_pieces(layout, group_rank))


def chain_of(layout: SequenceLayout, document: int) -> tuple[int, ...]:
    """Ranks that hold tokens of ``document``, in order."""
    return layout.memo("chains", lambda: _chains(layout))[document]


def forward_links(layout: SequenceLayout, group_rank: int) -> Links:
    """Links of the forward scan, along the tokens."""
    before, after, through = _neighbours(layout, group_rank)
    return Links(sources=before, targets=after, passes_through=through)


def backward_links(layout: SequenceLayout, group_rank: int) -> Links:
    """Links of the backward scan, against the tokens."""
    before, after, through = _neighbours(layout, group_rank)
    return Links(sources=after[::-1], targets=before[::-1], passes_through=through)


def _neighbours(layout: SequenceLayout, group_rank: int) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
    """Earlier ranks of the first piece's document, later ranks of the last one's, and whether both are one piece."""
    pieces = local_pieces(layout, group_rank)
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    if pieces.takes:
        chain = chain_of(layout, pieces.documents[0])
        before = chain[: chain.index(group_rank)]
    if pieces.gives:
        chain = chain_of(layout, pieces.documents[-1])
        after = chain[chain.index(group_rank) + 1 :]
    return before, after, bool(before and after and len(pieces.lengths) == 1)


def _local_pieces(layout: SequenceLayout, group_rank: int) -> LocalPieces:
    # At degree 1 a layout of any order holds the documents one after the other, in the last part.
    table = [
        piece
        for part in layout.parts(group_rank)
        for piece in zip(part.documents.tolist(), part.starts.tolist(), part.stops.tolist(), strict=True)
    ]
    return LocalPieces(
        documents=tuple(document for document, _, _ in table),
        lengths=tuple(stop - start for _, start, stop in table),
        begins=tuple(start == 0 for _, start, _ in table),
        ends=tuple(stop == layout.lengths[document] for document, _, stop in table),
    )


def _chains(layout: SequenceLayout) -> list[tuple[int, ...]]:
    holders: list[list[int]] = [[] for _ in layout.lengths]
    for rank in range(layout.degree):
        for document in local_pieces(layout, rank).documents:
            holders[document].append(rank)
    return [tuple(ranks) for ranks in holders]
