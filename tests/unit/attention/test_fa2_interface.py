"""FlashAttention-2's arguments, by functions with the signatures of flash-attn 2.8.3 (flash_attn_interface.py)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from raysp.attention.blocks import Segments
from raysp.attention.kernels import fa2
from raysp.attention.kernels.eager import EagerKernel
from raysp.attention.mask import CAUSAL, FULL, SegmentMask


def _segments(cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Segments:
    assert cu_q.dtype == cu_k.dtype == torch.int32
    segments = Segments(tuple(cu_q.tolist()), tuple(cu_k.tolist()))
    assert (max_q, max_k) == (segments.max_q, segments.max_k)
    return segments


def _band(causal: bool, left: int, right: int) -> SegmentMask:
    right = 0 if causal else right
    return SegmentMask(None if left < 0 else left, None if right < 0 else right)


def _flash_attn_varlen_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1,
    softcap: float = 0.0, alibi_slopes: Tensor | None = None, return_softmax: bool = False,
    block_table: Tensor | None = None, leftpad_k: Tensor | None = None, seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    assert dropout_p == softcap == 0.0
    segments = _segments(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    mask = _band(causal, window_size_left, window_size_right)
    out, lse = EagerKernel().forward(q, k, v, segments, mask=mask, scale=softmax_scale)
    # Rows without keys.
    return out, lse.masked_fill(lse == float("-inf"), float("inf")), torch.empty(0), torch.empty(2, dtype=torch.int64)


def _flash_attn_varlen_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None,
    dk: Tensor | None, dv: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
    max_seqlen_k: int, dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int,
    window_size_right: int, softcap: float, alibi_slopes: Tensor | None, deterministic: bool,
    rng_state: Tensor | None = None, zero_tensors: bool = False,
) -> Tensor:  # fmt: skip
    assert out.dtype == dout.dtype == q.dtype
    assert softmax_lse.dtype == torch.float32
    assert softmax_lse.shape == (q.shape[1], q.shape[0])
    segments = _segments(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    mask = _band(causal, window_size_left, window_size_right)
    found = EagerKernel().backward(
        dout, q, k, v, out, softmax_lse, None, segments, mask=mask, scale=softmax_scale, deterministic=deterministic
    )
    for given, gradient in zip((dq, dk, dv), found, strict=True):
        assert given is not None
        assert given.is_contiguous()
        given.copy_(gradient)
    return torch.empty(0)


@pytest.mark.parametrize("keeps_out", [True, False])
@pytest.mark.parametrize("mask", [FULL, CAUSAL, SegmentMask(left=3, right=0), SegmentMask(left=4)], ids=str)
def test_fa2_passes_what_the_package_takes(monkeypatch: pytest.MonkeyPatch, mask: SegmentMask, keeps_out: bool) -> None:
    interface = SimpleNamespace(
        _flash_attn_varlen_forward=_flash_attn_varlen_forward, _flash_attn_varlen_backward=_flash_attn_varlen_backward
    )
    monkeypatch.setattr(fa2, "_interface", lambda: interface)
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(20, heads, 8, generator=generator) for heads in (4, 2, 2, 4))
    segments, kernel = Segments((0, 9, 20), (0, 4, 20)), fa2.FlashAttention2Kernel()
    truth_out, truth_lse = EagerKernel().forward(q, k, v, segments, mask=mask, scale=0.3)
    # A block of some heads of a larger shard has gaps between its rows.
    wide = torch.cat((q, q), dim=1)[:, :4]
    out, lse = kernel.forward(wide, k, v, segments, mask=mask, scale=0.3)
    torch.testing.assert_close((out, lse), (truth_out, truth_lse))
    delta = (dout * out).sum(-1).T
    given = (out, lse, None) if keeps_out else (None, lse, delta)
    truth = EagerKernel().backward(dout, q, k, v, *given, segments, mask=mask, scale=0.3)
    found = kernel.backward(dout, wide, k, v, *given, segments, mask=mask, scale=0.3)
    torch.testing.assert_close(found, truth, rtol=1e-4, atol=1e-5)
