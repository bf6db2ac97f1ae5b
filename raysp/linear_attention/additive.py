"""The additive rule on chunks, and what it shares with the delta rule.

A chunk is affine in the state S before it. With r the values it adds to the state and the decayed products of ``decays``:

    state after it:  diag(total) S + cols^T r
    outputs:         rows S + scores r

The additive rule adds r = v.

Symbols: N chunks, H heads, C rows of a chunk, K key size, V value size.
Source: Mamba-2 (arXiv:2405.21060), section 6; GLA (arXiv:2312.06635), section 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from raysp.linear_attention.chunks import Rows
from raysp.linear_attention.decays import DecayedProducts, decayed_from_start, decayed_products


@dataclass(frozen=True)
class StateGradients:
    """What reaches chunks from outside.

    Attributes:
        states: ``[N, H, K, V]``, the states before the chunks; not gradients, but every gradient needs them.
        dstates: ``[N, H, K, V]``, gradients of the states after the chunks.
        dout: ``[N, H, C, V]``, gradients of the outputs.
    """

    states: Tensor
    dstates: Tensor
    dout: Tensor


class ChunkRule(Protocol):
    """What the chunks of one rule do, each by itself; made with their rows in the accumulation dtype, q scaled.

    A chunk turns the state S before it into ``M S + U``.

    Attributes:
        transition: M, ``[N, H, 1 or K]`` factors of the state's rows or matrices ``[N, H, K, K]``.
        update: U, ``[N, H, K, V]``.
    """

    transition: Tensor
    update: Tensor

    def output_map(self) -> tuple[Tensor, Tensor]:
        """How S becomes the outputs ``R S + L``: R ``[N, H, C, K]`` and L ``[N, H, C, V]``."""
        ...

    def readout(self) -> Tensor:
        """R alone."""
        ...

    def gradients(self, outer: StateGradients) -> Rows:
        """Gradients of the inputs."""
        ...


@dataclass(frozen=True)
class ProductGradients:
    """Gradients of what the maps of a chunk are made of; see ``decays.DecayedProducts``."""

    rows: Tensor
    cols: Tensor
    total: Tensor
    scores: Tensor
    values: Tensor


def product_gradients(products: DecayedProducts, values: Tensor, outer: StateGradients) -> ProductGradients:
    """Gradients through both maps, of the products whose first rows are the queries and of the values r."""
    return ProductGradients(
        rows=outer.dout @ outer.states.mT,
        cols=values @ outer.dstates.mT,
        total=(outer.states * outer.dstates).sum(-1),
        scores=outer.dout @ values.mT,
        values=products.scores[0].mT @ outer.dout + products.cols @ outer.dstates,
    )


class AdditiveChunks:
    """The maps of chunks under the additive rule; see ``ChunkRule``."""

    def __init__(self, x: Rows) -> None:
        self._x = x
        products = decayed_products((), x.k, x.log_decay)
        self.transition = products.total
        self.update = products.cols.mT @ x.v

    def output_map(self) -> tuple[Tensor, Tensor]:
        """See ``ChunkRule``."""
        products = decayed_products((self._x.q,), self._x.k, self._x.log_decay)
        return products.rows[0], products.scores[0] @ self._x.v

    def readout(self) -> Tensor:
        """See ``ChunkRule``."""
        return decayed_from_start(self._x.q, self._x.log_decay)

    def gradients(self, outer: StateGradients) -> Rows:
        """See ``ChunkRule``."""
        x = self._x
        products = decayed_products((x.q,), x.k, x.log_decay)
        inner = product_gradients(products, x.v, outer)
        [dq], dk, dlog_decay = products.gradients((inner.rows,), inner.cols, inner.total, (inner.scores,))
        return Rows(dq, dk, inner.values, dlog_decay, None)
