"""A group of one: the kernel over whole documents, no communication."""

from __future__ import annotations

from torch import Tensor

from raysp.attention.methods.call import AttentionCall, OutputGradient, Saved
from raysp.attention.schedule import document_block


class Local:
    """Attention of whole documents on one rank; see ``raysp.attention.methods.call.Method``."""

    def forward(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Saved]:
        """Attend; rows are all tokens in natural order."""
        block = document_block(call.layout, causal=call.causal)
        out, lse = call.kernel.forward(q, k, v, block.segments, causal=call.causal, scale=call.scale)
        return out, (q, k, v, out, lse)

    def backward(self, call: AttentionCall, saved: Saved, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of all tokens."""
        q, k, v, out, lse = saved
        return document_gradients(call, q, k, v, out, lse, dout)


def document_gradients(
    call: AttentionCall, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients where this rank holds all tokens in natural order, of some or all heads."""
    block = document_block(call.layout, causal=call.causal)
    gradient = OutputGradient.of(dout, out, lse)
    return call.kernel.backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        gradient.delta,
        block.segments,
        causal=call.causal,
        scale=call.scale,
        deterministic=call.deterministic,
    )
