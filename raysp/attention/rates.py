"""How fast this device runs a block kernel, and its host issues one: measured once, for the prediction of method times.

On CUDA the device is timed by events behind other work, so that it does not wait for the host, and the host by the time
until a call returns. On CPU both are the same; calls are timed, and the host's own part is 0.

Symbols: n rows of a square segment, n0 see ``planner.KernelRate``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from planner.attention_rates import HostRate, KernelRate
from raysp.attention.blocks import Segments
from raysp.attention.kernels import Kernel
from raysp.attention.mask import FULL
from raysp.attention.merge import merge_into

# Rows of a call, of its short segments and of a tiny call, and query heads.
_ON_GPU = (8192, 512, 16, 16)
_ON_CPU = (768, 96, 4, 2)
_COPIED_BYTES = {"cuda": 256 << 20, "cpu": 16 << 20}
# Copies that keep a GPU busy for some milliseconds, longer than the host takes to issue what is timed.
_COPIES_BEFORE = 32
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
    clock = _CudaClock(device) if device.type == "cuda" else _Clock()
    bench = _Bench(kernel, num_heads, head_size, dtype, device, clock)
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
    copy_s = clock.device_s(source.clone)
    return KernelRate(
        forward_flops_per_s=1 / forward**2,
        backward_flops_per_s=1 / backward**2,
        launch_s=launch_s,
        copy_bytes_per_s=2 * source.numel() / copy_s,
        efficient_rows=forward_slope / forward,
        host=bench.host_rate(tiny_rows),
    )


@dataclass(frozen=True)
class _Bench:
    """Square segments of random rows."""

    kernel: Kernel
    num_heads: int
    head_size: int
    dtype: torch.dtype
    device: torch.device
    clock: _Clock

    def pass_times_s(self, bounds: tuple[int, ...]) -> tuple[float, float]:
        """Seconds of forward and backward of a call on segments with these bounds."""
        forward, backward, _ = self._calls(bounds)
        return self.clock.device_s(forward), self.clock.device_s(backward)

    def host_rate(self, num_rows: int) -> HostRate:
        """What the host takes for a call on one small segment, and for a merge; exchanges are the link's matter."""
        forward, backward, merge = self._calls((0, num_rows))
        return HostRate(
            forward_call_s=self.clock.host_s(forward),
            backward_call_s=self.clock.host_s(backward),
            row_operation_s=self.clock.host_s(merge),
        )

    def _calls(self, bounds: tuple[int, ...]) -> tuple[Callable[[], object], ...]:
        """A forward, a backward and a merge."""
        generator = torch.Generator().manual_seed(0)
        shape = (bounds[-1], self.num_heads, self.head_size)
        q, k, v, dout = (
            torch.randn(shape, generator=generator).to(device=self.device, dtype=self.dtype) for _ in range(4)
        )
        segments, scale = Segments(bounds, bounds), self.head_size**-0.5
        out, lse = self.kernel.forward(q, k, v, segments, mask=FULL, scale=scale)
        given = (out.to(self.dtype), lse, None)
        return (
            lambda: self.kernel.forward(q, k, v, segments, mask=FULL, scale=scale),
            lambda: self.kernel.backward(dout, q, k, v, *given, segments, mask=FULL, scale=scale),
            lambda: merge_into(out, lse, out, lse),
        )


class _Clock:
    """Times calls that have run when they return."""

    def device_s(self, run: Callable[[], object]) -> float:
        """Least time of some runs after one to warm up."""
        return self._least_s(run, self._timed_s)

    def host_s(self, run: Callable[[], object]) -> float:
        """Time that the host takes beside its device: none."""
        return 0.0

    def _timed_s(self, run: Callable[[], object]) -> float:
        start_s = time.perf_counter()
        run()
        return time.perf_counter() - start_s

    def _least_s(self, run: Callable[[], object], timed_s: Callable[[Callable[[], object]], float]) -> float:
        run()
        return max(min(timed_s(run) for _ in range(_REPETITIONS)), 1e-9)


class _CudaClock(_Clock):
    """Times what calls leave to a GPU, and what they take on the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copied = torch.empty(_COPIED_BYTES["cuda"], dtype=torch.uint8, device=device)
        self._target = torch.empty_like(self._copied)

    def host_s(self, run: Callable[[], object]) -> float:
        """Least time until a call returns that finds the GPU idle; an empty queue never holds the host up."""
        return self._least_s(run, self._issued_s)

    def _timed_s(self, run: Callable[[], object]) -> float:
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        stream = torch.cuda.current_stream(self._device)
        torch.cuda.synchronize(self._device)
        for _ in range(_COPIES_BEFORE):
            self._target.copy_(self._copied)
        before.record(stream)
        run()
        after.record(stream)
        after.synchronize()
        return float(before.elapsed_time(after)) / 1e3

    def _issued_s(self, run: Callable[[], object]) -> float:
        torch.cuda.synchronize(self._device)
        start_s = time.perf_counter()
        run()
        return time.perf_counter() - start_s
