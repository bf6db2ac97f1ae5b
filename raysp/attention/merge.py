"""Merging partial attention results over disjoint keys.

``w = sigmoid(lse_b - lse_a)``, ``out = out_a - w*(out_a - out_b)``, ``lse = log(exp(lse_a) + exp(lse_b))``. Results
accumulate in fp32, or fp64 for fp64 inputs, so the error does not grow with the number of partials.

Symbols: T rows, H heads, D head size.
"""

from __future__ import annotations

import torch
from torch import Tensor


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


class PartialResult:
    """Attention output of some rows while keys keep arriving.

    Args:
        num_rows: T.
        like: A tensor ``[*, H, D]`` that gives heads, head size, device and the input dtype.
    """

    def __init__(self, num_rows: int, like: Tensor) -> None:
        self._dtype = accumulation_dtype(like.dtype)
        num_heads, head_size = like.shape[1:]
        self.out = torch.zeros(num_rows, num_heads, head_size, dtype=self._dtype, device=like.device)
        self.lse = torch.full((num_heads, num_rows), float("-inf"), dtype=self._dtype, device=like.device)

    def add(self, rows: slice, out: Tensor, lse: Tensor, heads: slice = slice(None)) -> None:
        """Merge a partial result of these rows and heads: ``out [rows, heads, D]``, ``lse [heads, rows]``."""
        merged_out, merged_lse = merge_partials(
            self.out[rows, heads], self.lse[heads, rows], out.to(self._dtype), lse.to(self._dtype)
        )
        self.out[rows, heads] = merged_out
        self.lse[heads, rows] = merged_lse
