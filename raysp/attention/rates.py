"""How fast this device runs a block kernel: measured once, for the prediction of method times.

Symbols: n rows of a square segment, n0 see ``planner.KernelRate``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from planner import KernelRate
from raysp.attention.blocks import Segments
from raysp.attention.kernels import Kernel
from raysp.attention.mask import FULL

# Rows of the long, the short and the tiny segment, and query heads.
_ON_GPU = (8192, 1024, 16, 16)
_ON_CPU = (768, 96, 4, 2)
_COPIED_BYTES = {"cuda": 256 << 20, "cpu": 16 << 20}
_REPETITIONS = 3
_FORWARD_FLOPS, _BACKWARD_FLOPS = 4.0, 10.0


def measure_kernel_rate(kernel: Kernel, *, device: torch.device, dtype: torch.dtype, head_size: int) -> KernelRate:
    """Time a kernel forward and backward on a long, a short and a tiny segment, and a copy.

    Args:
        kernel: What will run.
        device: This rank's.
        dtype: Of the inputs.
        head_size: D.

    Returns:
        Rates of this device; ranks differ a little.
    """
    long_rows, short_rows, tiny_rows, num_heads = _ON_GPU if device.type == "cuda" else _ON_CPU
    times = {
        rows: _pass_times_s(kernel, rows, num_heads, device=device, dtype=dtype, head_size=head_size)
        for rows in (tiny_rows, short_rows, long_rows)
    }
    launch_s = min(times[tiny_rows])
    work = {rows: rows * rows * num_heads * head_size for rows in times}
    slowness = []
    for which, flops in ((0, _FORWARD_FLOPS), (1, _BACKWARD_FLOPS)):
        # Seconds per FLOP at both lengths; their root falls linearly in 1/n.
        short, long = (
            math.sqrt(max(times[rows][which] - launch_s, 1e-9) / (flops * work[rows]))
            for rows in (short_rows, long_rows)
        )
        slope = max(0.0, (short - long) / (1 / short_rows - 1 / long_rows))
        slowness.append((max(long - slope / long_rows, 0.5 * long), slope))
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


def _pass_times_s(
    kernel: Kernel, num_rows: int, num_heads: int, *, device: torch.device, dtype: torch.dtype, head_size: int
) -> tuple[float, float]:
    """Seconds of forward and backward of one square segment."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(num_rows, num_heads, head_size, generator=generator).to(device=device, dtype=dtype)
        for _ in range(4)
    )
    segments = Segments((0, num_rows), (0, num_rows))
    scale = head_size**-0.5
    out, lse = kernel.forward(q, k, v, segments, mask=FULL, scale=scale)

    def forward() -> Tensor:
        return kernel.forward(q, k, v, segments, mask=FULL, scale=scale)[0]

    def backward() -> Tensor:
        return kernel.backward(dout, q, k, v, out.to(dtype), lse, None, segments, mask=FULL, scale=scale)[0]

    return _seconds(forward, device), _seconds(backward, device)


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
