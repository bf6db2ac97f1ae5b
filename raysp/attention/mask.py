"""Which keys a query sees: as users say it of documents, and as kernels need it of one segment.

Symbols: W window, i query row and j key row of a segment with Sq queries and Sk keys.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DocumentMask:
    """What a token sees of its document; never anything of another.

    Attributes:
        causal: Itself and what comes before; otherwise all of the document.
        window: W: of those only the last W, itself included; ``None``: all. Needs ``causal``.
    """

    causal: bool
    window: int | None = None

    @property
    def whole_segment(self) -> SegmentMask:
        """The mask of a segment whose keys run from where the first query's view begins to the last query."""
        if not self.causal:
            return FULL
        return CAUSAL if self.window is None else SegmentMask(left=self.window - 1, right=0)


@dataclass(frozen=True)
class SegmentMask:
    """A band around the diagonal that ends in the last query and the last key of a segment.

    Query i sees key j where ``i + Sk - Sq - left <= j <= i + Sk - Sq + right``; this is the alignment of flash kernels.

    Attributes:
        left: Keys before the diagonal that are seen; ``None``: all.
        right: Keys after it; ``None``: all.
    """

    left: int | None = None
    right: int | None = None

    @property
    def is_full(self) -> bool:
        """Every query sees every key of its segment."""
        return self.left is None and self.right is None

    @property
    def is_causal(self) -> bool:
        """Nothing after the diagonal, everything before it."""
        return self.left is None and self.right == 0


FULL = SegmentMask()
CAUSAL = SegmentMask(right=0)
