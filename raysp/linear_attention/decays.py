"""Decayed products inside chunks, and their gradients.

With c the log decays of a chunk summed up to a row, the row's own included, what every family needs is

    rows_i * exp(c_i)           a row against the state at the start of the chunk
    cols_j * exp(c_C - c_j)     a column's part of the state at its end
    exp(c_C)                    the decay of the whole chunk
    scores_ij = sum over K of rows_i * cols_j * exp(c_i - c_j) for j <= i, else 0

Differences of c lose all digits after one strong decay, and their exponentials overflow where they are split in two factors.
So decays are only ever summed or multiplied together: every factor is at most 1, and strong decays are exact. The
same goes for gradients, which are summed over exactly the products that a decay is part of.

Symbols: N chunks, H heads, C rows of a chunk (a power of two), K key size.
Source: the sub-blocks of GLA (arXiv:2312.06635, section 4.3), taken down to single rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad


class DecayedProducts(Protocol):
    """Products of some ``rows [N, H, C, K]`` and one ``cols [N, H, C, K]`` under one decay.

    Attributes:
        rows: ``[N, H, C, K]`` each, decayed from the start of the chunk.
        cols: ``[N, H, C, K]``, decayed to the end of the chunk.
        total: ``[N, H, 1 or K]``, the decay of a chunk.
        scores: ``[N, H, C, C]`` of each of the rows.
    """

    rows: tuple[Tensor, ...]
    cols: Tensor
    total: Tensor
    scores: tuple[Tensor, ...]

    def gradients(
        self, drows: tuple[Tensor, ...], dcols: Tensor, dtotal: Tensor, dscores: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
        """Gradients of the plain rows and columns and of the log decay, from those of the attributes.

        ``dtotal`` is ``[N, H, K]``; what ``dscores`` hold above the diagonal is ignored.
        """
        ...


def decayed_products(rows: tuple[Tensor, ...], cols: Tensor, log_decay: Tensor | None) -> DecayedProducts:
    """Multiply rows and columns under a log decay: ``None``, ``[N, H, C]`` or ``[N, H, C, K]``, at most 0."""
    if log_decay is None:
        return _Undecayed(rows, cols)
    return _HeadDecayed(rows, cols, log_decay) if log_decay.ndim == 3 else _KeyDecayed(rows, cols, log_decay)


def decayed_from_start(rows: Tensor, log_decay: Tensor | None) -> Tensor:
    """The ``rows`` of ``DecayedProducts`` alone."""
    if log_decay is None:
        return rows
    decays = log_decay if log_decay.ndim == 4 else log_decay[..., None]
    return rows * decays.cumsum(2).exp()


def half_blocks(matrices: Tensor, half: int, row: int, col: int) -> Tensor:
    """View of one quarter of the diagonal blocks of size ``2 * half``.

    Args:
        matrices: ``[N, H, C, C]``, contiguous.
        half: Size of a quarter.
        row: 0 for the upper quarters, 1 for the lower ones.
        col: 0 for the left quarters, 1 for the right ones.

    Returns:
        ``[N, H, C / (2 * half), half, half]``.
    """
    num_blocks = matrices.shape[-1] // (2 * half)
    grid = matrices.view(*matrices.shape[:2], num_blocks, 2, half, num_blocks, 2, half)
    return grid[:, :, :, row, :, :, col].diagonal(dim1=2, dim2=4).movedim(-1, 2)


class _Undecayed:
    """See ``DecayedProducts``; every factor is 1."""

    def __init__(self, rows: tuple[Tensor, ...], cols: Tensor) -> None:
        self.rows = rows
        self.cols = cols
        self.total = cols.new_ones(1, 1, 1).expand(*cols.shape[:2], 1)
        self.scores = tuple((row @ cols.mT).tril_() for row in rows)

    def gradients(
        self, drows: tuple[Tensor, ...], dcols: Tensor, dtotal: Tensor, dscores: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], Tensor, None]:
        found = []
        for row, drow, dscore in zip(self.rows, drows, dscores, strict=True):
            lower = dscore.tril()
            found.append(drow + lower @ self.cols)
            dcols = dcols + lower.mT @ row
        return tuple(found), dcols, None


class _HeadDecayed:
    """See ``DecayedProducts``; one number per row and head, so scores are a product times a matrix of decays."""

    def __init__(self, rows: tuple[Tensor, ...], cols: Tensor, log_decay: Tensor) -> None:
        self._plain = rows, cols
        self._start = log_decay.cumsum(-1).exp()
        self._end = _reverse_cumsum(pad(log_decay[..., 1:], (0, 1))).exp()
        self.rows = tuple(row * self._start[..., None] for row in rows)
        self.cols = cols * self._end[..., None]
        self.total = self._start[..., -1:]
        self.scores: tuple[Tensor, ...] = ()
        if rows:
            later = log_decay[..., None].expand(*log_decay.shape, log_decay.shape[-1]).tril(-1)
            self._between = later.cumsum(-2).exp_().tril_()
            self.scores = tuple((row @ cols.mT).mul_(self._between) for row in rows)

    def gradients(
        self, drows: tuple[Tensor, ...], dcols: Tensor, dtotal: Tensor, dscores: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        rows, cols = self._plain
        dlog_start = _sum_products(drows, self.rows, dim=-1)
        dlog_start[..., -1] += dtotal.sum(-1) * self.total[..., 0]
        dlog_between = _sum_products(dscores, self.scores)
        dlog_between[..., -1, :] += (dcols * self.cols).sum(-1)
        # Log decay m is part of the factors of all rows i >= m with all columns j < m.
        ones = torch.ones_like(dlog_between[0, 0]).triu()
        dlog_decay = _reverse_cumsum(dlog_start) + (ones @ dlog_between).tril_(-1).sum(-1)
        plain = [dscore * self._between for dscore in dscores]
        dcols = dcols * self._end[..., None]
        for row, score in zip(rows, plain, strict=True):
            dcols += score.mT @ row
        found = [drow * self._start[..., None] + score @ cols for drow, score in zip(drows, plain, strict=True)]
        return tuple(found), dcols, dlog_decay


class _KeyDecayed:
    """See ``DecayedProducts``; one number per row, head and key.

    Rows are decayed from, columns to the borders of blocks of 1, 2, 4, ... rows. Where two blocks meet, the product of the
    second one's rows and the first one's columns are scores; the blocks then become one.
    """

    def __init__(self, rows: tuple[Tensor, ...], cols: Tensor, log_decay: Tensor) -> None:
        self._plain = rows, cols
        self._decay = log_decay.exp()
        self._levels: list[_Level] = []
        self.rows = tuple(row * self._decay for row in rows)
        self.cols = cols.clone(memory_format=torch.contiguous_format)
        self.scores = tuple(torch.diag_embed((row * cols).sum(-1)) for row in rows)
        total, half = self._decay, 1
        while half < cols.shape[-2]:
            first_total, second_total = total.unflatten(-2, (-1, 2)).unbind(-2)
            second_rows = [_halves(row, half)[1] for row in self.rows]
            first_cols = _halves(self.cols, half)[0]
            for row, score in zip(second_rows, self.scores, strict=True):
                half_blocks(score, half, 1, 0).copy_(row @ first_cols.mT)
            self._levels.append(
                _Level(half, [row.clone() for row in second_rows], first_cols.clone(), first_total, second_total)
            )
            for row in second_rows:
                row *= first_total[..., None, :]
            first_cols *= second_total[..., None, :]
            total, half = first_total * second_total, 2 * half
        self.total = total[..., 0, :]

    def gradients(
        self, drows: tuple[Tensor, ...], dcols: Tensor, dtotal: Tensor, dscores: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor]:
        rows, cols = self._plain
        drows, dcols, dtotal = tuple(drow.clone() for drow in drows), dcols.clone(), dtotal[..., None, :]
        for level in reversed(self._levels):
            dseconds = [_halves(drow, level.half)[1] for drow in drows]
            dfirst = _halves(dcols, level.half)[0]
            dfirst_total = dtotal * level.second_total + _sum_products(dseconds, level.second_rows, dim=-2)
            dsecond_total = dtotal * level.first_total + (dfirst * level.first_cols).sum(-2)
            dtotal = torch.stack([dfirst_total, dsecond_total], dim=-2).flatten(-3, -2)
            dfirst *= level.second_total[..., None, :]
            for drow, row, dscore in zip(dseconds, level.second_rows, dscores, strict=True):
                dblock = half_blocks(dscore, level.half, 1, 0)
                drow.mul_(level.first_total[..., None, :]).add_(dblock @ level.first_cols)
                dfirst += dblock.mT @ row
        ddecay = dtotal + _sum_products(drows, rows)
        found = []
        for row, drow, dscore in zip(rows, drows, dscores, strict=True):
            ddiagonal = dscore.diagonal(dim1=-2, dim2=-1)[..., None]
            found.append(drow * self._decay + ddiagonal * cols)
            dcols += ddiagonal * row
        return tuple(found), dcols, ddecay * self._decay


@dataclass(frozen=True)
class _Level:
    """Two blocks of ``half`` rows each, before they became one; totals are ``[N, H, C / (2 * half), K]``."""

    half: int
    second_rows: list[Tensor]
    first_cols: Tensor
    first_total: Tensor
    second_total: Tensor


def _halves(rows: Tensor, half: int) -> tuple[Tensor, ...]:
    """Views of the first and the second halves of blocks: ``[N, H, C / (2 * half), half, K]`` each."""
    return rows.unflatten(-2, (-1, 2, half)).unbind(-3)


def _reverse_cumsum(x: Tensor) -> Tensor:
    return x.flip(-1).cumsum(-1).flip(-1)


def _sum_products(left: Sequence[Tensor], right: Sequence[Tensor], dim: int | None = None) -> Tensor:
    """The sum of all ``left * right``, summed over ``dim`` too."""
    products = [a * b if dim is None else (a * b).sum(dim) for a, b in zip(left, right, strict=True)]
    return functools.reduce(torch.add, products)
