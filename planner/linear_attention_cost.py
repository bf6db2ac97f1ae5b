"""How long each method of linear attention over shards takes: `linear_method_times`, forward and backward apart.

The local operator's time is measured (or derived) by the caller, for one rank's share of the tokens: `LocalPass`. The parts
of a pass follow each other as in raysp's executors, on the slowest rank. With W the whole local work, of it A the summary
(the state of the rank's last piece, or of a gradient) and I what needs no foreign state; B the transition, C applying one:

    lasp2     A + B + max(I, exchange) + C per state that arrives + (W - A - I)
    lasp1     a rank sends max(A + B, arrival) + C; it ends max(A + B + I, arrival) + (W - A - I); m-1 hops in series
    zeco      the same for b blocks of a state's columns, each sent on as soon as it is there: m-2+b block hops; the b
              of the least time
    ulysses   exchange + W + exchange: all tokens of H/N heads are as much work as all heads of 1/N of the tokens
    ring      max(hop, W) + (N-2) max(hop, A + C) + A + C: the states of earlier ranks are made from their rows here

Messages take what a `planner.attention_rates.Network` says (alpha-beta: latency + bytes / bandwidth), so a `Link` or any
`planner.attention_topology.Topology` will do.

Sources: LASP-2 (arXiv:2502.07563), LASP (arXiv:2404.02882), ZeCO (arXiv:2507.01004), Ulysses (arXiv:2309.14509).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from planner.attention_rates import Network
from planner.attention_work import FloatArray
from planner.errors import PlanError
from planner.linear_attention_bytes import (
    LINEAR_METHODS,
    STATE_SCANS,
    check_linear_method,
    gathered_messages,
    head_shares,
    linear_method_bytes,
    ring_row_bytes,
    traded_messages,
)
from planner.linear_attention_work import LinearAttentionWork
from planner.strict_json import as_number

Hop = Callable[[int, int, float], float]


@dataclass(frozen=True, kw_only=True)
class LocalPass:
    """Seconds of the local operator for one rank's share of the tokens, in one direction.

    Attributes:
        whole_s: All of it, as without shards.
        summary_s: Part of `whole_s`: the state, or gradient of a state, that others need.
        intra_s: Part of `whole_s`, apart from the summary: what needs no state of others.
        transition_s: Beyond `whole_s`: what the rank does to a state that passes through it.
        combine_s: Beyond `whole_s`: applying one transition to one state, and adding.
    """

    whole_s: float
    summary_s: float = 0.0
    intra_s: float = 0.0
    transition_s: float = 0.0
    combine_s: float = 0.0

    def __post_init__(self) -> None:
        for key in ("whole_s", "summary_s", "intra_s", "transition_s", "combine_s"):
            as_number(getattr(self, key), key, PlanError)
        if self.summary_s + self.intra_s > self.whole_s * (1 + 1e-9):
            raise PlanError(
                f"summary_s {self.summary_s} and intra_s {self.intra_s} are more than whole_s {self.whole_s}; expected "
                "parts of it."
            )

    @property
    def rest_s(self) -> float:
        """Part of `whole_s` after the state has arrived."""
        return max(0.0, self.whole_s - self.summary_s - self.intra_s)


@dataclass(frozen=True, kw_only=True)
class LinearMethodTime:
    """Predicted time of one method.

    Attributes:
        method: One of `LINEAR_METHODS`, or a baseline.
        forward_s: From start to end.
        backward_s: Likewise.
        forward_added_s: What of it the local operator alone would not take.
        backward_added_s: Likewise.
        forward_bytes: Sent by all ranks together.
        backward_bytes: Likewise.
        num_blocks: Blocks that ZeCO cuts a state into, forward and backward; 1 elsewhere.
    """

    method: str
    forward_s: float
    backward_s: float
    forward_added_s: float
    backward_added_s: float
    forward_bytes: int
    backward_bytes: int
    num_blocks: tuple[int, int] = (1, 1)

    @property
    def total_s(self) -> float:
        """Forward and backward."""
        return self.forward_s + self.backward_s


def linear_method_times(
    work: LinearAttentionWork,
    network: Network,
    forward: LocalPass,
    backward: LocalPass,
    methods: Iterable[str] = LINEAR_METHODS,
) -> tuple[LinearMethodTime, ...]:
    """Predict forward and backward of each method.

    Args:
        work: The call.
        network: Of this group.
        forward: Local times of one rank's share.
        backward: Likewise.
        methods: Which.

    Returns:
        One for each method, in order.

    Raises:
        PlanError: A method is unknown.
    """
    times = []
    for method in dict.fromkeys(methods):
        check_linear_method(method)
        passes = [
            _pass_s(method, work, network, local, backward=is_backward)
            for local, is_backward in ((forward, False), (backward, True))
        ]
        (forward_s, forward_blocks), (backward_s, backward_blocks) = passes
        times.append(
            LinearMethodTime(
                method=method,
                forward_s=forward_s,
                backward_s=backward_s,
                forward_added_s=forward_s - forward.whole_s,
                backward_added_s=backward_s - backward.whole_s,
                forward_bytes=linear_method_bytes(work, method, backward=False),
                backward_bytes=linear_method_bytes(work, method, backward=True),
                num_blocks=(forward_blocks, backward_blocks),
            )
        )
    return tuple(times)


def lasp2_s(
    work: LinearAttentionWork, network: Network, local: LocalPass, *, backward: bool, exchange_s: float | None = None
) -> float:
    """Return the seconds of one pass of LASP-2: one exchange, overlapped with the intra work, then the combination.

    Args:
        work: The call.
        network: Of the group.
        local: Of one rank's share.
        backward: Which pass.
        exchange_s: Of the exchange; `None`: each rank sends to every later one of its chain, all at once.
    """
    if exchange_s is None:
        exchange_s = network.transfer_s(gathered_messages(work, backward=backward))
    end_s = local.whole_s
    for num_ranks in map(len, work.chains):
        # A rank inside the chain is the last to send, and the last rank, which waits for it, has most to combine: the
        # first state is taken as it is, every further one is the sum of a passed one and its own.
        ahead_s = local.summary_s + _transition_s(1, num_ranks, local)
        combine_s = local.combine_s * (num_ranks - 2)
        end_s = max(end_s, ahead_s + max(local.intra_s, exchange_s) + combine_s + local.rest_s)
    return end_s


def serial_scan_s(
    work: LinearAttentionWork, network: Network, local: LocalPass, *, backward: bool, num_blocks: int = 1
) -> float:
    """Return the seconds of one pass of LASP-1, or with several blocks of ZeCO: states in series along each chain."""
    hop = _hops(work, network)
    block_bytes = work.shape.state_bytes / num_blocks
    end_s = local.whole_s
    for chain in work.chains:
        ordered = chain[::-1] if backward else chain
        combine_s = local.combine_s / num_blocks
        sent_s: FloatArray = np.full(num_blocks, local.summary_s)
        for place in range(1, len(ordered)):
            ahead_s = local.summary_s + _transition_s(place, len(ordered), local)
            hop_s = hop(ordered[place - 1], ordered[place], block_bytes)
            arrived_s = _in_series(sent_s, hop_s)
            end_s = max(end_s, max(ahead_s + local.intra_s, float(arrived_s[-1])) + local.rest_s)
            sent_s = np.maximum(arrived_s, ahead_s) + combine_s
    return end_s


def zeco_s(work: LinearAttentionWork, network: Network, local: LocalPass, *, backward: bool) -> tuple[float, int]:
    """Return the seconds of one pass of ZeCO and the number of blocks of the least time, the fewest on a tie."""
    counts = {1 << power for power in range(work.shape.value_size.bit_length())} | {work.shape.value_size}
    timed = [
        (serial_scan_s(work, network, local, backward=backward, num_blocks=count), count) for count in sorted(counts)
    ]
    return min(timed)


def ulysses_s(work: LinearAttentionWork, network: Network, local: LocalPass, *, backward: bool) -> float:
    """Return the seconds of one pass of Ulysses: trade, work on all tokens of some heads, trade back."""
    if work.degree == 1:
        return local.whole_s
    # The rank with most heads is the last.
    uneven = max(head_shares(work.shape.num_heads, work.degree)) * work.degree / work.shape.num_heads
    trades_s = sum(network.transfer_s(messages) for messages in traded_messages(work, backward=backward))
    return local.whole_s * uneven + trades_s


def ring_s(work: LinearAttentionWork, network: Network, local: LocalPass, *, backward: bool) -> float:
    """Return the seconds of one pass of the ring of rows, of which the slowest rank needs those of all others.

    Hops are hidden behind the work on the rows that came before, which favours the ring.

    Source:
        The "Ring Attention" that LASP-2 (arXiv:2502.07563) compares itself with, here with the right product first.
    """
    if work.degree == 1:
        return local.whole_s
    rows = work.tokens_by_rank * ring_row_bytes(work, backward=backward)
    messages = np.zeros((work.degree, work.degree))
    messages[np.arange(work.degree), (np.arange(work.degree) + 1) % work.degree] = rows.max()
    hop_s, arrived_s = network.transfer_s(messages), local.summary_s + local.combine_s
    return max(hop_s, local.whole_s) + (work.degree - 2) * max(hop_s, arrived_s) + arrived_s


def _pass_s(
    method: str, work: LinearAttentionWork, network: Network, local: LocalPass, *, backward: bool
) -> tuple[float, int]:
    if method == "zeco":
        return zeco_s(work, network, local, backward=backward)
    if method in STATE_SCANS:
        scan = lasp2_s if method == "lasp2" else serial_scan_s
        return scan(work, network, local, backward=backward), 1
    return (ulysses_s if method == "ulysses" else ring_s)(work, network, local, backward=backward), 1


def _transition_s(place: int, num_ranks: int, local: LocalPass) -> float:
    return local.transition_s if 0 < place < num_ranks - 1 else 0.0


def _in_series(ready_s: FloatArray, hop_s: float) -> FloatArray:
    """Return when blocks arrive that are ready one by one and travel one after the other, `hop_s` each."""
    if not math.isfinite(hop_s):
        raise PlanError("the network takes no finite time; expected one.")
    places = np.arange(len(ready_s))
    # arrived[b] = max over a <= b of ready[a] + (b - a + 1) hops
    arrived_s: FloatArray = np.maximum.accumulate(ready_s - places * hop_s) + (places + 1) * hop_s
    return arrived_s


def _hops(work: LinearAttentionWork, network: Network) -> Hop:
    """Return the seconds of a message of some bytes from one rank to another, each asked of the network once."""
    known: dict[tuple[int, int, float], float] = {}

    def hop(source: int, target: int, num_bytes: float) -> float:
        key = (source, target, num_bytes)
        if key not in known:
            messages = np.zeros((work.degree, work.degree))
            messages[source, target] = num_bytes
            known[key] = network.transfer_s(messages)
        return known[key]

    return hop
