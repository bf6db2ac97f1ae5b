"""Which method of parallel attention a call takes, and why: `choose_methods`.

Ring, bidirectional ring, TokenRing and all-gather save the same tensors, so the backward may take another of them than
the forward. ``ulysses`` and ``ulysses_ring`` keep what they traded and go with themselves.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from planner.attention_cost import ATTENTION_METHODS, MethodTime, method_times, why_not
from planner.attention_pass import HEAD_GROUPS
from planner.attention_rates import KernelRate, Network
from planner.attention_work import AttentionWork
from planner.errors import PlanError

INTERCHANGEABLE = ("ring", "bidirectional_ring", "token_ring", "all_gather")
_COLUMNS = ("compute", "communication", "exposed", "host", "total")


@dataclass(frozen=True, kw_only=True)
class MethodDecision:
    """The methods of a call.

    Attributes:
        forward: Method of the forward.
        backward: Method of the backward.
        times: Of every allowed method that can run.
        left_out: Every allowed method that cannot, and why.
        reason: Why these two won, in a sentence.
    """

    forward: str
    backward: str
    times: tuple[MethodTime, ...]
    left_out: tuple[tuple[str, str], ...]
    reason: str

    @property
    def forward_s(self) -> float:
        """Predicted forward of the choice."""
        return self._time(self.forward).forward_s

    @property
    def backward_s(self) -> float:
        """Predicted backward of the choice."""
        return self._time(self.backward).backward_s

    def explain(self) -> str:
        """Return a table of all methods in seconds, what was left out, and the reason; lines of plain text."""
        width = max(len(time.method) for time in self.times)
        lines = [f"{'seconds':{width}} {'pass':8} " + " ".join(f"{column:>13}" for column in _COLUMNS)]
        for time in self.times:
            for which, method, values_s in (
                ("forward", self.forward, _forward_values_s(time)),
                ("backward", self.backward, _backward_values_s(time)),
            ):
                row = " ".join(f"{value_s:13.6f}" for value_s in values_s)
                chosen = "  <- chosen" if method == time.method else ""
                lines.append(f"{time.method:{width}} {which:8} {row}{chosen}")
        lines += [f"{method}: left out, {reason}" for method, reason in self.left_out]
        return "\n".join([*lines, self.reason])

    def _time(self, method: str) -> MethodTime:
        return next(time for time in self.times if time.method == method)


def choose_methods(
    work: AttentionWork,
    link: Network,
    rate: KernelRate,
    allowed: Iterable[str] = ATTENTION_METHODS,
    *,
    hides_last_return: bool = False,
    head_groups: int = HEAD_GROUPS,
    whole_apart: bool = True,
    host_factors: Mapping[str, tuple[float, float]] | None = None,
) -> MethodDecision:
    """Pick the methods whose forward and backward together take least; on a tie the one allowed first.

    Args:
        work: The call.
        link: Of this group.
        rate: Of each rank.
        allowed: Methods to pick from.
        hides_last_return: See `method_times`.
        head_groups: See `method_times`.
        whole_apart: See `method_times`.
        host_factors: See `method_times`.

    Raises:
        PlanError: A method is unknown, or none of them can run.
    """
    allowed = tuple(dict.fromkeys(allowed))
    reasons = [(method, why_not(method, work)) for method in allowed]
    left_out = tuple((method, reason) for method, reason in reasons if reason is not None)
    times = method_times(
        work, link, rate, allowed, hides_last_return=hides_last_return, head_groups=head_groups,
        whole_apart=whole_apart, host_factors=host_factors,
    )  # fmt: skip
    if not times:
        why = "; ".join(f"{method}: {reason}" for method, reason in left_out) or "no method is allowed"
        raise PlanError(f"no method can run ({why}). Allow one that runs any degree, such as 'ring'.")
    ranked = sorted(_pairs(times), key=lambda pair: pair[0].forward_s + pair[1].backward_s)
    forward, backward = ranked[0]
    return MethodDecision(
        forward=forward.method,
        backward=backward.method,
        times=times,
        left_out=left_out,
        reason=_reason(ranked, times),
    )


def _forward_values_s(time: MethodTime) -> tuple[float, ...]:
    exposed_s, communication_s = time.forward_exposed_s, time.forward_communication_s
    return time.forward_compute_s, communication_s, exposed_s, time.forward_host_s, time.forward_s


def _backward_values_s(time: MethodTime) -> tuple[float, ...]:
    exposed_s, communication_s = time.backward_exposed_s, time.backward_communication_s
    return time.backward_compute_s, communication_s, exposed_s, time.backward_host_s, time.backward_s


_Pair = tuple[MethodTime, MethodTime]


def _pairs(times: tuple[MethodTime, ...]) -> list[_Pair]:
    """Methods of forward and backward that go together."""
    return [
        (forward, backward)
        for forward, backward in itertools.product(times, repeat=2)
        if forward is backward or {forward.method, backward.method} <= set(INTERCHANGEABLE)
    ]


def _reason(ranked: list[_Pair], times: tuple[MethodTime, ...]) -> str:
    forward, backward = ranked[0]
    name = forward.method if forward is backward else f"{forward.method} forward and {backward.method} backward"
    mine = _Shares.of(forward, backward)
    won = f"{name}: {mine.total_s:.4g} s, of which {mine.exposed_s:.4g} s exposed communication"
    if mine.waiting_s:
        won += f" and {mine.waiting_s:.4g} s waiting for the host"
    others = [time for time in times if time is not forward and time is not backward]
    if not others:
        return f"{won}; no other method can run." if forward is backward else f"{won}; each is the faster one there."
    other = min(others, key=lambda time: time.total_s)
    theirs = _Shares.of(other, other)
    behind = f"next is {other.method} with {theirs.total_s:.4g} s (+{theirs.total_s / mine.total_s - 1:.1%}"
    why = f"{theirs.exposed_s - mine.exposed_s:+.3g} s exposed, {theirs.compute_s - mine.compute_s:+.3g} s compute and copies"
    if mine.waiting_s or theirs.waiting_s:
        why += f", {theirs.waiting_s - mine.waiting_s:+.3g} s waiting for the host"
    return f"{won}; {behind}: {why})."


@dataclass(frozen=True)
class _Shares:
    """What the time of a forward and a backward is spent on; what is not compute or exposed waits for the host."""

    total_s: float
    compute_s: float
    exposed_s: float

    @classmethod
    def of(cls, forward: MethodTime, backward: MethodTime) -> _Shares:
        return cls(
            total_s=forward.forward_s + backward.backward_s,
            compute_s=forward.forward_compute_s + backward.backward_compute_s,
            exposed_s=forward.forward_exposed_s + backward.backward_exposed_s,
        )

    @property
    def waiting_s(self) -> float:
        waiting_s = self.total_s - self.compute_s - self.exposed_s
        # Sums of the same numbers in another order.
        return waiting_s if waiting_s > 1e-9 * self.total_s else 0.0
