"""Why a plan takes as long as it does, and what other plans would take: `explain_plan`.

The parts are elsewhere: reasons in `planner.bottleneck`, long sequences in `planner.long_sequences`, changed conditions
in `planner.what_if`, synchronisation in `planner.sync_comparison`. Here they are put together and into words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from planner.cost_model import CostModel
from planner.errors import InfeasibleError
from planner.long_sequences import LongSequence, long_sequences
from planner.micro_batch_explanation import MicroBatchExplainer, MicroBatchExplanation, ranks_text
from planner.plan import StepPlan
from planner.recosting import PER_STEP, grouping_of, plan_cluster, schedule
from planner.replanning import Replanning, best_step_time_s
from planner.sync_comparison import SyncComparison
from planner.what_if import WhatIf, what_ifs


@dataclass(frozen=True)
class Alternative:
    """Another policy on the same batch; `time_s` is `None` where there is no plan, and `note` says why."""

    policy: str
    time_s: float | None
    note: str = ""


@dataclass(frozen=True)
class PlanExplanation:
    """The whole step.

    Attributes:
        plan_id: Of the plan.
        sync: Of the plan.
        step_time_s: Predicted time of the plan.
        lower_bound_s: No plan is predicted faster.
        gap: plan / bound - 1.
        outcome: ``"optimal"`` or ``"feasible"``.
        idle_share_by_rank: Share of the micro-batches' time in which each rank has no work, 0 to 1.
        end_by_rank_s: End of each rank's last group, counted from the start of the first micro-batch.
        micro_batches: One for each.
        long_sequences: The longest ones of the batch.
        what_ifs: Changed conditions; empty where they were not asked for.
        what_if_time_limit_s: Seconds of search of each of them; `None`: a limit of nodes instead, or not asked for.
        sync_comparison: Which synchronisation wins; `None` where not asked for or unknown.
        alternatives: Every static degree and the best degree for this batch.
    """

    plan_id: str
    sync: str
    step_time_s: float
    lower_bound_s: float
    gap: float
    outcome: str
    idle_share_by_rank: tuple[float, ...]
    end_by_rank_s: tuple[float, ...]
    micro_batches: tuple[MicroBatchExplanation, ...]
    long_sequences: tuple[LongSequence, ...]
    what_ifs: tuple[WhatIf, ...]
    what_if_time_limit_s: float | None
    sync_comparison: SyncComparison | None
    alternatives: tuple[Alternative, ...]

    @property
    def last_ranks(self) -> tuple[int, ...]:
        """Ranks whose last group ends last."""
        latest_s = max(self.end_by_rank_s)
        return tuple(rank for rank, end_s in enumerate(self.end_by_rank_s) if end_s >= latest_s * (1 - 1e-12))

    def summary_line(self) -> str:
        """Return the step time and what is proven of it."""
        proof = "proven optimal" if self.outcome == "optimal" else f"at most {self.gap:.1%} above the best plan"
        number = len(self.micro_batches)
        return (
            f"step {self.step_time_s:.4g} s, lower bound {self.lower_bound_s:.4g} s: {proof}; "
            f"{number} micro-batch{'es' if number != 1 else ''}, sync {self.sync}"
        )

    def rank_lines(self) -> list[str]:
        """Return who waits, and under per-step who ends last."""
        idle = self.idle_share_by_rank
        mean, most = sum(idle) / len(idle), max(idle)
        text = [f"idle share of the ranks: mean {mean:.1%}, most {most:.1%} (rank {idle.index(most)})"]
        if self.sync == PER_STEP:
            first, latest_s = min(self.end_by_rank_s), max(self.end_by_rank_s)
            text.append(
                f"ends last: {ranks_text(self.last_ranks)} after {latest_s:.4g} s; "
                f"rank {self.end_by_rank_s.index(first)} has ended after {first:.4g} s"
            )
        return text

    def what_if_heading(self) -> str:
        """Return how the what-ifs were found."""
        limit = self.what_if_time_limit_s
        searched = "a limited number of nodes" if limit is None else f"at most {limit:g} s"
        return f"what if (each planned again, searching {searched}; changes to the step of this plan):"

    def lines(self) -> list[str]:
        """Return the explanation as lines of text."""
        text = [self.summary_line()]
        for number, item in enumerate(self.micro_batches):
            text += item.lines(number)
        text += self.rank_lines()
        text += [item.line() for item in self.long_sequences]
        if self.what_ifs:
            text.append(self.what_if_heading())
        text += [f"  {row.line()}" for row in self.what_ifs]
        if self.sync_comparison is not None:
            text.append(f"sync: {self.sync_comparison.reason}")
        for other in self.alternatives:
            if other.time_s is None:
                text.append(f"{other.policy}: does not fit")
            else:
                ratio = f", {other.time_s / self.step_time_s:.2f}x this plan" if self.step_time_s > 0 else ""
                text.append(f"{other.policy}: {other.time_s:.4g} s{ratio}")
        return text

    def to_content(self) -> dict[str, Any]:
        """Return the JSON content: rows as data, and `lines`."""
        return {
            **dataclasses.asdict(self),
            "micro_batches": [item.to_content() for item in self.micro_batches],
            "last_ranks": self.last_ranks,
            "lines": self.lines(),
        }


def explain_plan(
    plan: StepPlan,
    lengths: Sequence[int],
    cost_model: CostModel,
    *,
    with_what_ifs: bool = True,
    what_if_time_limit_s: float = 1.0,
    node_limit: int | None = None,
    num_long_sequences: int = 5,
    on_progress: Callable[[str], None] | None = None,
) -> PlanExplanation:
    """Say what bounds each micro-batch, who waits, what long sequences cost and what would change that.

    Args:
        plan: A valid plan (see `validate_plan`).
        lengths: Tokens of every sequence of the batch.
        cost_model: The model the plan was made with.
        with_what_ifs: Plan again under changed conditions and without the longest sequence.
        what_if_time_limit_s: Seconds of search of each of those plans; there are about a dozen.
        node_limit: In place of that limit: equal inputs then give equal explanations.
        num_long_sequences: How many of the longest sequences are costed.
        on_progress: Called with what is planned next, for people.
    """
    progress = on_progress or (lambda what: None)
    cluster = plan_cluster(plan, cost_model)
    grouping = grouping_of(plan, cluster)
    timed = schedule(grouping, lengths, cost_model, plan.num_ranks, plan.sync)
    replanning = Replanning.like(plan, cost_model, time_limit_s=what_if_time_limit_s, node_limit=node_limit)

    def replanned_step_time_s(others: Sequence[int]) -> float | None:
        progress("without the longest sequence")
        try:
            other = replanning.plan(others, plan.num_ranks, cost_model, plan.cluster)
        except InfeasibleError:
            return None
        return best_step_time_s([other], others, cost_model, cluster, plan.sync)

    sequences = long_sequences(
        plan,
        lengths,
        cost_model,
        cluster,
        count=num_long_sequences,
        replanned_step_time_s=replanned_step_time_s if with_what_ifs else None,
    )
    changed = None
    if with_what_ifs:
        changed = what_ifs(
            plan,
            lengths,
            cost_model,
            time_limit_s=what_if_time_limit_s,
            node_limit=node_limit,
            on_progress=on_progress,
        )
    explainer = MicroBatchExplainer(plan, lengths, cost_model, cluster, grouping, timed, replanning.method(cost_model))
    end_s = timed.end_s
    return PlanExplanation(
        plan_id=plan.plan_id,
        sync=plan.sync,
        step_time_s=plan.predicted_step_time_s,
        lower_bound_s=plan.lower_bound_s,
        gap=plan.gap,
        outcome=plan.outcome,
        idle_share_by_rank=tuple(max(0.0, 1 - busy / end_s) if end_s > 0 else 0.0 for busy in timed.busy_by_rank_s),
        end_by_rank_s=timed.end_by_rank_s,
        micro_batches=tuple(explainer.explanation(m) for m in range(len(plan.micro_batches))),
        long_sequences=sequences,
        what_ifs=() if changed is None else changed.rows,
        what_if_time_limit_s=what_if_time_limit_s if with_what_ifs and node_limit is None else None,
        sync_comparison=None if changed is None else changed.sync,
        alternatives=_alternatives(plan, lengths, cost_model, replanning, progress),
    )


def _alternatives(
    plan: StepPlan,
    lengths: Sequence[int],
    cost_model: CostModel,
    replanning: Replanning,
    progress: Callable[[str], None],
) -> tuple[Alternative, ...]:
    methods = cost_model.attentions if replanning.attention is None else (replanning.attention,)
    powers = [1 << power for power in range(plan.num_ranks.bit_length())]
    allowed = [d for d in powers if any(cost_model.allows_degree(d, attention=name) for name in methods)]
    policies = [f"static:{degree}" for degree in allowed]
    found = []
    for policy in [*policies, "batch-adaptive"]:
        progress(policy)
        try:
            other = replanning.plan(lengths, plan.num_ranks, cost_model, plan.cluster, policy=policy)
        except InfeasibleError as error:
            found.append(Alternative(policy, None, str(error)))
        else:
            found.append(Alternative(policy, other.predicted_step_time_s))
    return tuple(found)
