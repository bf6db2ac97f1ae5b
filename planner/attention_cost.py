"""How long each method of parallel attention takes on a measured link: `method_times`.

A step takes as long as the slower of its compute (on the slowest rank) and its messages; what messages take beyond
compute is *exposed*. Steps follow each other on the device while the host issues them, one operation after the other,
ahead of the device as long as it can: a pass takes what the device needs or what the host needs, whichever is more, as in
a row of passes without a pause. `planner.attention_choice` picks a method from these times.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from planner.attention_heads import heads_divide, trading_neighbours
from planner.attention_pass import HEAD_GROUPS, AttentionPass, Step
from planner.attention_rates import KernelRate, Network
from planner.attention_shards import Shards
from planner.attention_steps import METHOD_STEPS, local_steps
from planner.attention_work import AttentionWork, FloatArray
from planner.errors import PlanError

ATTENTION_METHODS = tuple(METHOD_STEPS)
LOCAL = "local"
# It never forms the scores in blocks, so no network makes it the fastest.
BASELINES = ("rsa",)


@dataclass(frozen=True, kw_only=True)
class MethodTime:
    """Predicted time of one method.

    Attributes:
        method: One of `ATTENTION_METHODS`, or ``"local"`` at degree 1.
        forward_s: From one pass to the next: of device and host, what takes longer.
        backward_s: Likewise.
        forward_exposed_s: Part of it in which messages are waited for and nothing is computed.
        backward_exposed_s: Likewise.
        forward_bytes: Sent by all ranks together.
        backward_bytes: Likewise.
        forward_communication_s: What the messages take, hidden or not.
        backward_communication_s: Likewise.
        forward_compute_s: What kernels and copies take.
        backward_compute_s: Likewise.
        forward_host_s: What the host takes to issue the pass, on the rank where that is longest.
        backward_host_s: Likewise.
    """

    method: str
    forward_s: float
    backward_s: float
    forward_exposed_s: float
    backward_exposed_s: float
    forward_bytes: int
    backward_bytes: int
    forward_communication_s: float
    backward_communication_s: float
    forward_compute_s: float
    backward_compute_s: float
    forward_host_s: float
    backward_host_s: float

    @property
    def total_s(self) -> float:
        """Forward and backward."""
        return self.forward_s + self.backward_s


def method_times(
    work: AttentionWork,
    link: Network,
    rate: KernelRate,
    methods: Iterable[str] = ATTENTION_METHODS,
    *,
    hides_last_return: bool = False,
    head_groups: int = HEAD_GROUPS,
    whole_apart: bool = True,
    host_factors: Mapping[str, tuple[float, float]] | None = None,
) -> tuple[MethodTime, ...]:
    """Predict forward and backward of each method.

    Args:
        work: The call.
        link: Of this group; any `Network`.
        rate: Of each rank.
        methods: Which; those that cannot run are left out, see `why_not`.
        hides_last_return: The ring and TokenRing keep half of the work on own rows for their last exchange; otherwise
            it is exposed.
        head_groups: Groups of key heads that an all-gather moves one after the other.
        whole_apart: An all-gather computes whole documents in a call of their own, where that hides much.
        host_factors: By method, how much longer the host was seen to take for a forward and a backward than its single
            operations add up to; 1 where nothing is said.

    Returns:
        One for each method that can run, in order; the one row ``"local"`` at degree 1.

    Raises:
        PlanError: A method is unknown.
    """
    runnable = [method for method in dict.fromkeys(methods) if why_not(method, work) is None]
    shards = Shards(work, rate.efficient_rows)

    def steps(method: str, *, backward: bool) -> list[Step]:
        call = AttentionPass(
            shards=shards,
            num_heads=work.num_heads,
            num_key_heads=work.num_key_heads,
            head_size=work.head_size,
            element_bytes=work.element_bytes,
            rate=rate,
            backward=backward,
            hides_last_return=hides_last_return,
            head_groups=head_groups,
            whole_apart=whole_apart,
        )
        return local_steps(call) if method == LOCAL else METHOD_STEPS[method](call, work)

    times = []
    for method in [LOCAL] if work.degree == 1 else runnable:
        factors = (host_factors or {}).get(method, (1.0, 1.0))
        forward, backward = (
            _timed(steps(method, backward=backward), link, rate, host_factor=factor)
            for backward, factor in zip((False, True), factors, strict=True)
        )
        times.append(
            MethodTime(
                method=method,
                forward_s=forward.total_s,
                backward_s=backward.total_s,
                forward_exposed_s=forward.exposed_s,
                backward_exposed_s=backward.exposed_s,
                forward_bytes=forward.num_bytes,
                backward_bytes=backward.num_bytes,
                forward_communication_s=forward.communication_s,
                backward_communication_s=backward.communication_s,
                forward_compute_s=forward.compute_s,
                backward_compute_s=backward.compute_s,
                forward_host_s=forward.host_s,
                backward_host_s=backward.host_s,
            )
        )
    return tuple(times)


def why_not(method: str, work: AttentionWork) -> str | None:
    """Say why a method cannot run, or is never chosen; `None` where it can.

    Raises:
        PlanError: The method is unknown.
    """
    heads = f"{work.num_heads} query and {work.num_key_heads} key heads"
    if method in BASELINES:
        return "a baseline that stores whole rows of scores; it is never chosen"
    if method not in ATTENTION_METHODS:
        raise PlanError(f"method {method!r} is unknown; expected one of {', '.join((*ATTENTION_METHODS, *BASELINES))}.")
    shape = (work.degree, work.num_heads, work.num_key_heads)
    if method == "ulysses" and not heads_divide(*shape):
        return f"{work.degree} ranks cannot share {heads} equally"
    if method == "ulysses_ring" and trading_neighbours(*shape) is None:
        return f"no divisor of {work.degree} between 1 and itself shares {heads} equally"
    return None


@dataclass(frozen=True)
class _PassTime:
    total_s: float
    compute_s: float
    exposed_s: float
    communication_s: float
    host_s: float
    num_bytes: int


def _timed(steps: Sequence[Step], network: Network, rate: KernelRate, *, host_factor: float) -> _PassTime:
    compute_s = [float(step.load[0].max()) for step in steps]
    messages_s = [network.transfer_s(step.messages) for step in steps]
    exposed_s = sum(max(0.0, moved - computed) for moved, computed in zip(messages_s, compute_s, strict=True))
    issuing_s = sum(step.load[1] + _takes_part(step.messages) * rate.host.exchange_s for step in steps)
    host_s = host_factor * float(np.max(issuing_s))
    return _PassTime(
        total_s=max(sum(compute_s) + exposed_s, host_s),
        compute_s=sum(compute_s),
        exposed_s=exposed_s,
        communication_s=sum(messages_s),
        host_s=host_s,
        num_bytes=round(sum(float(step.messages.sum()) for step in steps)),
    )


def _takes_part(messages: FloatArray) -> FloatArray:
    """``[N]``: 1 for a rank that sends or receives, 0 for others."""
    taking: FloatArray = ((messages.sum(axis=0) > 0) | (messages.sum(axis=1) > 0)).astype(np.float64)
    return taking
