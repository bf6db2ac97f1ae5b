"""The delta rule on chunks: the values that a chunk adds to its state solve a triangular system.

A token adds ``k_t r_t^T`` with ``r_t = beta_t (v_t - S'_t^T k_t)``, where S'_t is the decayed state before it. Over a chunk
that starts with the state S, and with the decayed products of ``decays`` of the keys with themselves,

    (I + B) r = diag(beta) (v - rows_k S),    B = diag(beta) strictly_lower(scores_k)

so ``r = u - w S`` with ``(I + B) [u | w] = diag(beta) [v | rows_k]``: the WY form. With such r the maps of the additive rule
hold.

Symbols: N chunks, H heads, C rows of a chunk (a power of two), K key size, V value size.
Source: DeltaNet (arXiv:2406.06484), section 3; Gated DeltaNet (arXiv:2412.06464), section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from raysp.errors import InputError
from raysp.linear_attention.additive import StateGradients, product_gradients
from raysp.linear_attention.chunks import Rows
from raysp.linear_attention.decays import decayed_products, half_blocks


class DeltaChunks:
    """The maps of chunks under the delta rule; see ``ChunkRule``."""

    def __init__(self, x: Rows) -> None:
        if x.beta is None:
            raise InputError("rule 'delta' came without beta; expected the strength of every token's update.")
        self._x = x
        self._beta = x.beta[..., None]
        products = decayed_products((x.k,), x.k, x.log_decay)
        self._inverse = _unit_lower_inverse(self._beta * products.scores[0])
        self._u = self._inverse @ (self._beta * x.v)
        self._w = self._inverse @ (self._beta * products.rows[0])
        self.transition = -(products.cols.mT @ self._w)
        self.transition.diagonal(dim1=-2, dim2=-1).add_(products.total)
        self.update = products.cols.mT @ self._u

    def output_map(self) -> tuple[Tensor, Tensor]:
        """See ``ChunkRule``."""
        [rows], [scores] = self._query_products()
        return rows - scores @ self._w, scores @ self._u

    def readout(self) -> Tensor:
        """See ``ChunkRule``."""
        [rows], [scores] = self._query_products()
        return rows - scores @ self._w

    def gradients(self, outer: StateGradients) -> Rows:
        """See ``ChunkRule``."""
        x, beta = self._x, self._beta
        products = decayed_products((x.q, x.k), x.k, x.log_decay)
        r = self._u - self._w @ outer.states
        inner = product_gradients(products, r, outer)
        # r = beta * error, where error = v - rows_k S - strictly_lower(scores_k) r.
        error = x.v - products.rows[1] @ outer.states - products.scores[1].tril(-1) @ r
        dsolved = self._inverse.mT @ inner.values
        derror = beta * dsolved
        (dq, dk), dcols, dlog_decay = products.gradients(
            (inner.rows, -(derror @ outer.states.mT)),
            inner.cols,
            inner.total,
            (inner.scores, -(derror @ r.mT).tril_(-1)),
        )
        return Rows(dq, dk + dcols, derror, dlog_decay, (dsolved * error).sum(-1))

    def _query_products(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        products = decayed_products((self._x.q,), self._x.k, self._x.log_decay)
        return products.rows, products.scores


def _unit_lower_inverse(matrices: Tensor) -> Tensor:
    """``(I + strictly_lower(matrices))^{-1}`` of ``[N, H, C, C]``, from blocks of 1, 2, 4, ... rows.

    ``[[A, 0], [B, D]]`` has the inverse ``[[A', 0], [-D' B A', D']]``: three products for all blocks at once, where a
    triangular solve goes row by row.
    """
    size = matrices.shape[-1]
    inverse = torch.eye(size, dtype=matrices.dtype, device=matrices.device).expand_as(matrices).contiguous()
    half = 1
    while half < size:
        first, second = half_blocks(inverse, half, 0, 0), half_blocks(inverse, half, 1, 1)
        lower = half_blocks(matrices, half, 1, 0)
        half_blocks(inverse, half, 1, 0).copy_(-(second @ lower @ first))
        half *= 2
    return inverse
