"""CUDA kernels of parallel attention on one GPU: bf16 block kernels against eager in fp32, Triton rows against torch."""

from __future__ import annotations

import pytest
import torch

from raysp.attention.blocks import Pick, Segments
from raysp.attention.kernels import Kernel, fa4
from raysp.attention.kernels.aten_cuda import AtenCudaKernel
from raysp.attention.kernels.delta import output_delta
from raysp.attention.kernels.eager import EagerKernel
from raysp.attention.kernels.fa4 import FlashAttention4Kernel
from raysp.attention.mask import CAUSAL, FULL, SegmentMask
from raysp.attention.merge import merge_into, merge_partials
from raysp.attention.picked import pick_rows, pick_rows_of_two, return_rows

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

KERNELS = [
    AtenCudaKernel(),
    pytest.param(
        FlashAttention4Kernel(),
        marks=pytest.mark.skipif(not fa4.is_installed(), reason="flash-attn-4 is not installed"),
    ),
]
MASKS = [FULL, CAUSAL, SegmentMask(left=99, right=0), SegmentMask(left=200)]
SEGMENTS = [Segments((0, 700), (0, 1500)), Segments((0, 1, 64, 191, 700), (0, 1, 64, 300, 1500))]


@pytest.mark.parametrize("segments", SEGMENTS, ids=["dense", "packed"])
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_flash_kernels_keep_the_contract(kernel: Kernel, mask: SegmentMask, segments: Segments) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, dout = (
        torch.randn(rows, heads, 128, generator=generator, device="cuda").bfloat16()
        for rows, heads in ((700, 8), (1500, 2), (1500, 2), (700, 8))
    )
    # Slices of heads are what head groups give a kernel.
    q_wide = torch.cat([q, q], dim=1)[:, :8]
    exact = [x.float() for x in (q, k, v)]
    eager = EagerKernel()
    out, lse = kernel.forward(q_wide, k, v, segments, mask=mask, scale=0.1)
    truth_out, truth_lse = eager.forward(*exact, segments, mask=mask, scale=0.1)
    torch.testing.assert_close(out.float(), truth_out, rtol=0, atol=2e-2)
    torch.testing.assert_close(lse, truth_lse, rtol=0, atol=2e-2)
    truth = eager.backward(dout.float(), *exact, truth_out, truth_lse, None, segments, mask=mask, scale=0.1)
    delta = output_delta(dout, truth_out)
    for given in ((out, lse, None), (None, truth_lse, delta)):
        for deterministic in (False, True):
            found = kernel.backward(
                dout, q_wide, k, v, *given, segments, mask=mask, scale=0.1, deterministic=deterministic
            )
            for gradient, expected in zip(found, truth, strict=True):
                error = (gradient.float() - expected).pow(2).mean().sqrt()
                assert error <= 8e-3 * expected.pow(2).mean().sqrt()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_triton_merge_equals_torch(dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    whole, other = (torch.randn(333, 6, 96, generator=generator, device="cuda").to(dtype) for _ in range(2))
    lse, other_lse = (torch.randn(6, 333, generator=generator, device="cuda") for _ in range(2))
    infinite = float("-inf")
    lse[:, :5], other_lse[:, 3:9] = infinite, infinite
    expected = merge_partials(whole.float(), lse, other.float(), other_lse)
    rows, heads = slice(0, 300), slice(2, 6)
    merge_into(whole[rows, heads], lse[heads, rows], other[rows, heads], other_lse[heads, rows])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(whole[rows, heads].float(), expected[0][rows, heads], rtol=0, atol=tolerance)
    torch.testing.assert_close(lse[heads, rows], expected[1][heads, rows], rtol=0, atol=1e-5)
    assert torch.isneginf(lse[heads, 3:5]).all()


@pytest.mark.parametrize("shape", [(3, 40), (8, 128)])
def test_triton_picks_and_their_sums_equal_torch(shape: tuple[int, int]) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    index = torch.cat([torch.randperm(50)[:30], torch.randperm(50)[:40]]).numpy()
    pick, on_gpu = Pick(index, 30), torch.from_numpy(index).cuda()
    k, v = (torch.randn(52, *shape, generator=generator, device="cuda").bfloat16() for _ in range(2))
    assert torch.equal(pick_rows(k, pick), k[on_gpu])
    picked = pick_rows_of_two((k[:20], v[:20]), (k[20:], v[20:]), pick)
    assert torch.equal(picked[0], k[on_gpu])
    assert torch.equal(picked[1], v[on_gpu])
    for found, given in zip(return_rows(*picked, pick, 52), picked, strict=True):
        expected = torch.zeros(52, *shape, device="cuda").index_add_(0, on_gpu, given.float())
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
