"""Which method carries states across ranks: by name, or by predicting the times of all on the group's measured links.

``auto`` asks ``planner.choose_linear_method`` with the bandwidth and latency of this very group and the measured times of
the local operator's phases. Every rank of a group decides from the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from planner import LinearAttentionShape, LinearAttentionWork, LinearMethodDecision, Link, choose_linear_method
from raysp.attention import SequenceLayout
from raysp.comm import Communicator, agree_on_slowest, measure_link
from raysp.errors import InputError
from raysp.linear_attention.rates import MakeOperator, local_pass, measure_local_times
from raysp.linear_attention.scans import GatherScan, SerialScan, StateScan

METHODS = ("lasp2", "lasp1", "zeco", "ulysses", "auto")
_ZECO_BLOCKS = 4


@dataclass(frozen=True)
class LinearChoice:
    """What runs.

    Attributes:
        method: One of ``METHODS`` but ``auto``.
        forward: How states travel; ``None`` where heads do instead.
        backward: How their gradients do.
        decision: The predicted times where ``auto`` chose.
    """

    method: str
    forward: StateScan | None
    backward: StateScan | None
    decision: LinearMethodDecision | None = None


def choose(
    method: str,
    *,
    layout: SequenceLayout,
    group: Communicator,
    shape: LinearAttentionShape,
    causal: bool,
    make: MakeOperator,
    dtype: torch.dtype,
    device: torch.device,
) -> LinearChoice:
    """Find how a call's states travel. With ``auto`` all ranks of the group call this together.

    The first call on a group measures its links and the local operator, some tenths of a second; the choice is kept with
    the layout. Bidirectional calls send the same sums whatever the scan.

    Raises:
        InputError: There is no such method.
    """
    if method not in METHODS:
        raise InputError(f"linear attention method {method!r} is unknown; expected one of {', '.join(METHODS)}.")
    if method != "auto" or layout.degree == 1 or not causal:
        return _made("lasp2" if method == "auto" else method, (_ZECO_BLOCKS, _ZECO_BLOCKS))

    def build() -> LinearChoice:
        work = LinearAttentionWork(lengths=layout.lengths, degree=layout.degree, shape=shape)
        link = measure_link(group, device=device)
        network = Link(bandwidth_bytes_per_s=link.bandwidth_bytes_per_s, latency_s=link.latency_s)
        times = _local_times(group, shape, make, dtype=dtype, device=device)
        forward, backward = (local_pass(per_token_s, int(work.tokens_by_rank.max())) for per_token_s in times)
        decision = choose_linear_method(work, network, forward, backward)
        return _made(decision.method, decision.chosen.num_blocks, decision)

    return layout.memo(("linear_choice", group.ranks, make, shape, dtype, device), build)


def _made(method: str, num_blocks: tuple[int, int], decision: LinearMethodDecision | None = None) -> LinearChoice:
    if method == "ulysses":
        return LinearChoice(method, None, None, decision)
    scans: list[StateScan] = [
        GatherScan() if method == "lasp2" else SerialScan(blocks if method == "zeco" else 1) for blocks in num_blocks
    ]
    return LinearChoice(method, scans[0], scans[1], decision)


def _local_times(
    group: Communicator, shape: LinearAttentionShape, make: MakeOperator, *, dtype: torch.dtype, device: torch.device
) -> tuple[list[float], list[float]]:
    """The slowest rank's, measured at the group's first call of this kind."""
    key = (group.ranks, "local_times", make, shape, dtype, device.type)
    if key not in group.measurements:
        forward, backward = measure_local_times(shape, make, dtype=dtype, device=device)
        slowest = agree_on_slowest([*forward, *backward], group, device=device)
        # The largest of each: parts stay parts of the whole.
        halves = [list(slowest[: len(forward)]), list(slowest[len(forward) :])]
        for half in halves:
            half[0] = max(half[0], half[1] + half[2])
        group.measurements[key] = (halves[0], halves[1])
    found: tuple[list[float], list[float]] = group.measurements[key]
    return found
