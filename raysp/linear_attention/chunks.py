"""Rows of inputs, and where the rows of packed pieces lie in chunks of equal size.

Every piece is cut into chunks of C tokens, its last one filled up with zero rows: a zero key, value, beta and log decay
changes no state. The chunks are ordered by their number inside their piece, the pieces by their number of chunks,
most first. So the j-th chunks of all pieces that have one lie side by side, and a scan over chunks takes one step for all
pieces at once.

Symbols: T tokens, P pieces, N chunks, C tokens of a chunk, H heads, K key size, V value size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Rows of all inputs or of their gradients, of tokens ``[T, H, ...]`` or in chunks ``[N, H, C, ...]``.

    Attributes:
        q: ``[..., K]``.
        k: ``[..., K]``.
        v: ``[..., V]``.
        log_decay: ``None``, ``[...]`` or ``[..., K]``.
        beta: ``[...]`` with the delta rule, else ``None``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor | None

    def map(self, function: Callable[..., Tensor], *others: Rows) -> Rows:
        """Apply a function to each that is there, with its namesakes in ``others`` as further arguments."""
        columns = [[getattr(rows, field.name) for rows in (self, *others)] for field in fields(self)]
        mapped: list[Any] = [None if column[0] is None else function(*column) for column in columns]
        return Rows(*mapped)


def concatenated(*parts: Tensor) -> Tensor:
    """One after the other; a single one is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(frozen=True)
class ChunkMap:
    """The chunks of some pieces.

    Attributes:
        chunk_size: C.
        num_chunks: N.
        step_sizes: Number of pieces that have a j-th chunk, for every j; never increasing.
        piece_order: ``[P]`` the pieces, most chunks first.
        slots: ``[T]`` row of every token among the ``N * C`` rows of the chunks.
    """

    chunk_size: int
    num_chunks: int
    step_sizes: tuple[int, ...]
    piece_order: Tensor
    slots: Tensor

    def split(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Cut ``[T, H, ...]`` into chunks ``[N, H, C, ...]`` of another dtype, with zeros where there is no token."""
        slots = rows.new_zeros(self.num_chunks * self.chunk_size, *rows.shape[1:], dtype=dtype)
        slots.index_copy_(0, self.slots, rows.to(dtype))
        return slots.unflatten(0, (self.num_chunks, self.chunk_size)).transpose(1, 2).contiguous()

    def join(self, chunks: Tensor) -> Tensor:
        """Inverse of ``split``: ``[N, H, C, ...]`` to ``[T, H, ...]``."""
        return chunks.transpose(1, 2).flatten(0, 1).index_select(0, self.slots)


# The layers of a model ask for the same maps, forward and backward.
@lru_cache(maxsize=8)
def chunk_map(piece_lengths: tuple[int, ...], *, chunk_size: int, device: torch.device) -> ChunkMap:
    """Cut pieces into chunks.

    Args:
        piece_lengths: Tokens of each piece, at least 1.
        chunk_size: Tokens of a chunk.
        device: Where the indices are used.
    """
    lengths = torch.tensor(piece_lengths, dtype=torch.int64)
    chunk_counts = (lengths + chunk_size - 1) // chunk_size
    piece_order = torch.argsort(chunk_counts, descending=True, stable=True)
    places = torch.argsort(piece_order)
    step_sizes = len(lengths) - torch.bincount(chunk_counts).cumsum(0)[:-1]
    firsts = torch.cumsum(step_sizes, 0) - step_sizes
    pieces = torch.repeat_interleave(lengths)
    offsets = torch.arange(len(pieces)) - (torch.cumsum(lengths, 0) - lengths)[pieces]
    chunks = firsts[offsets // chunk_size] + places[pieces]
    return ChunkMap(
        chunk_size=chunk_size,
        num_chunks=int(chunk_counts.sum()),
        step_sizes=tuple(step_sizes.tolist()),
        piece_order=piece_order.to(device),
        slots=(chunks * chunk_size + offsets % chunk_size).to(device),
    )
