"""What one call of parallel attention is made of, and the block work that all methods share.

Symbols: T local rows, Hq, Hk heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from raysp.attention.kernels import Kernel
from raysp.attention.layout import SequenceLayout
from raysp.attention.merge import PartialResult, accumulation_dtype
from raysp.attention.schedule import Block, Rows
from raysp.comm import Communicator

Saved = tuple[Tensor, ...]
ALL_HEADS = slice(None)


@dataclass(frozen=True)
class AttentionCall:
    """The choices of one call, equal on all ranks but for the group rank.

    Attributes:
        layout: The cut of the documents.
        group: The ranks of the SP group.
        num_key_heads: Hk.
        kernel: Block kernel.
        causal: Causal inside each document.
        scale: Factor of the scores.
        deterministic: Same bits on every run.
    """

    layout: SequenceLayout
    group: Communicator
    num_key_heads: int
    kernel: Kernel
    causal: bool
    scale: float
    deterministic: bool

    @property
    def group_rank(self) -> int:
        """This process's place in the group."""
        return self.group.group_rank


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
        delta: ``[Hq, rows]``, row sums of ``dout * out``.
        out: Final output ``[rows, Hq, D]`` where it is at hand.
    """

    dout: Tensor
    lse: Tensor
    delta: Tensor
    out: Tensor | None

    @classmethod
    def of(cls, dout: Tensor, out: Tensor, lse: Tensor) -> OutputGradient:
        """Form ``delta`` once, from the final output, in fp32 or fp64."""
        dtype = accumulation_dtype(out.dtype)
        delta = (dout.to(dtype) * out.to(dtype)).sum(dim=-1).transpose(0, 1).contiguous()
        return cls(dout, lse, delta, out)


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
    query_heads: slice = field(default_factory=lambda: slice(None))


class GradientSums:
    """Sums of block gradients over a range of rows, in fp32 or fp64; each of shape ``[rows, heads, D]``."""

    def __init__(self, held: Rows, like: Tensor, count: int) -> None:
        self.held = held
        dtype = accumulation_dtype(like.dtype)
        self.sums = [torch.zeros(len(held), *like.shape[1:], dtype=dtype, device=like.device) for _ in range(count)]

    def add(self, rows: Rows, gradients: Iterable[Tensor], heads: slice = ALL_HEADS) -> None:
        """Add the gradients of these rows and heads."""
        for total, gradient in zip(self.sums, gradients, strict=True):
            total[rows.relative_to(self.held), heads] += gradient


def all_rows(tensor: Tensor) -> Rows:
    """The range of all local rows of ``[T, ...]``."""
    return Rows(0, tensor.shape[0])


def attend_blocks(
    call: AttentionCall, blocks: Iterable[Block], queries: QueryRows, keys: KeyRows, result: PartialResult, held: Rows
) -> None:
    """Run the forward of each block and merge it into ``result``, which holds the query rows ``held``."""
    for block in blocks:
        q = queries.q[block.queries.relative_to(queries.held), keys.query_heads]
        index = block.keys.relative_to(keys.held)
        out, lse = call.kernel.forward(
            q, keys.k[index], keys.v[index], block.segments, causal=block.causal, scale=call.scale
        )
        result.add(block.queries.relative_to(held), out, lse, keys.query_heads)


def differentiate_blocks(
    call: AttentionCall,
    blocks: Iterable[Block],
    queries: QueryRows,
    gradient: OutputGradient,
    keys: KeyRows,
    query_sums: GradientSums,
    key_sums: GradientSums,
) -> None:
    """Run the backward of each block and add to the sums of both sides.

    ``query_sums`` holds ``dq`` of all query heads, ``key_sums`` holds ``dk`` and ``dv`` of the heads of ``keys``.
    """
    heads = keys.query_heads
    for block in blocks:
        rows = block.queries.relative_to(queries.held)
        index = block.keys.relative_to(keys.held)
        dq, dk, dv = call.kernel.backward(
            gradient.dout[rows, heads],
            queries.q[rows, heads],
            keys.k[index],
            keys.v[index],
            None if gradient.out is None else gradient.out[rows, heads],
            gradient.lse[heads, rows],
            gradient.delta[heads, rows],
            block.segments,
            causal=block.causal,
            scale=call.scale,
            deterministic=call.deterministic,
        )
        query_sums.add(block.queries, (dq,), heads)
        key_sums.add(block.keys, (dk, dv))
