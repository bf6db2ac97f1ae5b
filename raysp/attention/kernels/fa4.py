"""FlashAttention-4 (the package ``flash-attn-4``; Hopper and newer, bf16 and fp16), called below its autograd functions.

Its backward forms ``delta = rowsum(dout * out) - dlse``: where ``out`` is not at hand, ``out = 0`` and ``dlse = -delta``
give the same. One segment is a dense call, which is faster than a packed one.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raysp.attention.blocks import Segments
from raysp.attention.kernels import packages
from raysp.attention.kernels.delta import given_delta
from raysp.attention.mask import SegmentMask
from raysp.errors import InputError

PACKAGE = "flash-attn-4"
LOWEST_CAPABILITY = (9, 0)
HEAD_SIZE_MULTIPLE = 8
MAX_HEAD_SIZE = 256


def is_installed() -> bool:
    """Whether the package is there; nothing is imported."""
    return packages.is_installed(PACKAGE)


@dataclass(frozen=True)
class FlashAttention4Kernel:
    """See ``raysp.attention.kernels.contract.Kernel``."""

    name: str = "fa4"

    def forward(
        self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, segments: Segments, *, mask: SegmentMask, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attend inside each segment; the contract's forward."""
        q, k, v = (_leading(x, segments) for x in (q_THD, k_THD, v_THD))
        out, lse, *_ = _interface()._flash_attn_fwd(
            q, k, v, softmax_scale=scale, return_lse=True, **_lengths(segments, q.device), **_mask(mask)
        )
        return (out[0], lse[0]) if _is_dense(segments) else (out, lse)

    def backward(
        self,
        dout_THD: Tensor,
        q_THD: Tensor,
        k_THD: Tensor,
        v_THD: Tensor,
        out_THD: Tensor | None,
        lse_HT: Tensor,
        delta_HT: Tensor | None,
        segments: Segments,
        *,
        mask: SegmentMask,
        scale: float,
        deterministic: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the block; the contract's backward."""
        dlse = None
        if out_THD is None:
            dlse = _leading(-given_delta(dout_THD, None, delta_HT), segments).contiguous()
            out_THD = torch.zeros_like(q_THD, memory_format=torch.contiguous_format)
        q, k, v, out, dout = (_leading(x, segments) for x in (q_THD, k_THD, v_THD, out_THD, dout_THD))
        lse = _leading(lse_HT.to(torch.float32), segments).contiguous()
        gradients = _interface()._flash_attn_bwd(
            q, k, v, out, dout, lse, softmax_scale=scale, dlse=dlse, deterministic=deterministic,
            **_lengths(segments, q.device), **_mask(mask),
        )[:3]  # fmt: skip
        dq, dk, dv = (gradient[0] if _is_dense(segments) else gradient for gradient in gradients)
        return dq, dk, dv


def _interface() -> Any:
    try:
        return importlib.import_module("flash_attn.cute.interface")
    except ImportError as error:
        raise InputError(
            f"kernel 'fa4' needs the package flash-attn-4, which cannot be imported ({error}); expected it to be "
            "installed. Install raysp[fa4], or use kernel = 'auto'."
        ) from error


def _is_dense(segments: Segments) -> bool:
    return len(segments.cu_q) == 2


def _leading(tensor: Tensor, segments: Segments) -> Tensor:
    return tensor.unsqueeze(0) if _is_dense(segments) else tensor


def _lengths(segments: Segments, device: torch.device) -> dict[str, Any]:
    if _is_dense(segments):
        return {}
    cu_q, cu_k = segments.on(device)
    return {
        "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k, "max_seqlen_q": segments.max_q, "max_seqlen_k": segments.max_k,
    }  # fmt: skip


def _mask(mask: SegmentMask) -> dict[str, Any]:
    if mask.is_full or mask.is_causal:
        return {"causal": mask.is_causal}
    return {"window_size_left": mask.left, "window_size_right": mask.right}
