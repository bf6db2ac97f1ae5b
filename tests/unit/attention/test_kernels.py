"""Kernels against plain attention written out, and against each other; blocks that merge and gradients that add."""

from __future__ import annotations

import importlib.util
import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor

from raysp.attention import reference_attention
from raysp.attention.blocks import Segments
from raysp.attention.kernels import Kernel, fa2, fa4, packages, resolve_kernel
from raysp.attention.kernels.aten_cpu import AtenCpuKernel
from raysp.attention.kernels.delta import output_with_delta
from raysp.attention.kernels.eager import EagerKernel
from raysp.attention.mask import CAUSAL, FULL, SegmentMask
from raysp.attention.merge import merge_partials
from raysp.errors import InputError

HEADS = [(4, 4), (4, 2), (3, 1)]
CPU = torch.device("cpu")


def random_inputs(
    num_rows: int, num_keys: int, heads: tuple[int, int], head_size: int = 8, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    num_heads, num_key_heads = heads
    shapes = [(num_rows, num_heads), (num_keys, num_key_heads), (num_keys, num_key_heads), (num_rows, num_heads)]
    return tuple(torch.randn(*shape, head_size, generator=generator, dtype=torch.float64) for shape in shapes)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax over a full score matrix, one query head at a time."""
    group = q.shape[1] // k.shape[1]
    outs, lses = [], []
    for head in range(q.shape[1]):
        scores = (q[:, head] @ k[:, head // group].T * scale).masked_fill(~mask, float("-inf"))
        outs.append(torch.softmax(scores, dim=-1) @ v[:, head // group])
        lses.append(torch.logsumexp(scores, dim=-1))
    return torch.stack(outs, dim=1), torch.stack(lses)


def gradients(
    kernel: Kernel, inputs: tuple[Tensor, ...], segments: Segments, mask: SegmentMask, *, keep_out: bool = True
) -> tuple[Tensor, ...]:
    q, k, v, dout = inputs
    out, lse = kernel.forward(q, k, v, segments, mask=mask, scale=0.3)
    delta = (dout.to(lse.dtype) * out.to(lse.dtype)).sum(-1).T.contiguous()
    given = (out.to(q.dtype), lse, None) if keep_out else (None, lse, delta)
    return kernel.backward(dout, q, k, v, *given, segments, mask=mask, scale=0.3)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("causal", [True, False])
def test_eager_equals_dense_softmax_and_its_autograd(heads: tuple[int, int], causal: bool) -> None:
    lengths = (1, 7, 20)
    inputs = random_inputs(28, 28, heads)
    leaves = [tensor.requires_grad_() for tensor in inputs[:3]]
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    mask = documents[:, None] == documents[None, :]
    expected, _ = dense_attention(*leaves, mask.tril() if causal else mask, 0.3)
    out = reference_attention(*leaves, lengths, causal=causal, scale=0.3)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    found = torch.autograd.grad(out, leaves, inputs[3])
    for gradient, truth in zip(found, torch.autograd.grad(expected, leaves, inputs[3]), strict=True):
        torch.testing.assert_close(gradient, truth, rtol=0, atol=1e-13)


def test_gradcheck_of_the_autograd_function() -> None:
    leaves = [tensor.requires_grad_() for tensor in random_inputs(7, 7, (2, 1), head_size=3)[:3]]
    assert torch.autograd.gradcheck(lambda q, k, v: reference_attention(q, k, v, (5, 2)), leaves)


BANDS = [
    FULL,
    CAUSAL,
    SegmentMask(left=0, right=0),
    SegmentMask(left=9, right=0),
    SegmentMask(left=300),
    SegmentMask(left=20, right=7),
    SegmentMask(right=3),
]


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("mask", BANDS, ids=str)
@pytest.mark.parametrize("cu_k", [(0, 1, 64, 191, 600), (0, 40, 103, 300, 900)])
def test_aten_equals_eager_in_fp64(heads: tuple[int, int], mask: SegmentMask, cu_k: tuple[int, ...]) -> None:
    segments = Segments((0, 1, 64, 191, 600), cu_k)
    inputs = random_inputs(600, cu_k[-1], heads)
    eager, aten = EagerKernel(), AtenCpuKernel()
    for found, truth in zip(
        aten.forward(*inputs[:3], segments, mask=mask, scale=0.3),
        eager.forward(*inputs[:3], segments, mask=mask, scale=0.3),
        strict=True,
    ):
        torch.testing.assert_close(found, truth, rtol=0, atol=1e-12)
    truth = gradients(eager, inputs, segments, mask)
    for keep_out in (True, False):
        for gradient, expected in zip(gradients(aten, inputs, segments, mask, keep_out=keep_out), truth, strict=True):
            torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("mask", BANDS, ids=str)
def test_eager_masks_are_those_of_flash_kernels(mask: SegmentMask) -> None:
    """The band is counted from the last query and the last key (flash-attn >= 2.1)."""
    q, k, v, dout = (tensor.requires_grad_() for tensor in random_inputs(20, 50, (2, 1)))
    i, j = torch.arange(20)[:, None] + 30, torch.arange(50)[None, :]
    left = 99 if mask.left is None else mask.left
    right = 99 if mask.right is None else mask.right
    expected, lse = dense_attention(q, k, v, (j >= i - left) & (j <= i + right), 0.3)
    out, found_lse = EagerKernel().forward(q, k, v, Segments((0, 20), (0, 50)), mask=mask, scale=0.3)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(found_lse, lse, rtol=0, atol=1e-13)
    truth = torch.autograd.grad(expected, (q, k, v), dout)
    found = gradients(EagerKernel(), tuple(x.detach() for x in (q, k, v, dout)), Segments((0, 20), (0, 50)), mask)
    for gradient, value in zip(found, truth, strict=True):
        torch.testing.assert_close(gradient, value, rtol=0, atol=1e-13)


@pytest.mark.parametrize("mask", [CAUSAL, SegmentMask(left=3, right=0)], ids=str)
@pytest.mark.parametrize("kernel", [EagerKernel(), AtenCpuKernel()], ids=["eager", "aten"])
def test_queries_before_all_keys_see_nothing(kernel: Kernel, mask: SegmentMask) -> None:
    inputs = random_inputs(9, 4, (2, 1))
    segments = Segments((0, 9), (0, 4))
    out, lse = kernel.forward(*inputs[:3], segments, mask=mask, scale=0.3)
    assert torch.equal(out[:5], torch.zeros_like(out[:5]))
    assert torch.isneginf(lse[:, :5]).all()
    assert torch.isfinite(lse[:, 5:]).all()
    for gradient in gradients(kernel, inputs, segments, mask):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 6e-2)])
@pytest.mark.parametrize("kernel", [EagerKernel(), AtenCpuKernel()], ids=["eager", "aten"])
@pytest.mark.parametrize("keep_out", [True, False])
def test_kernels_in_lower_precision(kernel: Kernel, dtype: torch.dtype, tolerance: float, keep_out: bool) -> None:
    inputs = tuple(tensor.to(dtype) for tensor in random_inputs(127, 127, (4, 2), head_size=16))
    segments = Segments((0, 63, 127), (0, 63, 127))
    truth = gradients(EagerKernel(), tuple(tensor.double() for tensor in inputs), segments, CAUSAL)
    for gradient, expected in zip(gradients(kernel, inputs, segments, CAUSAL, keep_out=keep_out), truth, strict=True):
        torch.testing.assert_close(gradient.double(), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kernel", [EagerKernel(), AtenCpuKernel()], ids=["eager", "aten"])
def test_rows_without_keys_give_zero_and_minus_infinity(kernel: Kernel) -> None:
    q, k, v, dout = random_inputs(5, 3, (2, 2))
    segments = Segments((0, 2, 5), (0, 0, 3))
    out, lse = kernel.forward(q, k, v, segments, mask=FULL, scale=1.0)
    assert torch.equal(out[:2], torch.zeros_like(out[:2]))
    assert torch.isneginf(lse[:, :2]).all()
    assert torch.isfinite(lse[:, 2:]).all()
    dq, dk, dv = kernel.backward(dout, q, k, v, out, lse, lse * 0, segments, mask=FULL, scale=1.0)
    assert torch.equal(dq[:2], torch.zeros_like(dq[:2]))
    assert torch.isfinite(dk).all()
    assert torch.isfinite(dv).all()


@pytest.mark.parametrize("kernel", [EagerKernel(), AtenCpuKernel()], ids=["eager", "aten"])
def test_partials_merge_and_block_gradients_add(kernel: Kernel) -> None:
    q, k, v, dout = random_inputs(30, 50, (4, 2))
    whole = Segments((0, 30), (0, 50))
    out, lse = kernel.forward(q, k, v, whole, mask=FULL, scale=0.3)
    halves = [slice(0, 13), slice(13, 50)]
    parts = [
        kernel.forward(q, k[half], v[half], Segments((0, 30), (0, half.stop - half.start)), mask=FULL, scale=0.3)
        for half in halves
    ]
    merged_out, merged_lse = merge_partials(*parts[0], *parts[1])
    torch.testing.assert_close(merged_out, out, rtol=0, atol=1e-14)
    torch.testing.assert_close(merged_lse, lse, rtol=0, atol=1e-14)
    delta = (dout * out).sum(-1).T.contiguous()
    truth = kernel.backward(dout, q, k, v, out, lse, delta, whole, mask=FULL, scale=0.3)
    found = [
        kernel.backward(
            dout, q, k[half], v[half], out, lse, delta, Segments((0, 30), (0, half.stop - half.start)),
            mask=FULL, scale=0.3,
        )
        for half in halves
    ]  # fmt: skip
    torch.testing.assert_close(found[0][0] + found[1][0], truth[0], rtol=0, atol=1e-13)
    for index in (1, 2):
        torch.testing.assert_close(torch.cat([part[index] for part in found]), truth[index], rtol=0, atol=1e-13)


def test_merge_guards_rows_that_saw_no_key() -> None:
    out_a, out_b = torch.zeros(3, 1, 2), torch.ones(3, 1, 2)
    infinite = float("-inf")
    out, lse = merge_partials(
        out_a, torch.tensor([[infinite, infinite, 0.0]]), out_b, torch.tensor([[infinite, 1.0, infinite]])
    )
    assert lse.tolist() == [[infinite, 1.0, 0.0]]
    assert out[:, 0, 0].tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)])
def test_stand_in_output_has_the_row_sums(dtype: torch.dtype, error: float) -> None:
    generator = torch.Generator().manual_seed(0)
    dout = torch.randn(200, 3, 16, generator=generator, dtype=torch.float64).to(dtype)
    dout[7] = 0
    dout[8, :, 1:] = 0
    delta = (dout.double() * torch.randn(200, 3, 16, generator=generator, dtype=torch.float64)).sum(-1).T
    out = output_with_delta(dout, delta)
    assert out.dtype == dtype
    assert torch.isfinite(out).all()
    found = (out.double() * dout.double()).sum(-1).T
    # A row with a single entry cannot do better than that entry's own precision.
    rows = torch.arange(200) != 8 if dtype == torch.bfloat16 else slice(None)
    torch.testing.assert_close(found[:, rows], delta[:, rows], rtol=error, atol=error)


def test_a_long_sequence_never_forms_its_scores_on_cpu() -> None:
    length = 32768
    inputs = tuple(tensor.float() for tensor in random_inputs(length, length, (1, 1), head_size=8))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    gradients(AtenCpuKernel(), inputs, Segments((0, length), (0, length)), CAUSAL)
    grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown_bytes < length**2 * 4 / 16


@pytest.mark.parametrize(
    ("name", "device", "dtype", "expected"),
    [
        ("auto", "cuda", torch.bfloat16, "aten"),
        ("auto", "cuda", torch.float32, "eager"),
        ("auto", "cuda", torch.float64, "eager"),
        ("auto", "cpu", torch.float64, "aten"),
        ("eager", "cpu", torch.bfloat16, "eager"),
    ],
)
def test_auto_kernel_follows_device_and_dtype(name: str, device: str, dtype: torch.dtype, expected: str) -> None:
    assert resolve_kernel(name, device=torch.device(device), dtype=dtype, head_size=64).name == expected


def test_kernels_that_cannot_run_are_refused() -> None:
    for name in ("fa4", "fa2"):
        with pytest.raises(InputError, match="expected bf16 or fp16 on CUDA"):
            resolve_kernel(name, device=CPU, dtype=torch.float32, head_size=64)
        with pytest.raises(InputError, match="cannot run head size 100"):
            resolve_kernel(name, device=torch.device("cuda"), dtype=torch.bfloat16, head_size=100)
    with pytest.raises(InputError, match="unknown"):
        resolve_kernel("fast", device=CPU, dtype=torch.float32, head_size=64)
    with pytest.raises(InputError, match="cannot run"):
        resolve_kernel("aten", device=torch.device("cuda"), dtype=torch.float32, head_size=64)


def test_flash_attention_2_does_not_pass_for_4_because_of_the_folder_it_ships(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in ("flash_attn/__init__.py", "flash_attn/cute/__init__.py", "flash_attn-2.8.3.dist-info/METADATA"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n")
    monkeypatch.syspath_prepend(tmp_path)
    packages.is_installed.cache_clear()
    try:
        assert (fa2.is_installed(), fa4.is_installed()) == (True, False)
    finally:
        packages.is_installed.cache_clear()


@pytest.mark.parametrize(("name", "package"), [("fa4", "flash-attn-4"), ("fa2", "flash-attn")])
def test_a_missing_package_is_named_with_its_extra(name: str, package: str) -> None:
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("a flash-attn package is installed here")
    with pytest.raises(InputError, match=rf"needs the package {package}, .* Install raysp\[{name}\]"):
        resolve_kernel(name, device=torch.device("cuda"), dtype=torch.bfloat16, head_size=64)
