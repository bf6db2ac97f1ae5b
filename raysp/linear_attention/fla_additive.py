"""The additive rule with flash-linear-attention's kernels: ``simple_gla`` for decays of heads, ``gla`` for those of channels.

States that other ranks need are single matrix products without decay, ``sum of k v^T`` or backward of ``q dO^T``. With
decay they are passes over the chunks: sums of decays over all rows of a long part would be as slow as all else together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raysp.linear_attention.fla_rows import CHUNK, FlaRows, PartGradients


class AdditivePart:
    """See ``FlaPart``."""

    def __init__(self, rows: FlaRows) -> None:
        self._rows = rows
        self._q, self._k, self._v = (tensor.unsqueeze(0) for tensor in (rows.q, rows.k, rows.v))
        self._common: dict[str, Any] = {"scale": rows.scale, "chunk_size": CHUNK, **rows.packing}
        self._states: tuple[Tensor, Tensor] | None = None
        self._made_scores: Tensor | None = None

    def outgoing(self, initial: Tensor | None, *, with_transition: bool) -> tuple[Tensor, Tensor | None]:
        """A state pass; ``output`` uses it again where it began from the known state."""
        if initial is not None:
            return self._state_pass(initial.unsqueeze(0))[1][0], None
        rows = self._rows
        state = _row_products(rows.k, rows.v) if rows.log_decay is None else self._pass_from(None)[1][0]
        return state, self._transition() if with_transition else None

    def output(self, initial: Tensor) -> tuple[Tensor, Tensor]:
        """State pass, scores inside chunks, output."""
        from fla.ops.common.chunk_o import chunk_fwd_o
        from fla.ops.gla.chunk import chunk_gla_fwd_o_gk

        states, final = self._state_pass(initial)
        sums = self._rows.decay_sums
        if self._rows.decays_by_channel:
            out = chunk_gla_fwd_o_gk(q=self._q, v=self._v, g=sums, A=self._scores(), h=states, **self._common)
        else:
            out = chunk_fwd_o(q=self._q, k=self._k, v=self._v, h=states, g=sums, **self._common)
        return out[0], final

    def incoming_gradient(self, dout: Tensor, dfinal: Tensor | None) -> Tensor:
        """A pass over the chunks from the last to the first."""
        if self._rows.log_decay is None:
            gradient = _row_products(self._rows.q * self._rows.scale, dout)
            return gradient if dfinal is None else gradient + dfinal
        from fla.ops.common.chunk_h import chunk_bwd_dh

        heads, keys = self._rows.k.shape[1:]
        initial = self._rows.k.new_empty(
            1, heads, keys, self._rows.v.shape[2], dtype=torch.float32
        )  # asks for its gradient
        _, gradient = chunk_bwd_dh(
            q=self._q, k=self._k, v=self._v, do=dout.unsqueeze(0), h0=initial,
            dht=None if dfinal is None else dfinal.unsqueeze(0), scale=self._rows.scale, chunk_size=CHUNK,
            cu_seqlens=self._rows.packing["cu_seqlens"], **self._rows.gates,
        )  # fmt: skip
        return gradient[0]

    def gradient_work_ahead(self, initial: Tensor, dout: Tensor) -> None:
        """Scores inside chunks; fla's backward makes the states itself."""
        if self._rows.decays_by_channel:
            self._scores()

    def gradients(self, initial: Tensor, dout: Tensor, dfinals: Tensor) -> PartGradients:
        """fla's backward passes."""
        from fla.ops.gla.chunk import chunk_gla_bwd
        from fla.ops.simple_gla.chunk import chunk_simple_gla_bwd

        rows = {"q": self._q, "k": self._k, "v": self._v}
        around = {"initial_state": initial, "do": dout.unsqueeze(0), "dht": dfinals}
        sums = self._rows.decay_sums
        if self._rows.decays_by_channel:
            dq, dk, dv, decay, dinitial = chunk_gla_bwd(
                **rows, **around, g=None, g_cumsum=sums, h=None, A=self._scores(), **self._common
            )
            decay = decay[0]
        else:
            dq, dk, dv, dsums, dinitial = chunk_simple_gla_bwd(**rows, **around, g=sums, g_gamma=None, **self._common)
            decay = self._rows.decay_gradient(dsums)
        return PartGradients(dq[0], dk[0], dv[0], decay, None, dinitial)

    def _state_pass(self, initial: Tensor) -> tuple[Tensor, Tensor]:
        """States before every chunk, and final ones."""
        if self._states is None:
            self._states = self._pass_from(initial)
        return self._states

    def _pass_from(self, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        from fla.ops.common.chunk_h import chunk_fwd_h

        states: tuple[Tensor, Tensor] = chunk_fwd_h(
            k=self._k, v=self._v, h0=initial, output_final_state=True, chunk_size=CHUNK,
            cu_seqlens=self._rows.packing["cu_seqlens"], **self._rows.gates,
        )  # fmt: skip
        return states

    def _scores(self) -> Tensor:
        from fla.ops.gla.chunk import chunk_gla_fwd_intra_gk

        if self._made_scores is None:
            self._made_scores = chunk_gla_fwd_intra_gk(q=self._q, k=self._k, g=self._rows.decay_sums, **self._common)
        return self._made_scores

    def _transition(self) -> Tensor:
        """``[H, K]``."""
        heads, keys = self._rows.k.shape[1:]
        decay = self._rows.log_decay
        if decay is None:
            return torch.ones(heads, keys, device=self._rows.k.device)
        total = decay.sum(0)
        return (total if total.dim() == 2 else total.unsqueeze(-1)).exp().expand(heads, keys)


def _row_products(left: Tensor, right: Tensor) -> Tensor:
    """Sum over rows of ``left right^T``: ``[t, H, K]`` and ``[t, H, V]`` to fp32 ``[H, K, V]``."""
    a, b = left.permute(1, 2, 0), right.transpose(0, 1)
    if left.is_cuda and left.dtype != torch.float32:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())
