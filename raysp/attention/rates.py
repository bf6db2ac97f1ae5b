"""How fast this device runs a block kernel: measured once, for the prediction of method times.

Symbols: n rows of a square segment, n0 see ``planner.KernelRate``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from planner import KernelRate
from raysp.attention.blocks import Segments
from raysp.attention.kernels import Kernel
from raysp.attention.mask import FULL

# Rows of a call, of its short segments and of a tiny call, and query heads.
_ON_GPU = (8192, 512, 16, 16)
_ON_CPU = (768, 96, 4, 2)
_COPIED_BYTES = {"cuda": 256 << 20, "cpu": 16 << 20}
_REPETITIONS = 3
_FORWARD_FLOPS, _BACKWARD_FLOPS = 4.0, 10.0


def measure_kernel_rate(kernel: Kernel, *, device: torch.device, dtype: torch.dtype, head_size: int) -> KernelRate:
    """Time a kernel forward and backward on one long segment, on many short ones and on a tiny one, and a copy.

    Args:
        kernel: What will run.
        device: This rank's.
        dtype: Of the inputs.
        head_size: D.

    Returns:
        Rates of this device; ranks differ a little.
    """
    num_rows, short_rows, tiny_rows, num_heads = _ON_GPU if device.type == "cuda" else _ON_CPU
    bench = _Bench(kernel, num_heads, head_size, dtype, device)
    launch_s = min(bench.pass_times_s((0, tiny_rows)))
    long_s = bench.pass_times_s((0, num_rows))
    # As many rows in all, so that the device is as full.
    short_s = bench.pass_times_s(tuple(range(0, num_rows + 1, short_rows)))
    per_row = num_rows * num_heads * head_size
    slowness: list[tuple[float, float]] = []
    for which, flops in ((0, _FORWARD_FLOPS), (1, _BACKWARD_FLOPS)):
        # Seconds per FLOP at both lengths; their root falls linearly in 1/n.
        long, short = (
            math.sqrt(max(times_s[which] - launch_s, 1e-9) / (flops * per_row * rows))
            for times_s, rows in ((long_s, num_rows), (short_s, short_rows))
        )
        slope = max(0.0, (short - long) / (1 / short_rows - 1 / num_rows))
        slowness.append((max(long - slope / num_rows, 0.5 * long), slope))
    (forward, forward_slope), (backward, _) = slowness
    source = torch.empty(_COPIED_BYTES.get(device.type, _COPIED_BYTES["cpu"]), dtype=torch.uint8, device=device)
    copy_s = _seconds(lambda: source.clone(), device)
    return KernelRate(
        forward_flops_per_s=1 / forward**2,
        backward_flops_per_s=1 / backward**2,
        launch_s=launch_s,
        copy_bytes_per_s=2 * source.numel() / copy_s,
        efficient_rows=forward_slope / forward,
    )


@dataclass(frozen=True)
class _Bench:
    """Square segments of random rows."""

    kernel: Kernel
    num_heads: int
    head_size: int
    dtype: torch.dtype
    device: torch.device

    def pass_times_s(self, bounds: tuple[int, ...]) -> tuple[float, float]:
        """Seconds of forward and backward of a call on segments with these bounds."""
        generator = torch.Generator().manual_seed(0)
        shape = (bounds[-1], self.num_heads, self.head_size)
        q, k, v, dout = (
            torch.randn(shape, generator=generator).to(device=self.device, dtype=self.dtype) for _ in range(4)
        )
        segments, scale = Segments(bounds, bounds), self.head_size**-0.5
        out, lse = self.kernel.forward(q, k, v, segments, mask=FULL, scale=scale)

        def forward() -> Tensor:
            return self.kernel.forward(q, k, v, segments, mask=FULL, scale=scale)[0]

        def backward() -> Tensor:
            given = (out.to(self.dtype), lse, None)
            return self.kernel.backward(dout, q, k, v, *given, segments, mask=FULL, scale=scale)[0]

        return _seconds(forward, self.device), _seconds(backward, self.device)


def _seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    """Least wall time of some runs after one to warm up."""
    run()
    times_s = []
    for _ in range(_REPETITIONS):
        _finish(device)
        start_s = time.perf_counter()
        run()
        _finish(device)
        times_s.append(time.perf_counter() - start_s)
    return max(min(times_s), 1e-9)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
