"""Merging partial attention results over disjoint keys.

``w = sigmoid(lse_b - lse_a)``, ``out = out_a - w*(out_a - out_b)``, ``lse = log(exp(lse_a) + exp(lse_b))``. Sums of
more than two partials are kept in fp32 (fp64 for fp64 inputs), so the error does not grow with their number; on CUDA one
Triton kernel reads and writes each value once.

Symbols: T rows, H heads, D head size.
"""

from __future__ import annotations

import importlib
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from raysp.attention.blocks import Rows
from raysp.comm import Lease

ALL_HEADS = slice(None)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, otherwise fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge_partials(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two partial results over disjoint keys.

    Args:
        out_a: ``[T, H, D]``.
        lse_a: ``[H, T]``, ``-inf`` where the row has seen no key.
        out_b: Like ``out_a``.
        lse_b: Like ``lse_a``.

    Returns:
        ``out [T, H, D]`` and ``lse [H, T]`` over both key sets; a row that saw no key in either keeps ``-inf``.

    Source:
        ALGORITHMS.md section 2; ring attention (arXiv:2310.01889).
    """
    # -inf - -inf is nan: such a row has nothing to add.
    weight = torch.sigmoid(lse_b - lse_a).nan_to_num(nan=0.0).transpose(0, 1).unsqueeze(-1)
    return out_a - weight * (out_a - out_b), torch.logaddexp(lse_a, lse_b)


def merge_into(out: Tensor, lse: Tensor, other_out: Tensor, other_lse: Tensor) -> None:
    """Merge a partial result into another, in place; computed in fp32 or fp64, rounded once.

    Args:
        out: ``[T, H, D]``, written.
        lse: ``[H, T]``, written.
        other_out: Like ``out``, of any floating-point dtype.
        other_lse: Like ``lse``.
    """
    if out.is_cuda and lse.dtype == torch.float32:
        importlib.import_module("raysp.attention.triton_rows").merge_into(out, lse, other_out, other_lse)
        return
    merged_out, merged_lse = merge_partials(out.to(lse.dtype), lse, other_out.to(lse.dtype), other_lse.to(lse.dtype))
    out.copy_(merged_out)
    lse.copy_(merged_lse)


class Memory:
    """New memory for a sum; ``LeasedMemory`` is that of a lease."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def empty(self, index: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return a tensor with any content; ``index`` tells the tensors of one sum apart."""
        return torch.empty(tuple(shape), dtype=dtype, device=self._device)


class LeasedMemory(Memory):
    """Buffers of a lease: gone with it, or when another sum of the same role begins."""

    def __init__(self, lease: Lease, *role: Hashable) -> None:
        self._lease = lease
        self._role = role

    def empty(self, index: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See ``Memory.empty``."""
        return self._lease.empty((*self._role, index), shape, dtype)


class PartialResult:
    """Attention output of some rows while keys keep arriving.

    The first partial of a head that covers all rows is taken as it is. Where more than one other follows, the sum is
    kept in fp32 or fp64.

    Args:
        num_rows: T.
        like: A tensor ``[*, H, D]`` that gives heads, head size, device and the input dtype.
        num_partials: Partial results that any row of a head gets at most.
        memory: Where it finds buffers of its own, if not in new memory; then it must not outlive them.
        exactly_one: Every row of a head gets one partial result, neither none nor two: nothing is merged.
    """

    def __init__(
        self, num_rows: int, like: Tensor, num_partials: int, memory: Memory | None = None, *, exactly_one: bool = False
    ) -> None:
        self._shape = (num_rows, *like.shape[1:])
        self._like = like
        self._memory = Memory(like.device) if memory is None else memory
        self._is_wide = num_partials > 2
        self._exactly_one = exactly_one
        self._unwritten = _UnwrittenHeads(like.shape[1])
        self._out: Tensor | None = None
        self._lse: Tensor | None = None

    def add(self, rows: slice, out: Tensor, lse: Tensor, heads: slice = ALL_HEADS, *, may_keep: bool = True) -> None:
        """Merge a partial result of these rows and heads.

        Args:
            rows: Which.
            out: ``[rows, heads, D]``.
            lse: ``[heads, rows]``.
            heads: Which.
            may_keep: The result may keep the tensors; not those of a lease.
        """
        if may_keep and self._out is None and out.shape == self._shape:
            self._out, self._lse = out, lse
            self._unwritten.take(heads)
            return
        held_out, held_lse = self._held(out.dtype)
        if self._is_wide and held_out.dtype != accumulation_dtype(self._like.dtype):
            wide = self._memory.empty(0, held_out.shape, accumulation_dtype(self._like.dtype))
            held_out = self._out = wide.copy_(held_out)
        if self._exactly_one or (out.shape[0] == self._shape[0] and self._unwritten.all_of(heads)):
            held_out[rows, heads], held_lse[heads, rows] = out, lse
        else:
            self._clear(heads)
            merge_into(held_out[rows, heads], held_lse[heads, rows], out, lse)
        self._unwritten.take(heads)

    def finished(self) -> tuple[Tensor, Tensor]:
        """The output ``[T, H, D]`` in the input dtype and the LSE ``[H, T]``."""
        out, lse = self._held(self._like.dtype)
        self._clear(ALL_HEADS)
        return out.to(self._like.dtype), lse

    def _held(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self._out is None or self._lse is None:
            num_rows, num_heads, _ = self._shape
            wide = accumulation_dtype(self._like.dtype)
            self._out = self._memory.empty(0, self._shape, wide if self._is_wide else dtype)
            self._lse = self._memory.empty(1, (num_heads, num_rows), wide)
        return self._out, self._lse

    def _clear(self, heads: slice) -> None:
        out, lse = self._held(self._like.dtype)
        for run in self._unwritten.take(heads):
            out[:, run] = 0
            lse[run] = float("-inf")


class GradientSums:
    """Sums of block gradients over a range of rows; each of shape ``[rows, heads, D]``.

    The first gradients of a head that cover all rows are taken as they are. Where more than one other follows, the sums
    are kept in fp32 or fp64.

    Args:
        held: The rows.
        like: A tensor ``[*, heads, D]`` that gives heads, head size, device and the input dtype.
        count: How many tensors are summed side by side (dk and dv: 2).
        num_terms: Gradients that any row of a head gets at most.
        memory: As in ``PartialResult``.
        exactly_one: As in ``PartialResult``.
    """

    def __init__(
        self, held: Rows, like: Tensor, count: int, num_terms: int, memory: Memory | None = None, *,
        exactly_one: bool = False,
    ) -> None:  # fmt: skip
        self.held = held
        self._like = like
        self._memory = Memory(like.device) if memory is None else memory
        self._count = count
        self._shape = (len(held), *like.shape[1:])
        self._is_wide = num_terms > 2
        self._exactly_one = exactly_one
        self._unwritten = _UnwrittenHeads(like.shape[1])
        self._sums: list[Tensor] = []
        # Whether they are gradients that were taken as they are; then no memory is used yet.
        self._are_kept = False

    @property
    def sums(self) -> list[Tensor]:
        """The sums so far: zeros before the first gradient, in the input dtype or a wider one."""
        self._allocate(self._like.dtype)
        self._clear(ALL_HEADS)
        return self._sums

    def to_send(self, dtype: torch.dtype) -> list[Tensor]:
        """The sums so far in a dtype, contiguous; what is not so already is copied, once."""
        # Not into the memory that the sums themselves may have.
        first = 0 if self._are_kept else self._count
        return [
            total
            if total.dtype == dtype and total.is_contiguous()
            else self._memory.empty(first + index, self._shape, dtype).copy_(total)
            for index, total in enumerate(self.sums)
        ]

    def add(self, rows: Rows, gradients: Sequence[Tensor], heads: slice = ALL_HEADS, *, may_keep: bool = True) -> None:
        """Add the gradients of these rows and heads; the sums may keep the tensors, unless those are of a lease."""
        if may_keep and not self._sums and all(gradient.shape == self._shape for gradient in gradients):
            self._sums, self._are_kept = list(gradients), True
            self._unwritten.take(heads)
            return
        self._allocate(gradients[0].dtype)
        wide = accumulation_dtype(self._like.dtype)
        is_first = len(rows) == len(self.held) and self._unwritten.all_of(heads)
        if not (is_first or self._exactly_one):
            self._clear(heads)
        if self._is_wide and self._are_kept and self._sums[0].dtype != wide:
            self._sums, self._are_kept = self.to_send(wide), False
        for index, gradient in enumerate(gradients):
            if is_first or self._exactly_one:
                self._sums[index][rows.relative_to(self.held), heads] = gradient
            else:
                self._sums[index][rows.relative_to(self.held), heads] += gradient
        self._unwritten.take(heads)

    def _allocate(self, dtype: torch.dtype) -> None:
        if not self._sums:
            dtype = accumulation_dtype(self._like.dtype) if self._is_wide else dtype
            self._sums = [self._memory.empty(index, self._shape, dtype) for index in range(self._count)]

    def _clear(self, heads: slice) -> None:
        for run in self._unwritten.take(heads):
            for total in self._sums:
                total[:, run] = 0


class _UnwrittenHeads:
    """Heads of a new buffer that nothing was written to yet."""

    def __init__(self, num_heads: int) -> None:
        self._num_heads = num_heads
        self._heads = set(range(num_heads))

    def all_of(self, heads: slice) -> bool:
        """Whether none of these was written to."""
        return self._heads.issuperset(range(*heads.indices(self._num_heads)))

    def take(self, heads: slice) -> list[slice]:
        """Count these as written; return those that were not, as runs."""
        taken = self._heads.intersection(range(*heads.indices(self._num_heads))) if self._heads else set()
        self._heads -= taken
        runs: list[slice] = []
        for head in sorted(taken):
            if runs and runs[-1].stop == head:
                runs[-1] = slice(runs[-1].start, head + 1)
            else:
                runs.append(slice(head, head + 1))
        return runs
