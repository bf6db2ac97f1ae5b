"""torch's CPU flash attention, segment by segment: blockwise softmax, scores are never formed as a whole.

Its causal mask starts at the top left whatever the shape, so causal segments must be square; a schedule's are. It
crashes the process on an empty tensor, so empty segments are left out here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raysp.attention.kernels.delta import output_with_delta
from raysp.attention.merge import accumulation_dtype
from raysp.attention.schedule import Segments


@dataclass(frozen=True)
class AtenCpuKernel:
    """See ``raysp.attention.kernels.contract.Kernel``."""

    name: str = "aten"

    def forward(
        self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, segments: Segments, *, causal: bool, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attend inside each segment; the contract's forward."""
        num_rows, num_heads, _ = q_THD.shape
        out = torch.zeros_like(q_THD, memory_format=torch.contiguous_format)
        lse = torch.full(
            (num_heads, num_rows), float("-inf"), dtype=accumulation_dtype(q_THD.dtype), device=q_THD.device
        )
        for rows, keys in segments.pieces():
            segment_out, segment_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _batched(q_THD[rows]), _batched(k_THD[keys]), _batched(v_THD[keys]), 0.0, causal, scale=scale
            )
            out[rows] = segment_out[0].transpose(0, 1)
            lse[:, rows] = segment_lse[0]
        return out, lse

    def backward(
        self,
        dout_THD: Tensor,
        q_THD: Tensor,
        k_THD: Tensor,
        v_THD: Tensor,
        out_THD: Tensor | None,
        lse_HT: Tensor,
        delta_HT: Tensor,
        segments: Segments,
        *,
        causal: bool,
        scale: float,
        deterministic: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the block; the contract's backward."""
        out_THD = output_with_delta(dout_THD, delta_HT) if out_THD is None else out_THD
        num_key_heads = k_THD.shape[1]
        group = q_THD.shape[1] // num_key_heads
        sum_dtype = accumulation_dtype(q_THD.dtype)
        dq = torch.zeros_like(q_THD, memory_format=torch.contiguous_format)
        dk = torch.zeros(k_THD.shape, dtype=sum_dtype, device=k_THD.device)
        dv = torch.zeros_like(dk)
        for rows, keys in segments.pieces():
            # Key heads are repeated here: not every torch sums the gradient of shared key heads.
            k_batched, v_batched = (_batched(x[keys].repeat_interleave(group, dim=1)) for x in (k_THD, v_THD))
            grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _batched(dout_THD[rows]),
                _batched(q_THD[rows]),
                k_batched,
                v_batched,
                _batched(out_THD[rows]),
                lse_HT[:, rows].unsqueeze(0).contiguous(),
                0.0,
                causal,
                scale=scale,
            )
            dq[rows] = grads[0][0].transpose(0, 1)
            for target, gradient in ((dk, grads[1]), (dv, grads[2])):
                by_group = gradient[0].to(sum_dtype).unflatten(0, (num_key_heads, group))
                target[keys] = by_group.sum(dim=1).transpose(0, 1)
        return dq, dk, dv


def _batched(rows_THD: Tensor) -> Tensor:
    """``[T, H, D]`` as ``[1, H, T, D]``, without a copy."""
    return rows_THD.transpose(0, 1).unsqueeze(0)
