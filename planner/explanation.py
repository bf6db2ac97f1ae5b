"""Why a plan takes as long as it does, and what other plans would take: `explain_plan`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from planner.cost_model import CostModel
from planner.errors import InfeasibleError
from planner.plan import GroupPlan, MicroBatchPlan, StepPlan
from planner.planning import plan_step

_NUM_LONGEST = 3


@dataclass(frozen=True)
class TimeParts:
    """Where the time of a group goes, in seconds."""

    quadratic_s: float
    linear_s: float
    communication_s: float
    fixed_s: float

    @property
    def total_s(self) -> float:
        """The group's predicted time."""
        return self.quadratic_s + self.linear_s + self.communication_s + self.fixed_s

    @property
    def largest(self) -> str:
        """Name of the largest part, for people."""
        named = {
            "attention (quadratic compute)": self.quadratic_s,
            "linear compute": self.linear_s,
            "communication": self.communication_s,
            "fixed cost per micro-batch": self.fixed_s,
        }
        return max(named, key=lambda name: named[name])


@dataclass(frozen=True)
class MicroBatchExplanation:
    """One micro-batch.

    Attributes:
        shape: ``(degree, number of groups)``, degrees descending.
        num_sequences: Sequences in it.
        num_tokens: Their tokens.
        time_s: Time of the slowest group.
        bottleneck: The slowest group.
        parts: Where its time goes.
        longest_lengths: The longest sequences of the micro-batch, in tokens, descending.
        idle_share: Share of the ranks' time in which they wait, 0 to 1.
    """

    shape: tuple[tuple[int, int], ...]
    num_sequences: int
    num_tokens: int
    time_s: float
    bottleneck: GroupPlan
    parts: TimeParts
    longest_lengths: tuple[int, ...]
    idle_share: float


@dataclass(frozen=True)
class Alternative:
    """Another policy on the same batch; `time_s` is `None` where the batch does not fit."""

    policy: str
    time_s: float | None


@dataclass(frozen=True)
class PlanExplanation:
    """The whole step.

    Attributes:
        step_time_s: Predicted time of the plan.
        lower_bound_s: No plan is predicted faster.
        gap: plan / bound - 1.
        outcome: ``"optimal"`` or ``"feasible"``.
        idle_share_by_rank: Share of the micro-batches' time in which each rank has no work, 0 to 1.
        micro_batches: One for each.
        alternatives: Every static degree and the best degree for this batch.
    """

    step_time_s: float
    lower_bound_s: float
    gap: float
    outcome: str
    idle_share_by_rank: tuple[float, ...]
    micro_batches: tuple[MicroBatchExplanation, ...]
    alternatives: tuple[Alternative, ...]

    def lines(self) -> list[str]:
        """Return the explanation as lines of text."""
        proof = "proven optimal" if self.outcome == "optimal" else f"at most {self.gap:.1%} above the best plan"
        text = [f"step {self.step_time_s:.4g} s, lower bound {self.lower_bound_s:.4g} s: {proof}"]
        for number, item in enumerate(self.micro_batches):
            text += _micro_batch_lines(number, item)
        idle = self.idle_share_by_rank
        mean, most = sum(idle) / len(idle), max(idle)
        text.append(f"idle share of the ranks: mean {mean:.1%}, most {most:.1%} (rank {idle.index(most)})")
        for other in self.alternatives:
            if other.time_s is None:
                text.append(f"{other.policy}: does not fit")
            else:
                text.append(f"{other.policy}: {other.time_s:.4g} s, {other.time_s / self.step_time_s:.2f}x this plan")
        return text


def explain_plan(plan: StepPlan, lengths: Sequence[int], cost_model: CostModel) -> PlanExplanation:
    """Say what bounds each micro-batch, who waits, and what other policies would take on the same batch.

    Args:
        plan: A valid plan (see `validate_plan`).
        lengths: Tokens of every sequence of the batch.
        cost_model: The model the plan was made with.
    """
    busy_s = [0.0] * plan.num_ranks
    for micro_batch in plan.micro_batches:
        for group in micro_batch.groups:
            for rank in group.ranks:
                busy_s[rank] += group.predicted_time_s
    total_s = sum(micro_batch.predicted_time_s for micro_batch in plan.micro_batches)
    return PlanExplanation(
        step_time_s=plan.predicted_step_time_s,
        lower_bound_s=plan.lower_bound_s,
        gap=plan.gap,
        outcome=plan.outcome,
        idle_share_by_rank=tuple(max(0.0, 1 - busy / total_s) if total_s > 0 else 0.0 for busy in busy_s),
        micro_batches=tuple(_explained(m, lengths, cost_model, plan.num_ranks) for m in plan.micro_batches),
        alternatives=_alternatives(plan, lengths, cost_model),
    )


def _explained(
    micro_batch: MicroBatchPlan, lengths: Sequence[int], cost_model: CostModel, num_ranks: int
) -> MicroBatchExplanation:
    slowest = max(micro_batch.groups, key=lambda group: group.predicted_time_s)
    everything = sorted((lengths[i] for group in micro_batch.groups for i in group.sequences), reverse=True)
    shape = Counter(group.degree for group in micro_batch.groups)
    used_s = sum(group.degree * group.predicted_time_s for group in micro_batch.groups)
    offered_s = num_ranks * micro_batch.predicted_time_s
    return MicroBatchExplanation(
        shape=tuple(sorted(shape.items(), reverse=True)),
        num_sequences=len(everything),
        num_tokens=sum(everything),
        time_s=micro_batch.predicted_time_s,
        bottleneck=slowest,
        parts=_time_parts([lengths[i] for i in slowest.sequences], slowest.degree, cost_model),
        longest_lengths=tuple(everything[:_NUM_LONGEST]),
        idle_share=max(0.0, 1 - used_s / offered_s) if offered_s > 0 else 0.0,
    )


def _time_parts(lengths: Sequence[int], degree: int, cost_model: CostModel) -> TimeParts:
    tokens = sum(lengths)
    return TimeParts(
        quadratic_s=cost_model.a1_s_per_token2 * sum(s * s for s in lengths) / degree,
        linear_s=cost_model.a2_s_per_token * tokens / degree,
        communication_s=cost_model.communication_s_per_share(degree) * tokens / degree,
        fixed_s=cost_model.fixed_s(degree),
    )


def _alternatives(plan: StepPlan, lengths: Sequence[int], cost_model: CostModel) -> tuple[Alternative, ...]:
    methods = {group.attention for m in plan.micro_batches for group in m.groups if group.degree > 1}
    attention = min(methods) if methods else None
    method = cost_model.attention if attention is None else attention
    powers = [1 << power for power in range(plan.num_ranks.bit_length())]
    policies = [f"static:{degree}" for degree in powers if cost_model.allows_degree(degree, attention=method)]
    found = []
    for policy in [*policies, "batch-adaptive"]:
        try:
            other = plan_step(lengths, plan.num_ranks, cost_model, policy=policy, attention=attention)
        except InfeasibleError:
            found.append(Alternative(policy, None))
        else:
            found.append(Alternative(policy, other.predicted_step_time_s))
    return tuple(found)


def _micro_batch_lines(number: int, item: MicroBatchExplanation) -> list[str]:
    shape = " + ".join(f"{count}x{degree}" for degree, count in item.shape)
    group, parts = item.bottleneck, item.parts
    total_s = parts.total_s
    shares = (
        ""
        if total_s <= 0
        else (
            f" (quadratic {parts.quadratic_s / total_s:.0%}, linear {parts.linear_s / total_s:.0%}, "
            f"communication {parts.communication_s / total_s:.0%}, fixed {parts.fixed_s / total_s:.0%})"
        )
    )
    return [
        f"micro-batch {number}: {item.time_s:.4g} s, groups {shape} (count x degree), {item.num_sequences} sequences, "
        f"{item.num_tokens} tokens, longest {', '.join(map(str, item.longest_lengths))}, idle {item.idle_share:.1%}",
        f"  slowest: ranks {group.ranks[0]}-{group.ranks[-1]}, degree {group.degree}, {len(group.sequences)} "
        f"sequences, {group.num_tokens} tokens; mostly {parts.largest}{shares}",
    ]
