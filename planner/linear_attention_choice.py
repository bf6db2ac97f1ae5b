"""Which method of linear attention over shards a call takes, and why: `choose_linear_method`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from planner.attention_rates import Network
from planner.errors import PlanError
from planner.linear_attention_bytes import LINEAR_METHODS
from planner.linear_attention_cost import LinearMethodTime, LocalPass, linear_method_times
from planner.linear_attention_work import LinearAttentionWork, longest_chain

# Sums of the same numbers in another order differ by less.
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True)
class LinearMethodDecision:
    """The method of a call.

    Attributes:
        method: One of `LINEAR_METHODS`.
        times: Of every allowed method.
        reason: Why this one won, in a line.
    """

    method: str
    times: tuple[LinearMethodTime, ...]
    reason: str

    @property
    def chosen(self) -> LinearMethodTime:
        """Time of the choice."""
        return next(time for time in self.times if time.method == self.method)

    def explain(self) -> str:
        """Return a table of all methods in seconds, and the reason; lines of plain text."""
        width = max(len(time.method) for time in self.times)
        lines = [f"{'seconds':{width}} {'forward':>13} {'backward':>13} {'added':>13} {'bytes':>15}"]
        for time in self.times:
            added_s = time.forward_added_s + time.backward_added_s
            chosen = "  <- chosen" if time.method == self.method else ""
            lines.append(
                f"{time.method:{width}} {time.forward_s:13.6f} {time.backward_s:13.6f} {added_s:13.6f} "
                f"{time.forward_bytes + time.backward_bytes:15,}{chosen}"
            )
        return "\n".join([*lines, self.reason])


def choose_linear_method(
    work: LinearAttentionWork,
    network: Network,
    forward: LocalPass,
    backward: LocalPass,
    allowed: Iterable[str] = LINEAR_METHODS,
) -> LinearMethodDecision:
    """Pick the method whose forward and backward take least; on a tie lasp2, then the one allowed first.

    Args:
        work: The call.
        network: Of this group: measured bandwidth and latency.
        forward: Local times of one rank's share.
        backward: Likewise.
        allowed: Methods to pick from.

    Raises:
        PlanError: A method is unknown, or none is allowed.
    """
    allowed = sorted(dict.fromkeys(allowed), key=lambda method: method != "lasp2")
    times = linear_method_times(work, network, forward, backward, allowed)
    if not times:
        raise PlanError("no method of linear attention is allowed; expected at least one. Allow 'lasp2'.")
    least_s = min(time.total_s for time in times)
    chosen = next(time for time in times if time.total_s <= least_s * (1 + _ROUNDING))
    return LinearMethodDecision(method=chosen.method, times=times, reason=_reason(chosen, times, work))


def _reason(chosen: LinearMethodTime, times: tuple[LinearMethodTime, ...], work: LinearAttentionWork) -> str:
    ranks = longest_chain(work.chains)
    if ranks == 1 and work.degree > 1 and chosen.forward_bytes == 0:
        return f"{chosen.method}: {chosen.total_s:.4g} s; no document crosses a border of ranks, so nothing travels."
    added_s = chosen.forward_added_s + chosen.backward_added_s
    won = f"{chosen.method}: {chosen.total_s:.4g} s, of which sharding adds {added_s:.3g} s over {ranks} ranks"
    if chosen.method == "zeco":
        won += f" in {chosen.num_blocks[0]} and {chosen.num_blocks[1]} blocks"
    others = [time for time in times if time is not chosen]
    if not others:
        return f"{won}; no other method is allowed."
    other = min(others, key=lambda time: time.total_s)
    if other.total_s <= chosen.total_s * (1 + _ROUNDING):
        return f"{won}; {other.method} takes as long."
    return f"{won}; next is {other.method} with {other.total_s:.4g} s (+{other.total_s / chosen.total_s - 1:.1%})."
