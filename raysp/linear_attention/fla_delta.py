"""The delta rule with flash-linear-attention's kernels: ``gated_delta_rule`` for decays of heads, ``kda`` for channels.

The transition of a piece comes from the kernel that fla's own context parallelism uses, beside the state, at the cost of
one more pass over keys; only ranks inside a document need it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from raysp.linear_attention.fla_rows import CHUNK, FlaRows, PartGradients


class DeltaPart:
    """See ``FlaPart``."""

    def __init__(self, rows: FlaRows) -> None:
        from fla.ops.gated_delta_rule.chunk_fwd import chunk_gated_delta_rule_fwd_intra
        from fla.ops.kda.chunk_intra import chunk_kda_fwd_intra

        self._rows = rows
        self._q, self._k, self._v = (tensor.unsqueeze(0) for tensor in (rows.q, rows.k, rows.v))
        self._beta = None if rows.beta is None else rows.beta.unsqueeze(0)
        self._packed: dict[str, Any] = {"chunk_size": CHUNK, **rows.packing}
        self._common: dict[str, Any] = {"scale": rows.scale, **self._packed}
        inputs = {"k": self._k, "v": self._v, "beta": self._beta}
        if rows.decays_by_channel:
            self._w, self._u, _, self._state_keys, self._scores, self._solved = chunk_kda_fwd_intra(
                q=self._q, gk=rows.decay_sums, **inputs, **self._common
            )
        else:
            self._w, self._u, self._solved = chunk_gated_delta_rule_fwd_intra(
                g=rows.decay_sums, **inputs, **self._packed
            )
            self._state_keys = self._k
        self._states: tuple[Tensor, Tensor, Tensor] | None = None
        self._state_gradients: tuple[Tensor, Tensor, Tensor] | None = None
        self._inside_chunks: tuple[Tensor, Tensor] | None = None

    def outgoing(self, initial: Tensor | None, *, with_transition: bool) -> tuple[Tensor, Tensor | None]:
        """A state pass from a known state, which ``output`` uses again; otherwise state and transition together."""
        if initial is not None:
            return self._state_pass(initial.unsqueeze(0))[2][0], None
        from fla.ops.cp.chunk_fwd import chunk_cp_fwd_h

        (_, heads, keys), values = self._rows.k.shape, self._rows.v.shape[2]
        both = self._rows.k.new_zeros(heads, keys, values + keys, dtype=torch.float32)
        chunk_cp_fwd_h(k=self._state_keys, w=self._w, u=self._u, hm=both, chunk_size=CHUNK, **self._rows.gates)
        return both[..., :values].contiguous(), both[..., values:] if with_transition else None

    def output(self, initial: Tensor) -> tuple[Tensor, Tensor]:
        """State pass and output."""
        from fla.ops.common.chunk_o import chunk_fwd_o
        from fla.ops.gla.chunk import chunk_gla_fwd_o_gk

        states, updates, final = self._state_pass(initial)
        sums = self._rows.decay_sums
        if self._rows.decays_by_channel:
            out = chunk_gla_fwd_o_gk(q=self._q, v=updates, g=sums, A=self._scores, h=states, **self._common)
        else:
            out = chunk_fwd_o(q=self._q, k=self._k, v=updates, h=states, g=sums, **self._common)
        return out[0], final

    def incoming_gradient(self, dout: Tensor, dfinal: Tensor | None) -> Tensor:
        """A pass of the states' gradients, which ``gradients`` uses again where it began from the true one."""
        (_, heads, keys), values = self._rows.k.shape, self._rows.v.shape[2]
        # Tells the kernel that the gradient is wanted; its values play no part.
        initial = self._rows.k.new_zeros(1, heads, keys, values, dtype=torch.float32)
        found = self._gradient_pass(initial, dout, None if dfinal is None else dfinal.unsqueeze(0))
        if dfinal is not None:
            self._state_gradients = found
        return found[1][0]

    def gradient_work_ahead(self, initial: Tensor, dout: Tensor) -> None:
        """States before every chunk, and the updates' gradients inside chunks."""
        self._state_pass(initial)
        self._gradient_inside_chunks(dout)

    def gradients(self, initial: Tensor, dout: Tensor, dfinals: Tensor) -> PartGradients:
        """States once more, their gradients, then those of the rows."""
        states, updates, _ = self._state_pass(initial)
        dstates, dinitial, dupdates = self._state_gradients or self._gradient_pass(initial, dout, dfinals)
        given = {"h": states, "dh": dstates, "dv": dupdates, "do": dout.unsqueeze(0)}
        by_channel = self._rows.decays_by_channel
        dq, dk, dv, dbeta, dsums = (self._channel_rows if by_channel else self._head_rows)(given, updates)
        return PartGradients(dq[0], dk[0], dv[0], self._rows.decay_gradient(dsums), dbeta[0], dinitial)

    def _head_rows(self, given: dict[str, Tensor], updates: Tensor) -> tuple[Any, ...]:
        from fla.ops.common.chunk_o import chunk_bwd_dqkwg
        from fla.ops.gated_delta_rule.wy_fast import prepare_wy_repr_bwd

        sums = self._rows.decay_sums
        dq, dk, dw, dsums = chunk_bwd_dqkwg(q=self._q, k=self._k, v=updates, w=self._w, g=sums, **given, **self._common)
        dk_solved, dv, dbeta, dsums_solved = prepare_wy_repr_bwd(
            k=self._k, v=self._v, beta=self._beta, g=sums, A=self._solved, dw=dw, du=given["dv"], **self._rows.packing
        )
        return dq, dk + dk_solved, dv, dbeta, None if dsums is None else dsums + dsums_solved

    def _channel_rows(self, given: dict[str, Tensor], updates: Tensor) -> tuple[Any, ...]:
        from fla.ops.kda.chunk_bwd import chunk_kda_bwd_dAv, chunk_kda_bwd_wy_dqkg_fused
        from fla.ops.kda.chunk_intra import chunk_kda_bwd_intra

        rows = {"q": self._q, "k": self._k, "g": self._rows.decay_sums, "beta": self._beta}
        dscores, _ = chunk_kda_bwd_dAv(q=self._q, k=self._k, v=updates, do=given["do"], A=self._scores, **self._common)
        dq, dk, dv, dbeta, dsums, dsolved = chunk_kda_bwd_wy_dqkg_fused(
            **rows, v=self._v, v_new=updates, A=self._solved, **given, **self._common
        )
        dq, dk, dbeta, dsums = chunk_kda_bwd_intra(
            **rows, dAqk=dscores, dAkk=dsolved, dq=dq, dk=dk, db=dbeta, dg=dsums, **self._packed
        )
        return dq, dk, dv, dbeta, dsums

    def _state_pass(self, initial: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States before every chunk, what each row adds to them, and final ones."""
        from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_fwd_h

        if self._states is None:
            self._states = chunk_gated_delta_rule_fwd_h(
                k=self._state_keys, w=self._w, u=self._u, initial_state=initial, output_final_state=True,
                **self._rows.gates, **self._packed,
            )  # fmt: skip
        return self._states

    def _gradient_pass(self, initial: Tensor, dout: Tensor, dfinals: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the states after every chunk, of the initial ones, and of what each row adds."""
        from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_bwd_dhu

        queries, local = self._gradient_inside_chunks(dout)
        found: tuple[Tensor, Tensor, Tensor] = chunk_gated_delta_rule_bwd_dhu(
            q=queries, k=self._state_keys, w=self._w, h0=initial, dht=dfinals, do=dout.unsqueeze(0), dv=local,
            **self._rows.gates, **self._common,
        )  # fmt: skip
        return found

    def _gradient_inside_chunks(self, dout: Tensor) -> tuple[Tensor, Tensor]:
        """Queries as the pass of the states' gradients reads them, and gradients of the updates from their own chunk."""
        from fla.ops.common.chunk_o import chunk_bwd_dv_local
        from fla.ops.kda.chunk_bwd import chunk_kda_bwd_dAv
        from fla.ops.kda.wy_fast import recompute_w_u_fwd

        if self._inside_chunks is None:
            queries, given = self._q, {"do": dout.unsqueeze(0)}
            if self._rows.decays_by_channel:
                # The gradient of the scores that comes with it is of no use yet: it needs the states.
                _, local = chunk_kda_bwd_dAv(q=self._q, k=self._k, v=self._v, A=self._scores, **given, **self._common)
                _, _, queries, _ = recompute_w_u_fwd(
                    q=self._q, k=self._k, v=self._v, beta=self._beta, A=self._solved, gk=self._rows.decay_sums,
                    **self._rows.packing,
                )  # fmt: skip
            else:
                local = chunk_bwd_dv_local(q=self._q, k=self._k, g=self._rows.decay_sums, **given, **self._common)
            self._inside_chunks = queries, local
        return self._inside_chunks
