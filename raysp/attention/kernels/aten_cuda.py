"""The FlashAttention-2 inside torch (CUDA, bf16 and fp16), varlen, with an external LSE in the backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from raysp.attention.blocks import Segments
from raysp.attention.kernels.delta import given_output
from raysp.attention.mask import SegmentMask
from raysp.errors import RayspError

# FlashAttention-2 loads 16 bytes at a time.
HEAD_SIZE_MULTIPLE = 8


@dataclass(frozen=True)
class AtenCudaKernel:
    """See ``raysp.attention.kernels.contract.Kernel``."""

    name: str = "aten"

    def forward(
        self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, segments: Segments, *, mask: SegmentMask, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attend inside each segment; the contract's forward."""
        head_size = q_THD.shape[-1]
        q, k, v = (_padded(x) for x in (q_THD, k_THD, v_THD))
        cu_q, cu_k = segments.on(q.device)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            q,
            k,
            v,
            cu_q,
            cu_k,
            segments.max_q,
            segments.max_k,
            0.0,
            mask.is_causal,
            False,
            scale=scale,
            **_window(mask),
        )
        if lse.shape != (q.shape[1], q.shape[0]):
            raise RayspError(
                f"torch {torch.__version__} returns an LSE of shape {tuple(lse.shape)} from varlen flash attention; "
                f"expected {(q.shape[1], q.shape[0])}. Use torch 2.11 or newer, or kernel = 'eager'."
            )
        # FlashAttention-2 marks rows without keys by +inf.
        return out[..., :head_size], lse.masked_fill(lse == float("inf"), float("-inf"))

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
        head_size = q_THD.shape[-1]
        out_THD = given_output(dout_THD, out_THD, delta_HT)
        dout, q, k, v, out = (_padded(x) for x in (dout_THD, q_THD, k_THD, v_THD, out_THD))
        cu_q, cu_k = segments.on(q.device)
        no_dropout_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        with _deterministic_kernels(deterministic):
            gradients = torch.ops.aten._flash_attention_backward(
                dout.contiguous(),
                q,
                k,
                v,
                out,
                lse_HT.to(torch.float32).contiguous(),
                cu_q,
                cu_k,
                segments.max_q,
                segments.max_k,
                0.0,
                mask.is_causal,
                no_dropout_state,
                torch.empty(0, dtype=torch.uint64, device=q.device),
                scale=scale,
                **_window(mask),
            )
        dq, dk, dv = (gradient[..., :head_size] for gradient in gradients)
        return dq, dk, dv


def _window(mask: SegmentMask) -> dict[str, int]:
    """torch's arguments of a band that is neither full nor causal; -1 is no limit."""
    if mask.is_full or mask.is_causal:
        return {}
    limits = {"window_size_left": mask.left, "window_size_right": mask.right}
    return {name: -1 if limit is None else limit for name, limit in limits.items()}


def _padded(rows_THD: Tensor) -> Tensor:
    missing = -rows_THD.shape[-1] % HEAD_SIZE_MULTIPLE
    return functional.pad(rows_THD, (0, missing)) if missing else rows_THD


@contextmanager
def _deterministic_kernels(wanted: bool) -> Iterator[None]:
    """torch chooses the deterministic flash backward by its process-wide switch alone; set it for one call."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if not wanted or before:
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
