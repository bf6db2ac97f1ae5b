"""Flash attention kernels with one interface, dense and packed: the one-GPU rows, and what the peers are run on.

For benchmarks only. ``aten`` is the FlashAttention-2 inside torch, ``fa4`` is flash-attn-4, ``eager`` is plain torch for any
dtype and device, to check the wrappers without a GPU.

Shapes: dense ``q [B, S, H, D]``, ``lse [B, H, S]``; packed ``q [T, H, D]``, ``lse [H, T]``.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Borders of packed documents, int32 on the device, and the longest of each side."""

    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int


class FlashBackend(Protocol):
    """Flash attention, dense (``packing`` is None) or packed; causal masks are aligned to the last query and key."""

    name: str

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, packing: Packing | None, *, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """Return ``out`` like ``q`` and the natural-log LSE."""
        ...

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        packing: Packing | None,
        *,
        scale: float,
        causal: bool,
        into: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk, dv; written to ``into`` if given."""
        ...


class AtenBackend:
    """The FlashAttention-2 inside torch."""

    name = "aten"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, packing: Packing | None, *, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """See `FlashBackend`."""
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, *_aten_lengths(q, k, packing), 0.0, causal, False, scale=scale
        )
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        packing: Packing | None,
        *,
        scale: float,
        causal: bool,
        into: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `FlashBackend`."""
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device)
        unused = torch.empty(0, dtype=torch.uint64, device=q.device)
        gradients = torch.ops.aten._flash_attention_backward(
            dout.contiguous(), q, k, v, out, lse.contiguous(), *_aten_lengths(q, k, packing), 0.0, causal, no_dropout,
            unused, scale=scale,
        )  # fmt: skip
        return _copied(gradients, into)


class Fa4Backend:
    """FlashAttention-4, called below its autograd functions."""

    name = "fa4"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, packing: Packing | None, *, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """See `FlashBackend`."""
        out, lse, *_ = _fa4()._flash_attn_fwd(
            q, k, v, softmax_scale=scale, causal=causal, return_lse=True, **_fa4_lengths(packing)
        )
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        packing: Packing | None,
        *,
        scale: float,
        causal: bool,
        into: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `FlashBackend`."""
        # The kernel writes to whole buffers; a slice of heads gets a copy.
        targets = dict(zip(("dq", "dk", "dv"), into, strict=True)) if into is not None else {}
        direct = {name: target for name, target in targets.items() if target.is_contiguous()}
        gradients = _fa4()._flash_attn_bwd(
            q, k, v, out, dout, lse.contiguous(), softmax_scale=scale, causal=causal, **_fa4_lengths(packing), **direct
        )[:3]
        for name, gradient in zip(targets, gradients, strict=False):
            if name not in direct:
                targets[name].copy_(gradient)
        return gradients if into is None else into


class EagerBackend:
    """Plain torch in fp32 or wider, one document at a time: slow, and the truth for the wrappers."""

    name = "eager"

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, packing: Packing | None, *, scale: float, causal: bool
    ) -> tuple[Tensor, Tensor]:
        """See `FlashBackend`."""
        out, lse = torch.empty_like(q), _empty_lse(q)
        for at_q, at_k, at_lse in _documents(q, packing):
            scores = _scores(q[at_q], k[at_k], scale, causal)
            lse[at_lse] = scores.logsumexp(-1).to(lse.dtype)
            weights = (scores - scores.logsumexp(-1, keepdim=True)).exp()
            values = v[at_k].to(scores.dtype).repeat_interleave(q.shape[-2] // k.shape[-2], dim=-2)
            out[at_q] = torch.einsum("hqk,khd->qhd", weights, values).to(out.dtype)
        return out, lse

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        packing: Packing | None,
        *,
        scale: float,
        causal: bool,
        into: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `FlashBackend`."""
        copies = q.shape[-2] // k.shape[-2]
        gradients = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for at_q, at_k, at_lse in _documents(q, packing):
            scores = _scores(q[at_q], k[at_k], scale, causal)
            wide_q, wide_k, wide_v, wide_dout, wide_out = (
                x.to(scores.dtype) for x in (q[at_q], k[at_k], v[at_k], dout[at_q], out[at_q])
            )
            wide_k, wide_v = (x.repeat_interleave(copies, dim=-2) for x in (wide_k, wide_v))
            weights = (scores - lse[at_lse].to(scores.dtype).unsqueeze(-1)).exp()
            delta = (wide_dout * wide_out).sum(-1).transpose(0, 1).unsqueeze(-1)
            d_scores = weights * (torch.einsum("qhd,khd->hqk", wide_dout, wide_v) - delta) * scale
            dq = torch.einsum("hqk,khd->qhd", d_scores, wide_k)
            dk = torch.einsum("hqk,qhd->khd", d_scores, wide_q).unflatten(1, (-1, copies)).sum(2)
            dv = torch.einsum("hqk,qhd->khd", weights, wide_dout).unflatten(1, (-1, copies)).sum(2)
            for total, part, at in zip(gradients, (dq, dk, dv), (at_q, at_k, at_k), strict=True):
                total[at] = part.to(total.dtype)
        return _copied(gradients, into)


def attend(
    backend: FlashBackend,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packing: Packing | None,
    *,
    causal: bool = True,
    scale: float | None = None,
) -> Tensor:
    """Differentiable attention on one rank."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out: Tensor = _Attention.apply(q, k, v, backend, packing, scale, causal)
    return out


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, backend, packing, scale, causal):  # type: ignore[no-untyped-def]
        out, lse = backend.forward(q, k, v, packing, scale=scale, causal=causal)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.choices = backend, packing, scale, causal
        return out

    @staticmethod
    def backward(ctx, dout):  # type: ignore[no-untyped-def]
        backend, packing, scale, causal = ctx.choices
        gradients = backend.backward(dout, *ctx.saved_tensors, packing, scale=scale, causal=causal)
        return *gradients, None, None, None, None


def make_backend(kernel: str, device: torch.device) -> FlashBackend:
    """The backend of a kernel's name; on CPU everything is ``eager``.

    Raises:
        ValueError: The adapter does not offer the kernel.
    """
    if device.type == "cpu" or kernel == "eager":
        return EagerBackend()
    if kernel not in ("aten", "fa4"):
        raise ValueError(f"the adapter has no kernel {kernel!r}; expected aten, fa4 or eager.")
    return AtenBackend() if kernel == "aten" else Fa4Backend()


def _fa4() -> ModuleType:
    return importlib.import_module("flash_attn.cute.interface")


def _fa4_lengths(packing: Packing | None) -> dict[str, Any]:
    if packing is None:
        return {}
    return {
        "cu_seqlens_q": packing.cu_q, "cu_seqlens_k": packing.cu_k, "max_seqlen_q": packing.max_q,
        "max_seqlen_k": packing.max_k,
    }  # fmt: skip


def _aten_lengths(q: Tensor, k: Tensor, packing: Packing | None) -> tuple[Any, ...]:
    # torch takes None for an undefined tensor, which means dense.
    return (
        (None, None, q.shape[1], k.shape[1])
        if packing is None
        else (packing.cu_q, packing.cu_k, packing.max_q, packing.max_k)
    )


def _copied(gradients: Any, into: tuple[Tensor, Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = gradients
    if into is None:
        return dq, dk, dv
    for target, gradient in zip(into, (dq, dk, dv), strict=True):
        target.copy_(gradient)
    return into


def _documents(q: Tensor, packing: Packing | None) -> Iterator[tuple[Any, Any, Any]]:
    """Index of queries, of keys and of the LSE, document by document."""
    if packing is None:
        for batch in range(q.shape[0]):
            yield batch, batch, batch
        return
    borders_q, borders_k = packing.cu_q.tolist(), packing.cu_k.tolist()
    for index in range(len(borders_q) - 1):
        at_q = slice(borders_q[index], borders_q[index + 1])
        yield at_q, slice(borders_k[index], borders_k[index + 1]), (slice(None), at_q)


def _empty_lse(q: Tensor) -> Tensor:
    dtype = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty((*q.shape[:-3], q.shape[-2], q.shape[-3]), dtype=dtype)


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    keys = k.to(wide).repeat_interleave(q.shape[-2] // k.shape[-2], dim=-2)
    scores = torch.einsum("qhd,khd->hqk", q.to(wide), keys) * scale
    if causal:
        num_q, num_k = q.shape[0], k.shape[0]
        seen = torch.ones(num_q, num_k, dtype=torch.bool, device=q.device).tril(num_k - num_q)
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores
