"""Merging partial attention results over disjoint keys.

``w = sigmoid(lse_b - lse_a)``, ``out = out_a - w*(out_a - out_b)``, ``lse = log(exp(lse_a) + exp(lse_b))``. Sums of
more than two partials are kept in fp32 (fp64 for fp64 inputs), so the error does not grow with their number; on CUDA one
Triton kernel reads and writes each value once.

Symbols: T rows, H heads, D head size.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from raysp.attention.blocks import Rows

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


class PartialResult:
    """Attention output of some rows while keys keep arriving.

    The first partial of a head that covers all rows is taken as it is. Where more than one other follows, the sum is
    kept in fp32 or fp64.

    Args:
        num_rows: T.
        like: A tensor ``[*, H, D]`` that gives heads, head size, device and the input dtype.
        num_partials: Partial results that any row of a head gets at most.
    """

    def __init__(self, num_rows: int, like: Tensor, num_partials: int) -> None:
        self._shape = (num_rows, *like.shape[1:])
        self._like = like
        self._is_wide = num_partials > 2
        self._unwritten = _UnwrittenHeads(like.shape[1])
        self._out: Tensor | None = None
        self._lse: Tensor | None = None

    def add(self, rows: slice, out: Tensor, lse: Tensor, heads: slice = ALL_HEADS) -> None:
        """Merge a partial result of these rows and heads: ``out [rows, heads, D]``, ``lse [heads, rows]``."""
        if self._out is None and out.shape == self._shape:
            self._out, self._lse = out, lse
            self._unwritten.take(heads)
            return
        held_out, held_lse = self._held(out.dtype)
        if self._is_wide and held_out.dtype != accumulation_dtype(self._like.dtype):
            held_out = self._out = held_out.to(accumulation_dtype(self._like.dtype))
        if out.shape[0] == self._shape[0] and self._unwritten.all_of(heads):
            held_out[:, heads], held_lse[heads] = out, lse
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
            self._out = self._like.new_empty(self._shape, dtype=wide if self._is_wide else dtype)
            self._lse = self._like.new_empty((num_heads, num_rows), dtype=wide)
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
    """

    def __init__(self, held: Rows, like: Tensor, count: int, num_terms: int) -> None:
        self.held = held
        self._like = like
        self._count = count
        self._shape = (len(held), *like.shape[1:])
        self._is_wide = num_terms > 2
        self._unwritten = _UnwrittenHeads(like.shape[1])
        self._sums: list[Tensor] = []

    @property
    def sums(self) -> list[Tensor]:
        """The sums so far: zeros before the first gradient, in the input dtype or a wider one."""
        self._allocate(self._like.dtype)
        self._clear(ALL_HEADS)
        return self._sums

    def add(self, rows: Rows, gradients: Sequence[Tensor], heads: slice = ALL_HEADS) -> None:
        """Add the gradients of these rows and heads; the sums may keep the tensors themselves."""
        if not self._sums and all(gradient.shape == self._shape for gradient in gradients):
            self._sums = list(gradients)
            self._unwritten.take(heads)
            return
        self._allocate(gradients[0].dtype)
        wide = accumulation_dtype(self._like.dtype)
        is_first = len(rows) == len(self.held) and self._unwritten.all_of(heads)
        if not is_first:
            self._clear(heads)
        for index, gradient in enumerate(gradients):
            if self._is_wide and self._sums[index].dtype != wide:
                self._sums[index] = self._sums[index].to(wide)
            if is_first:
                self._sums[index][:, heads] = gradient
            else:
                self._sums[index][rows.relative_to(self.held), heads] += gradient
        self._unwritten.take(heads)

    def _allocate(self, dtype: torch.dtype) -> None:
        if not self._sums:
            dtype = accumulation_dtype(self._like.dtype) if self._is_wide else dtype
            self._sums = [self._like.new_empty(self._shape, dtype=dtype) for _ in range(self._count)]

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
