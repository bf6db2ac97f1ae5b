"""Which method runs, and how: by name, or by predicting the times of all on the measured links of the group.

``auto`` asks ``planner.choose_methods`` with the bandwidth and latency of this very group, the rate of its kernel on this
device and the time that the host takes to issue it all, forward and backward apart. Ring, bidirectional ring, TokenRing
and all-gather save the same tensors, so the backward may run another of them than the forward. Every rank of a group
decides from the same numbers.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from planner import AttentionWork, KernelRate, Link, MethodDecision, choose_methods
from planner.attention_rates import HostRate
from raysp.attention.host_times import host_factors
from raysp.attention.kernels import Kernel
from raysp.attention.methods.all_gather import AllGather
from raysp.attention.methods.call import Method
from raysp.attention.methods.local import Local
from raysp.attention.methods.ring import KeyRing
from raysp.attention.methods.rsa import RingSelfAttention
from raysp.attention.methods.token_ring import TokenRing
from raysp.attention.methods.ulysses import Ulysses, UlyssesRing, check_heads
from raysp.attention.rates import measure_kernel_rate
from raysp.attention.schedule import Schedule
from raysp.comm import Communicator, agree_on_slowest, measure_link
from raysp.errors import InputError

METHODS = (
    "auto", "ring", "bidirectional_ring", "token_ring", "all_gather", "ulysses", "ulysses_ring", "rsa", "local",
)  # fmt: skip
_CHOSEN_FROM = ("ring", "bidirectional_ring", "token_ring", "all_gather", "ulysses", "ulysses_ring")


@dataclass(frozen=True)
class Tuning:
    """How methods that can trade one cost for another do it.

    Attributes:
        hides_last_return: Rings keep half of the own work for the last exchange.
        head_groups: Groups of key heads that an all-gather moves one after the other.
        whole_apart: An all-gather computes whole documents in a call of their own, where that hides much.
    """

    hides_last_return: bool = False
    head_groups: int = 1
    whole_apart: bool = True


# More kernel calls hide more communication. Each also ends with part of the device idle, which the prediction does not
# count, so the last must be predicted to be clearly faster.
_PLAIN = (Tuning(whole_apart=False), Tuning())
_HIDING = Tuning(hides_last_return=True, head_groups=4)
_CLEARLY_FASTER = 0.9


@dataclass(frozen=True)
class Choice:
    """The executors of one call.

    Attributes:
        forward: Of the forward.
        backward: Of the backward.
        decision: The predicted times where ``auto`` chose.
    """

    forward: Method
    backward: Method
    decision: MethodDecision | None = None


def check_method(name: str, *, degree: int, num_heads: int, num_key_heads: int) -> None:
    """Refuse a method that is unknown or cannot run a group.

    Args:
        name: One of ``METHODS``.
        degree: Ranks of the group; at 1 every method is ``local``.
        num_heads: Query heads.
        num_key_heads: Key heads.

    Raises:
        InputError: Says which and why.
    """
    if name not in METHODS:
        raise InputError(f"method {name!r} is unknown; expected one of {', '.join(METHODS)}.")
    if degree == 1:
        return
    if name == "local":
        raise InputError(f"method 'local' needs a group of one, the layout has degree {degree}. Use 'auto'.")
    if name == "ulysses":
        check_heads(degree, num_heads, num_key_heads)


def choose(
    name: str,
    *,
    schedule: Schedule,
    group: Communicator,
    kernel: Kernel,
    num_heads: int,
    num_key_heads: int,
    head_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Choice:
    """Find the executors of a call. With ``auto`` all ranks of the group call this together.

    The first call on a group measures its links and the kernel, some tenths of a second; the choice is kept with the
    schedule.

    Raises:
        InputError: See ``check_method``.
    """
    degree = schedule.degree
    check_method(name, degree=degree, num_heads=num_heads, num_key_heads=num_key_heads)
    if degree == 1:
        return Choice(Local(), Local())
    if name != "auto":
        method = make_method(name, Tuning())
        return Choice(method, method)

    def build() -> Choice:
        work = AttentionWork(
            degree=degree,
            num_heads=num_heads,
            num_key_heads=num_key_heads,
            head_size=head_size,
            lengths=schedule.layout.lengths,
            causal=schedule.mask.causal,
            window=schedule.mask.window,
            element_bytes=dtype.itemsize,
            key_lengths=None if schedule.key_layout is schedule.layout else schedule.key_layout.lengths,
        )
        link = measure_link(group, device=device)
        rate = _kernel_rate(group, kernel, device=device, dtype=dtype, head_size=head_size)
        rate = replace(rate, host=replace(rate.host, exchange_s=link.host_s))
        network = Link(bandwidth_bytes_per_s=link.bandwidth_bytes_per_s, latency_s=link.latency_s)
        methods = {each: make_method(each, Tuning()) for each in _CHOSEN_FROM}
        factors = host_factors(methods, work, network, rate, kernel=kernel, group=group, dtype=dtype, device=device)
        decisions = {
            tuning: choose_methods(
                work, network, rate, _CHOSEN_FROM,
                hides_last_return=tuning.hides_last_return, head_groups=tuning.head_groups,
                whole_apart=tuning.whole_apart, host_factors=factors,
            )
            for tuning in (*_PLAIN, _HIDING)
        }  # fmt: skip
        times_s = {tuning: decision.forward_s + decision.backward_s for tuning, decision in decisions.items()}
        best = min(_PLAIN, key=times_s.__getitem__)
        if times_s[_HIDING] < _CLEARLY_FASTER * times_s[best]:
            best = _HIDING
        decision = decisions[best]
        forward, backward = (make_method(each, best) for each in (decision.forward, decision.backward))
        return Choice(forward, backward, decision)

    key = ("choice", group.ranks, kernel.name, num_heads, num_key_heads, head_size, dtype, device)
    return schedule.memo(key, build)


@functools.cache
def make_method(name: str, tuning: Tuning) -> Method:
    """Make the executor of a method that is not ``auto``; they have no state."""
    hides = tuning.hides_last_return
    executors: dict[str, Method] = {
        "local": Local(),
        "ring": KeyRing(bidirectional=False, hides_last_return=hides),
        "bidirectional_ring": KeyRing(bidirectional=True, hides_last_return=hides),
        "token_ring": TokenRing(hides_last_return=hides),
        "all_gather": AllGather(tuning.head_groups, tuning.whole_apart),
        "ulysses": Ulysses(),
        "ulysses_ring": UlyssesRing(KeyRing(bidirectional=False, hides_last_return=hides)),
        "rsa": RingSelfAttention(),
    }
    return executors[name]


def _kernel_rate(
    group: Communicator, kernel: Kernel, *, device: torch.device, dtype: torch.dtype, head_size: int
) -> KernelRate:
    """The slowest rank's rate, measured at the group's first call with this kernel."""
    key = (group.ranks, "kernel_rate", kernel.name, device.type, dtype, head_size)
    if key not in group.measurements:
        rate = measure_kernel_rate(kernel, device=device, dtype=dtype, head_size=head_size)
        # Agreed on as times, of which the largest is the slowest.
        slowest = agree_on_slowest(
            [
                1 / rate.forward_flops_per_s,
                1 / rate.backward_flops_per_s,
                rate.launch_s,
                1 / rate.copy_bytes_per_s,
                rate.efficient_rows,
                rate.host.forward_call_s,
                rate.host.backward_call_s,
                rate.host.row_operation_s,
            ],
            group,
            device=device,
        )
        group.measurements[key] = KernelRate(
            forward_flops_per_s=1 / slowest[0],
            backward_flops_per_s=1 / slowest[1],
            launch_s=slowest[2],
            copy_bytes_per_s=1 / slowest[3],
            efficient_rows=slowest[4],
            host=HostRate(forward_call_s=slowest[5], backward_call_s=slowest[6], row_operation_s=slowest[7]),
        )
    found: KernelRate = group.measurements[key]
    return found
