"""A group of one: the kernel over whole documents, no communication."""

from __future__ import annotations

from torch import Tensor

from raysp.attention.methods.call import AttentionCall, Saved


class Local:
    """Attention of whole documents on one rank; see ``raysp.attention.methods.call.Method``."""

    def forward(self, call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Saved]:
        """Attend; rows are all tokens in natural order."""
        out, lse = document_attention(call, q, k, v)
        return out, (q, k, v, out, lse)

    def backward(self, call: AttentionCall, saved: Saved, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of all tokens."""
        return document_gradients(call, saved, dout)


def document_attention(call: AttentionCall, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output in the input dtype and LSE where this rank holds all tokens in natural order, of some or all heads."""
    block = call.schedule.whole()
    out, lse = call.kernel.forward(q, k, v, block.segments, mask=block.mask, scale=call.scale)
    return out.to(q.dtype), lse


def document_gradients(call: AttentionCall, saved: Saved, dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients where this rank holds all tokens in natural order, of some or all heads."""
    q, k, v, out, lse = saved
    block = call.schedule.whole()
    return call.kernel.backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        None,
        block.segments,
        mask=block.mask,
        scale=call.scale,
        deterministic=call.deterministic,
    )
