"""FlashAttention-2 (the package ``flash-attn``; Ampere and newer, bf16 and fp16), called below its autograd functions."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raysp.attention.blocks import Segments
from raysp.attention.kernels import packages
from raysp.attention.kernels.delta import given_output
from raysp.attention.mask import SegmentMask
from raysp.errors import InputError

PACKAGE = "flash-attn"
LOWEST_CAPABILITY = (8, 0)
HEAD_SIZE_MULTIPLE = 8
MAX_HEAD_SIZE = 256
_MODULE = "flash_attn.flash_attn_interface"


def is_installed() -> bool:
    """Whether the package is there; nothing is imported."""
    return packages.is_installed(PACKAGE)


@dataclass(frozen=True)
class FlashAttention2Kernel:
    """See ``raysp.attention.kernels.contract.Kernel``."""

    name: str = "fa2"

    def forward(
        self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, segments: Segments, *, mask: SegmentMask, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attend inside each segment; the contract's forward."""
        cu_q, cu_k = segments.on(q_THD.device)
        out, lse, *_ = _interface()._flash_attn_varlen_forward(
            q_THD, k_THD, v_THD, cu_q, cu_k, segments.max_q, segments.max_k, dropout_p=0.0, softmax_scale=scale,
            **_mask(mask),
        )  # fmt: skip
        # FlashAttention-2 marks rows without keys by +inf.
        return out, lse.masked_fill(lse == float("inf"), float("-inf"))

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
        out_THD = given_output(dout_THD, out_THD, delta_HT)
        cu_q, cu_k = segments.on(q_THD.device)
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_THD, k_THD, v_THD))
        _interface()._flash_attn_varlen_backward(
            dout_THD.contiguous(), q_THD, k_THD, v_THD, out_THD, lse_HT.to(torch.float32).contiguous(), dq, dk, dv,
            cu_q, cu_k, segments.max_q, segments.max_k, dropout_p=0.0, softmax_scale=scale, softcap=0.0,
            alibi_slopes=None, deterministic=deterministic, **_mask(mask),
        )  # fmt: skip
        return dq, dk, dv


def _interface() -> Any:
    try:
        return importlib.import_module(_MODULE)
    except ImportError as error:
        raise InputError(
            f"kernel 'fa2' needs the package flash-attn, which cannot be imported ({error}); expected it to be "
            "installed. Install raysp[fa2], or use kernel = 'auto'."
        ) from error


def _mask(mask: SegmentMask) -> dict[str, Any]:
    if mask.is_full or mask.is_causal:
        return {"causal": mask.is_causal, "window_size_left": -1, "window_size_right": 0 if mask.is_causal else -1}
    limits = {"window_size_left": mask.left, "window_size_right": mask.right}
    return {"causal": False, **{name: -1 if limit is None else limit for name, limit in limits.items()}}
