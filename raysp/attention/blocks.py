"""What one kernel call of parallel attention works on: ranges of rows, segments, picks. Values without behaviour.

Symbols: a *piece* is a run of one document on one rank; the rows of a rank are its pieces, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from raysp.attention.mask import SegmentMask


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

    @cached_property
    def max_q(self) -> int:
        """Longest query segment."""
        return max((b - a for a, b in zip(self.cu_q, self.cu_q[1:], strict=False)), default=0)

    @cached_property
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


@dataclass(frozen=True, eq=False)
class Pick:
    """Key rows in the order in which a kernel call reads them; a row may be read by two segments.

    Attributes:
        index: ``int64 [picked]``, rows relative to the block's first key row.
        cut: ``index[:cut]`` and ``index[cut:]`` each name a row at most once.
    """

    index: np.ndarray
    cut: int
    _on_device: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def on(self, device: torch.device) -> Tensor:
        """``index`` on ``device``, copied there once."""
        return self._tensors(device)[0]

    def places(self, device: torch.device) -> Tensor:
        """int64 ``[2, rows]``: where each row was read, before and from ``cut`` on; -1 where it was not."""
        return self._tensors(device)[1]

    def _tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._on_device:
            places = np.full((2, int(self.index.max()) + 1), -1, dtype=np.int64)
            places[0, self.index[: self.cut]] = np.arange(self.cut)
            places[1, self.index[self.cut :]] = np.arange(self.cut, len(self.index))
            made = (torch.from_numpy(self.index).to(device), torch.from_numpy(places).to(device))
            self._on_device[device] = made
        return self._on_device[device]


@dataclass(frozen=True)
class Block:
    """One kernel call: query rows of one rank against key rows of one rank, or of a gathered buffer.

    Attributes:
        queries: Local rows of the query rank.
        keys: Rows of the key side that are read, without gaps or as the smallest range around ``pick``.
        segments: Pieces inside the queries, and the keys (after picking) that each sees.
        mask: What a query sees of its segment's keys.
        pick: Which of ``keys`` are read, in which order; ``None``: all, as they lie.
    """

    queries: Rows
    keys: Rows
    segments: Segments
    mask: SegmentMask
    pick: Pick | None = None
