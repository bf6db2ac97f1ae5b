"""What ``auto`` measures of a kernel, on CPU."""

from __future__ import annotations

import torch

from planner.attention_rates import HostRate
from raysp.attention.kernels import resolve_kernel
from raysp.attention.rates import measure_kernel_rate


def test_a_cpu_has_rates_and_no_host_beside_it() -> None:
    device, dtype = torch.device("cpu"), torch.float32
    kernel = resolve_kernel("aten", device=device, dtype=dtype, head_size=32)
    rate = measure_kernel_rate(kernel, device=device, dtype=dtype, head_size=32)
    assert 1e8 < rate.forward_flops_per_s < 1e14
    assert 1e8 < rate.backward_flops_per_s < 1e14
    assert 0 < rate.launch_s < 1.0
    assert rate.host == HostRate()
