"""What one call of parallel attention is made of, and the block work that all methods share.

Symbols: T local rows, Hq, Hk heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from raysp.attention.kernels import Kernel
from raysp.attention.layout import SequenceLayout
from raysp.attention.merge import PartialResult, accumulation_dtype
from raysp.attention.schedule import Block, Rows
from raysp.comm import Communicator

Saved = tuple[Tensor, ...]


@dataclass(frozen=True)
class AttentionCall:
    """The choices of one call, equal on all ranks but for the group rank.

    Attributes:
        layout: The cut of the documents.
        communicator: The group; ``None`` at degree 1.
        kernel: Block kernel.
        causal: Causal inside each document.
        scale: Factor of the scores.
        deterministic: Same bits on every run.
    """

    layout: SequenceLayout
    communicator: Communicator | None
    kernel: Kernel
    causal: bool
    scale: float
    deterministic: bool

    @property
    def group_rank(self) -> int:
        """This process's place in the group."""
        return self.communicator.group_rank if self.communicator else 0

    @property
    def group(self) -> Communicator:
        """The group; only methods of degree 2 and more ask for it."""
        if self.communicator is None:
            raise AssertionError("a method that communicates was called without a group")
        return self.communicator


class Method(Protocol):
    """A way to run attention over the ranks of a group."""

    name: str

    def forward(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Saved]:
        """Return the output of the local rows ``[T, Hq, D]`` and what the backward needs."""
        ...

    def backward(self, call: AttentionCall, saved: Saved, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``dq [T, Hq, D]``, ``dk`` and ``dv [T, Hk, D]`` of the local rows."""
        ...


@dataclass(frozen=True)
class QueryRows:
    """Some rows of a query shard and, for a backward, what belongs to them.

    Attributes:
        held: Which local rows of the owner the tensors hold.
        q: ``[rows, Hq, D]``.
        dout: Gradient of the output, like ``q``.
        out: Final output, like ``q``; ``None`` where only ``delta`` is known.
        lse: ``[Hq, rows]``.
        delta: ``[Hq, rows]``.
    """

    held: Rows
    q: Tensor
    dout: Tensor | None = None
    out: Tensor | None = None
    lse: Tensor | None = None
    delta: Tensor | None = None

    def select(self, rows: Rows, heads: slice) -> QueryRows:
        """Views of these rows and heads."""
        index = rows.relative_to(self.held)
        by_row = [None if x is None else x[index, heads] for x in (self.q, self.dout, self.out)]
        by_head = [None if x is None else x[heads, index] for x in (self.lse, self.delta)]
        return QueryRows(rows, by_row[0], by_row[1], by_row[2], by_head[0], by_head[1])


@dataclass(frozen=True)
class KeyRows:
    """Some rows and heads of a key shard; ``k`` and ``v`` are ``[rows, heads, D]``.

    Attributes:
        held: Which local rows of the owner the tensors hold.
        k: Keys.
        v: Values.
        heads: Which key heads of the model they are.
    """

    held: Rows
    k: Tensor
    v: Tensor
    heads: slice


class GradientSums:
    """Sums of block gradients over a range of rows, in fp32 or fp64; ``[rows, heads, D]``."""

    def __init__(self, held: Rows, like: Tensor, count: int) -> None:
        self.held = held
        dtype = accumulation_dtype(like.dtype)
        self.sums = [torch.zeros(len(held), *like.shape[1:], dtype=dtype, device=like.device) for _ in range(count)]

    def add(self, rows: Rows, gradients: Iterable[Tensor], heads: slice = slice(None)) -> None:
        """Add the gradients of these rows and heads."""
        for total, gradient in zip(self.sums, gradients, strict=True):
            total[rows.relative_to(self.held), heads] += gradient


def all_rows(tensor: Tensor) -> Rows:
    """The range of all local rows."""
    return Rows(0, tensor.shape[0])


def attend_blocks(
    call: AttentionCall, blocks: Iterable[Block], queries: QueryRows, keys: KeyRows, result: PartialResult, held: Rows
) -> None:
    """Run the forward of each block and merge it into ``result``, which holds the query rows ``held``."""
    heads = query_heads(queries.q, keys)
    for block in blocks:
        index = block.keys.relative_to(keys.held)
        q = queries.select(block.queries, heads).q
        out, lse = call.kernel.forward(
            q, keys.k[index], keys.v[index], block.segments, causal=block.causal, scale=call.scale
        )
        result.add(block.queries.relative_to(held), out, lse, heads)


def differentiate_blocks(
    call: AttentionCall,
    blocks: Iterable[Block],
    queries: QueryRows,
    keys: KeyRows,
    query_sums: GradientSums,
    key_sums: GradientSums,
) -> None:
    """Run the backward of each block and add its gradients to the sums of the query side and of the key side.

    ``key_sums`` holds the heads of ``keys``; ``query_sums`` holds all query heads.
    """
    heads = query_heads(queries.q, keys)
    for block in blocks:
        index = block.keys.relative_to(keys.held)
        rows = queries.select(block.queries, heads)
        if rows.dout is None or rows.lse is None or rows.delta is None:
            raise AssertionError("a backward needs dout, lse and delta of its query rows")
        dq, dk, dv = call.kernel.backward(
            rows.dout,
            rows.q,
            keys.k[index],
            keys.v[index],
            rows.out,
            rows.lse,
            rows.delta,
            block.segments,
            causal=block.causal,
            scale=call.scale,
            deterministic=call.deterministic,
        )
        query_sums.add(block.queries, (dq,), heads)
        key_sums.add(block.keys, (dk, dv))


def row_delta(dout: Tensor, out: Tensor) -> Tensor:
    """``delta [H, T]``, the row sums of ``dout * out``, in fp32 or fp64."""
    dtype = accumulation_dtype(out.dtype)
    return (dout.to(dtype) * out.to(dtype)).sum(dim=-1).transpose(0, 1).contiguous()


def query_heads(q: Tensor, keys: KeyRows) -> slice:
    """Query heads that read the key heads of ``keys``: all of them where ``keys`` holds all key heads."""
    if keys.heads == slice(None):
        return slice(None)
    per_key_head = q.shape[1] // keys.heads.step if keys.heads.step else 1
    return slice(keys.heads.start * per_key_head, keys.heads.stop * per_key_head)
