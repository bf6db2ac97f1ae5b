"""What each long sequence of a batch costs: the step without it, and its tokens beside those of the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from planner.cluster import Cluster
from planner.cost_model import CostModel
from planner.plan import StepPlan
from planner.recosting import Grouping, grouping_of, schedule, without


@dataclass(frozen=True)
class LongSequence:
    """One long sequence.

    Attributes:
        sequence: Its id.
        num_tokens: Its length.
        micro_batch: Where it runs.
        degree: Ranks of its group.
        time_s: What it adds to the time of its group.
        group_share: The share of that time, 0 to 1.
        saved_s: Predicted saving of the step without it, all others where they are.
        replanned_saved_s: The same, with all others planned again where that saves more; `None`: not planned.
        gpu_time_share: Its GPU seconds by those of all ranks over the step, 0 to 1.
        relative_cost_per_token: GPU seconds of one of its tokens, by the batch's mean; fixed costs are left out.
    """

    sequence: int
    num_tokens: int
    micro_batch: int
    degree: int
    time_s: float
    group_share: float
    saved_s: float
    replanned_saved_s: float | None
    gpu_time_share: float
    relative_cost_per_token: float

    def line(self) -> str:
        """Return the costs as a line of text."""
        again = "" if self.replanned_saved_s is None else f" ({self.replanned_saved_s:.4g} s planned again)"
        return (
            f"sequence {self.sequence} ({self.num_tokens:,} tokens, micro-batch {self.micro_batch}, degree {self.degree}): "
            f"{self.time_s:.4g} s, {self.group_share:.0%} of its group; without it the step saves {self.saved_s:.4g} s"
            f"{again}; {self.gpu_time_share:.1%} of all GPU time, {self.relative_cost_per_token:.2f}x the mean per token"
        )


def long_sequences(
    plan: StepPlan,
    lengths: Sequence[int],
    cost_model: CostModel,
    cluster: Cluster,
    *,
    count: int = 5,
    replanned_step_time_s: Callable[[Sequence[int]], float | None] | None = None,
) -> tuple[LongSequence, ...]:
    """Cost the longest sequences of a batch, the longest first.

    Args:
        plan: A valid plan.
        lengths: Tokens of every sequence.
        cost_model: The model it was made with.
        cluster: Its nodes.
        count: How many sequences.
        replanned_step_time_s: Plans other lengths and returns the predicted step, in seconds; asked once, for the
            batch without its longest sequence. `None`: that is left out.
    """
    grouping = grouping_of(plan, cluster)
    present = schedule(grouping, lengths, cost_model, plan.num_ranks, plan.sync)
    places = {i: (m, g) for m, groups in enumerate(grouping) for g, group in enumerate(groups) for i in group.sequences}
    mean_s = _gpu_s(grouping, lengths, cost_model) / sum(lengths)
    found: list[LongSequence] = []
    for sequence in sorted(places, key=lambda i: (-lengths[i], i))[:count]:
        m, g = places[sequence]
        kind = grouping[m][g].kind
        time_s = float(cost_model.sequence_times_s([lengths[sequence]], kind)[0])
        left = schedule(without(grouping, {sequence}), lengths, cost_model, plan.num_ranks, plan.sync)
        saved_s = present.step_time_s - left.step_time_s
        replanned_saved_s = None
        if not found and replanned_step_time_s is not None and len(lengths) > 1:
            other_s = replanned_step_time_s([*lengths[:sequence], *lengths[sequence + 1 :]])
            if other_s is not None:
                replanned_saved_s = max(saved_s, present.step_time_s - other_s)
        step_gpu_s = plan.num_ranks * present.step_time_s
        per_token_s = time_s * kind.degree / lengths[sequence]
        found.append(
            LongSequence(
                sequence=sequence,
                num_tokens=lengths[sequence],
                micro_batch=m,
                degree=kind.degree,
                time_s=time_s,
                group_share=time_s / present.times_s[m][g] if present.times_s[m][g] > 0 else 0.0,
                saved_s=saved_s,
                replanned_saved_s=replanned_saved_s,
                gpu_time_share=time_s * kind.degree / step_gpu_s if step_gpu_s > 0 else 0.0,
                relative_cost_per_token=per_token_s / mean_s if mean_s > 0 else 1.0,
            )
        )
    return tuple(found)


def _gpu_s(grouping: Grouping, lengths: Sequence[int], cost_model: CostModel) -> float:
    return math.fsum(
        group.kind.degree * math.fsum(cost_model.sequence_times_s([lengths[i] for i in group.sequences], group.kind))
        for micro_batch in grouping
        for group in micro_batch
    )
