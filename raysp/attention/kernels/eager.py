"""The reference kernel: plain matrix products, any device and dtype. The truth that other kernels are tested against.

It forms all scores of a segment, so memory grows with the square of the length. bf16 and fp16 compute in fp32.

Symbols: T rows, H heads, G query heads per key head, D head size, q/k row axes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from raysp.attention.blocks import Segments
from raysp.attention.kernels.delta import given_delta
from raysp.attention.mask import SegmentMask
from raysp.attention.merge import accumulation_dtype


@dataclass(frozen=True)
class EagerKernel:
    """See ``raysp.attention.kernels.contract.Kernel``."""

    name: str = "eager"

    def forward(
        self, q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, segments: Segments, *, mask: SegmentMask, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Attend inside each segment; the contract's forward."""
        dtype = accumulation_dtype(q_THD.dtype)
        num_rows, num_heads, _ = q_THD.shape
        out = torch.zeros(q_THD.shape, dtype=dtype, device=q_THD.device)
        lse = torch.full((num_heads, num_rows), float("-inf"), dtype=dtype, device=q_THD.device)
        for rows, keys in segments.pieces():
            scores = _scores(_grouped(q_THD[rows].to(dtype), k_THD.shape[1]), k_THD[keys].to(dtype), mask, scale)
            segment_lse = scores.logsumexp(dim=-1)
            # A row that sees no key of its segment has an LSE of -inf: its weights are 0, not nan.
            probabilities = torch.exp(scores - segment_lse.unsqueeze(-1)).nan_to_num(nan=0.0)
            segment_out = torch.einsum("hgqk,khd->qhgd", probabilities, v_THD[keys].to(dtype))
            out[rows] = segment_out.flatten(1, 2)
            lse[:, rows] = segment_lse.flatten(0, 1)
        return out.to(q_THD.dtype), lse

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
        """Gradients of the block in fp32 or fp64; the contract's backward."""
        dtype = accumulation_dtype(q_THD.dtype)
        num_key_heads = k_THD.shape[1]
        delta_HT = given_delta(dout_THD, out_THD, delta_HT)
        dq = torch.zeros(q_THD.shape, dtype=dtype, device=q_THD.device)
        dk = torch.zeros(k_THD.shape, dtype=dtype, device=k_THD.device)
        dv = torch.zeros_like(dk)
        for rows, keys in segments.pieces():
            q = _grouped(q_THD[rows].to(dtype), num_key_heads)
            dout = _grouped(dout_THD[rows].to(dtype), num_key_heads)
            k, v = k_THD[keys].to(dtype), v_THD[keys].to(dtype)
            lse = lse_HT[:, rows].to(dtype).unflatten(0, (num_key_heads, -1))
            delta = delta_HT[:, rows].to(dtype).unflatten(0, (num_key_heads, -1))
            probabilities = torch.exp(_scores(q, k, mask, scale) - lse.unsqueeze(-1)).nan_to_num(nan=0.0)
            dprobabilities = torch.einsum("qhgd,khd->hgqk", dout, v)
            dscores = probabilities * (dprobabilities - delta.unsqueeze(-1)) * scale
            dq[rows] = torch.einsum("hgqk,khd->qhgd", dscores, k).flatten(1, 2)
            dk[keys] = torch.einsum("hgqk,qhgd->khd", dscores, q)
            dv[keys] = torch.einsum("hgqk,qhgd->khd", probabilities, dout)
        return dq, dk, dv


def _grouped(rows_THD: Tensor, num_key_heads: int) -> Tensor:
    """``[T, Hq, D]`` as ``[T, Hk, G, D]``."""
    return rows_THD.unflatten(1, (num_key_heads, -1))


def _scores(q_THGD: Tensor, k_THD: Tensor, mask: SegmentMask, scale: float) -> Tensor:
    scores = torch.einsum("qhgd,khd->hgqk", q_THGD, k_THD) * scale
    if mask.is_full:
        return scores
    return scores.masked_fill(~visible_keys(scores.shape[-2], scores.shape[-1], mask, scores.device), float("-inf"))


def visible_keys(num_queries: int, num_keys: int, mask: SegmentMask, device: torch.device) -> Tensor:
    """Bool ``[num_queries, num_keys]``: which keys of one segment each query sees."""
    diagonal = num_keys - num_queries
    seen = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    if mask.right is not None:
        seen = seen.tril(diagonal + mask.right)
    return seen if mask.left is None else seen.triu(diagonal - mask.left)
