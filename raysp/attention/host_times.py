"""How long the host takes to issue a whole pass of each method, against the sum of its single operations.

Kernel calls, exchanges and row operations that are timed one by one, again and again, are faster than the same ones in a
pass, with other work and cold caches between them. So every method is run on a tiny document, forward and backward, and what
the host took for it corrects the prediction for all shapes. Where the host is the device there is nothing to correct.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch

from planner import AttentionWork, KernelRate, method_times
from planner.attention_rates import Network
from raysp.attention.kernels import Kernel
from raysp.attention.layout import SequenceLayout
from raysp.attention.mask import DocumentMask
from raysp.attention.methods.call import AttentionCall, Method
from raysp.attention.schedule import schedule_of
from raysp.comm import ByteCounter, Communicator, agree_on_slowest

_T = TypeVar("_T")

_ROWS_OF_CHUNK = 16
_WARM_UPS = 2
_REPETITIONS = 5


def host_factors(
    methods: Mapping[str, Method],
    work: AttentionWork,
    network: Network,
    rate: KernelRate,
    *,
    kernel: Kernel,
    group: Communicator,
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, tuple[float, float]]:
    """Measured over predicted time of the host, by method, forward and backward; all ranks of the group call this together.

    Args:
        methods: Executors by name; those that cannot run the heads of ``work`` are left out.
        work: Gives the heads and the head size; its documents play no part.
        network: Of the group.
        rate: With the host's single operations.
        kernel: Block kernel.
        group: It remembers the result; nothing is counted as sent.
        dtype: Of the inputs.
        device: Of this rank.

    Returns:
        Equal on all ranks, at least 1 each; empty where the rate says that the host takes no time of its own.
    """
    if not rate.host.forward_call_s:
        return {}
    key = (group.ranks, "host_factors", kernel.name, work.num_heads, work.num_key_heads, work.head_size, dtype)
    if key not in group.measurements:
        tiny = replace(work, lengths=(2 * work.degree * _ROWS_OF_CHUNK,), causal=True, window=None, key_lengths=None)
        found: dict[str, tuple[float, float]] = {}
        for time_ in method_times(tiny, network, rate, methods):
            measured_s = _measured_s(methods[time_.method], tiny, kernel, group, dtype, device)
            predicted_s = time_.forward_host_s, time_.backward_host_s
            factors = [max(1.0, a / b) if b else 1.0 for a, b in zip(measured_s, predicted_s, strict=True)]
            found[time_.method] = factors[0], factors[1]
        group.measurements[key] = found
    known: dict[str, tuple[float, float]] = group.measurements[key]
    return known


def _measured_s(
    method: Method, tiny: AttentionWork, kernel: Kernel, group: Communicator, dtype: torch.dtype, device: torch.device
) -> tuple[float, ...]:
    """Seconds of the slowest rank's host for a forward and a backward."""
    layout = SequenceLayout(tiny.lengths, tiny.degree)
    call = AttentionCall(
        schedule=schedule_of(layout, DocumentMask(causal=True, window=None)),
        group=replace(group, counter=ByteCounter()),
        num_key_heads=tiny.num_key_heads,
        kernel=kernel,
        scale=tiny.head_size**-0.5,
        deterministic=False,
    )
    rows = layout.local_tokens(group.group_rank)
    q, k, v, dout = (
        torch.ones(rows, heads, tiny.head_size, dtype=dtype, device=device)
        for heads in (tiny.num_heads, tiny.num_key_heads, tiny.num_key_heads, tiny.num_heads)
    )
    times_s: list[tuple[float, float]] = []
    for _ in range(_WARM_UPS + _REPETITIONS):
        forward_s, (_, saved) = _issued(partial(method.forward, call, q, k, v), device)
        backward_s, _ = _issued(partial(method.backward, call, saved, dout), device)
        times_s.append((forward_s, backward_s))
    medians = [statistics.median(column) for column in zip(*times_s[_WARM_UPS:], strict=True)]
    return agree_on_slowest(medians, group, device=device)


def _issued(run: Callable[[], _T], device: torch.device) -> tuple[float, _T]:
    """Time until a call on an idle device returns, and what it returns."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start_s = time.perf_counter()
    result = run()
    return time.perf_counter() - start_s, result
