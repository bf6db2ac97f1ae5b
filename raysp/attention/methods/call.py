"""What one call of parallel attention is made of, and the block work that all methods share.

Symbols: T local rows, Hq, Hk heads, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Protocol

from torch import Tensor

from planner.attention_heads import head_groups as head_group_sizes
from raysp.attention.blocks import Block, Rows
from raysp.attention.kernels import Kernel
from raysp.attention.merge import ALL_HEADS, GradientSums, PartialResult
from raysp.attention.picked import pick_rows, return_rows
from raysp.attention.schedule import Schedule
from raysp.comm import Communicator, Lease

Saved = tuple[Tensor, ...]


@dataclass(frozen=True)
class AttentionCall:
    """The choices of one call, equal on all ranks but for the group rank.

    Attributes:
        schedule: All work of the micro-batch.
        group: The ranks of the SP group.
        num_key_heads: Hk.
        kernel: Block kernel.
        scale: Factor of the scores.
        deterministic: Same bits on every run.
    """

    schedule: Schedule
    group: Communicator
    num_key_heads: int
    kernel: Kernel
    scale: float
    deterministic: bool

    @property
    def group_rank(self) -> int:
        """This process's place in the group."""
        return self.group.group_rank

    @property
    def degree(self) -> int:
        """Ranks of the group."""
        return self.schedule.degree

    def lease(self, like: Tensor) -> Lease:
        """Buffers for the forward or backward of this call, on the device of a tensor; a context."""
        return self.group.workspace.lease(like.device)

    def own_blocks(self) -> tuple[Block, ...]:
        """Work of this rank's queries on its own keys."""
        return self.schedule.pair(self.group_rank, self.group_rank)

    @property
    def most_partials(self) -> int:
        """Partial results, or gradients, that a row gets at most where every pair of ranks is one kernel call."""
        return self.degree if self.schedule.mask.window is None else 3 * self.degree


class Method(Protocol):
    """A way to run attention over the ranks of a group."""

    def forward(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Saved]:
        """Return the output of the local rows ``[T, Hq, D]`` and what the backward needs."""
        ...

    def backward(self, call: AttentionCall, saved: Saved, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``dq [T, Hq, D]``, ``dk`` and ``dv [T, Hk, D]`` of the local rows."""
        ...


@dataclass(frozen=True)
class QueryRows:
    """A range of rows of a query shard.

    Attributes:
        held: Which local rows of the owner the tensor holds.
        q: ``[rows, Hq, D]``.
    """

    held: Rows
    q: Tensor


@dataclass(frozen=True)
class OutputGradient:
    """What a backward needs to know of query rows, besides the queries; rows as in the ``QueryRows`` beside it.

    Attributes:
        dout: Gradient of the final output, ``[rows, Hq, D]``.
        lse: ``[Hq, rows]``, over all keys of the row.
        out: Final output ``[rows, Hq, D]`` where it is at hand.
        delta: ``[Hq, rows]``, row sums of ``dout * out``, where ``out`` is not.
    """

    dout: Tensor
    lse: Tensor
    out: Tensor | None
    delta: Tensor | None = None


class ReadableKeys(Protocol):
    """Key rows, wherever they lie, that blocks can read."""

    @property
    def query_heads(self) -> slice:
        """The query heads that read them."""
        ...

    def read(self, block: Block, lease: Lease) -> tuple[Tensor, Tensor]:
        """Keys and values of a block, in its order; until the next read."""
        ...


@dataclass(frozen=True)
class KeyRows:
    """A range of rows, and some heads, of a key shard.

    Attributes:
        held: Which local rows of the owner the tensors hold.
        k: ``[rows, key heads, D]``.
        v: Like ``k``.
        query_heads: The query heads that read these key heads.
    """

    held: Rows
    k: Tensor
    v: Tensor
    query_heads: slice = field(default_factory=lambda: ALL_HEADS)

    def of_heads(self, key_heads: slice, query_heads: slice) -> KeyRows:
        """The same rows of some of all heads."""
        return KeyRows(self.held, self.k[:, key_heads], self.v[:, key_heads], query_heads)

    def read(self, block: Block, lease: Lease) -> tuple[Tensor, Tensor]:
        """Keys and values of a block, in its order; until the next read."""
        index = block.keys.relative_to(self.held)
        k, v = self.k[index], self.v[index]
        return (
            (k, v) if block.pick is None else (pick_rows(k, block.pick, lease, 0), pick_rows(v, block.pick, lease, 1))
        )


def all_rows(tensor: Tensor) -> Rows:
    """The range of all local rows of ``[T, ...]``."""
    return Rows(0, tensor.shape[0])


@functools.cache
def head_groups(num_heads: int, num_key_heads: int, num_groups: int) -> tuple[tuple[slice, slice], ...]:
    """Cut the key heads into nearly equal runs: the key heads and the query heads that read them, for each run."""
    sizes = head_group_sizes(num_heads, num_key_heads, num_groups)
    key_heads, heads = ([0, *accumulate(each)] for each in zip(*sizes, strict=True))
    return tuple(
        (slice(*keys), slice(*queries)) for keys, queries in zip(pairwise(key_heads), pairwise(heads), strict=True)
    )


def attend_blocks(
    call: AttentionCall,
    lease: Lease,
    blocks: Iterable[Block],
    queries: QueryRows,
    keys: ReadableKeys,
    result: PartialResult,
    held: Rows,
) -> None:
    """Run the forward of each block and merge it into ``result``, which holds the query rows ``held``."""
    for block in blocks:
        q = queries.q[block.queries.relative_to(queries.held), keys.query_heads]
        out, lse = call.kernel.forward(q, *keys.read(block, lease), block.segments, mask=block.mask, scale=call.scale)
        result.add(block.queries.relative_to(held), out, lse, keys.query_heads)


def differentiate_blocks(
    call: AttentionCall,
    lease: Lease,
    blocks: Iterable[Block],
    queries: QueryRows,
    gradient: OutputGradient,
    keys: ReadableKeys,
    query_sums: GradientSums,
    key_sums: GradientSums,
    key_heads: slice = ALL_HEADS,
) -> None:
    """Run the backward of each block and add to the sums of both sides.

    ``query_sums`` holds ``dq`` of all query heads; ``key_sums`` holds ``dk`` and ``dv``, of which ``key_heads`` are those
    of ``keys``.
    """
    heads = keys.query_heads
    for block in blocks:
        rows = block.queries.relative_to(queries.held)
        dq, dk, dv = call.kernel.backward(
            gradient.dout[rows, heads],
            queries.q[rows, heads],
            *keys.read(block, lease),
            None if gradient.out is None else gradient.out[rows, heads],
            gradient.lse[heads, rows],
            None if gradient.delta is None else gradient.delta[heads, rows],
            block.segments,
            mask=block.mask,
            scale=call.scale,
            deterministic=call.deterministic,
        )
        query_sums.add(block.queries, (dq,), heads)
        if block.pick is not None:
            dk, dv = return_rows(dk, dv, block.pick, len(block.keys))
        key_sums.add(block.keys, (dk, dv), key_heads)
