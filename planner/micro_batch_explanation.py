"""Why one micro-batch takes as long as it does: its bottleneck, where that group's time goes, and the reasons."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from planner.bottleneck import BottleneckFacts, BottleneckReason, WiderGroup, bottleneck_reasons, largest_part
from planner.cluster import Cluster
from planner.cost_model import CostModel, GroupTimeParts
from planner.plan import GroupPlan, StepPlan
from planner.recosting import PER_LAYER, Grouping, PlacedGroup, Schedule
from planner.wider_group import placed_alone, wider_kinds

_NUM_LONGEST = 3


@dataclass(frozen=True)
class MicroBatchExplanation:
    """One micro-batch.

    Attributes:
        shape: ``(degree, number of groups)``, degrees descending.
        num_sequences: Sequences in it.
        num_tokens: Their tokens.
        start_s: When its bottleneck starts, counted from the first micro-batch.
        time_s: Time of the slowest group.
        bottleneck: The group that the step waits for: the slowest one; under per-step the one on the critical path.
        critical: The end of the step depends on it; under per-step not so in every micro-batch.
        spans_nodes: Its ranks are on different nodes.
        parts: Where its time goes.
        reasons: Why it takes that long, the first one limits most.
        longest_lengths: The longest sequences of the micro-batch, in tokens, descending.
        idle_share: Share of the ranks' time in which they wait if it runs alone, 0 to 1.
    """

    shape: tuple[tuple[int, int], ...]
    num_sequences: int
    num_tokens: int
    start_s: float
    time_s: float
    bottleneck: GroupPlan
    critical: bool
    spans_nodes: bool
    parts: GroupTimeParts
    reasons: tuple[BottleneckReason, ...]
    longest_lengths: tuple[int, ...]
    idle_share: float

    @property
    def largest_part(self) -> str:
        """Name of the largest part of the bottleneck's time, for people."""
        return largest_part(self.parts)

    def to_content(self) -> dict[str, Any]:
        """Return the JSON content."""
        parts = {**self.parts._asdict(), "total_s": self.parts.total_s, "largest": self.largest_part}
        return {**dataclasses.asdict(self), "parts": parts}

    def why(self) -> str:
        """Return the reasons as one line of text."""
        sentences = [reason.sentence for reason in self.reasons]
        return "; ".join(sentences if self.critical else ["the step does not wait for it", *sentences])

    def lines(self, number: int) -> list[str]:
        """Return the explanation as lines of text; `number` is its place in the step."""
        shape = " + ".join(f"{count}x{degree}" for degree, count in self.shape)
        group, parts, total_s = self.bottleneck, self.parts, self.parts.total_s
        longest = ", ".join(f"{length:,}" for length in self.longest_lengths)
        named = zip(("quadratic", "linear", "communication", "fixed"), parts, strict=True)
        shares = ", ".join(f"{name} {part_s / total_s:.0%}" for name, part_s in named) if total_s > 0 else "0 s"
        where = " between nodes" if self.spans_nodes else ""
        return [
            f"micro-batch {number}: {self.time_s:.4g} s, groups {shape} (count x degree), {self.num_sequences} sequences, "
            f"{self.num_tokens:,} tokens, longest {longest}, idle {self.idle_share:.1%}",
            f"  slowest: {ranks_text(group.ranks)}, degree {group.degree}{where}, {len(group.sequences)} sequences, "
            f"{group.num_tokens:,} tokens; mostly {self.largest_part} ({shares})",
            f"  why: {self.why()}",
        ]


@dataclass(frozen=True)
class MicroBatchExplainer:
    """What is known of a plan, for its micro-batches one by one; `attention` is the method in place of ``"local"``."""

    plan: StepPlan
    lengths: Sequence[int]
    cost_model: CostModel
    cluster: Cluster
    grouping: Grouping
    schedule: Schedule
    attention: str

    def explanation(self, m: int) -> MicroBatchExplanation:
        """Explain micro-batch `m`."""
        plan, groups, times = self.plan.micro_batches[m], self.grouping[m], self.schedule.times_s[m]
        slowest = max(range(len(groups)), key=times.__getitem__)
        at = self.schedule.critical.get(m, slowest)
        everything = sorted((self.lengths[i] for group in groups for i in group.sequences), reverse=True)
        used_s = sum(group.kind.degree * time_s for group, time_s in zip(groups, times, strict=True))
        offered_s = self.plan.num_ranks * times[slowest]
        parts = self.cost_model.time_parts(self._lengths(groups[at]), groups[at].kind, self.plan.sync)
        shape = Counter(group.kind.degree for group in groups)
        return MicroBatchExplanation(
            shape=tuple(sorted(shape.items(), reverse=True)),
            num_sequences=len(everything),
            num_tokens=sum(everything),
            start_s=self.schedule.starts_s[m][at],
            time_s=plan.predicted_time_s,
            bottleneck=plan.groups[at],
            critical=m in self.schedule.critical,
            spans_nodes=groups[at].kind.spans_nodes,
            parts=parts,
            reasons=bottleneck_reasons(self._facts(m, at, parts)),
            longest_lengths=tuple(everything[:_NUM_LONGEST]),
            idle_share=max(0.0, 1 - used_s / offered_s) if offered_s > 0 else 0.0,
        )

    def _facts(self, m: int, at: int, parts: GroupTimeParts) -> BottleneckFacts:
        groups, times = self.grouping[m], self.schedule.times_s[m]
        slowest, model = groups[at], self.cost_model
        tokens = self._lengths(slowest)
        others = [
            (group.kind.degree, time_s) for g, (group, time_s) in enumerate(zip(groups, times, strict=True)) if g != at
        ]
        earlier = None
        # Under per-step nobody waits for the others of a micro-batch: how even they are is no reason.
        meets = self.plan.sync == PER_LAYER
        if meets and others and times[at] > 0:
            mean_s = sum(degree * time_s for degree, time_s in others) / sum(degree for degree, _ in others)
            earlier = 1 - mean_s / times[at]
        longest = max(tokens)
        return BottleneckFacts(
            parts=parts,
            spans_nodes=slowest.kind.spans_nodes,
            longest_tokens=longest,
            longest_time_s=float(model.sequence_times_s([longest], slowest.kind)[0]),
            num_tokens=sum(tokens),
            max_tokens=model.kind_max_tokens(slowest.kind, self.plan.num_ranks, self.plan.sync),
            others_end_earlier=earlier,
            num_idle_ranks=self.plan.num_ranks - sum(group.kind.degree for group in groups) if meets else 0,
            num_ranks=self.plan.num_ranks,
            num_micro_batches=len(self.grouping),
            wider=self._wider(slowest, longest),
        )

    def _wider(self, group: PlacedGroup, longest: int) -> WiderGroup | None:
        model, sync = self.cost_model, self.plan.sync
        kinds = wider_kinds(group.kind, model, self.cluster, self.attention)
        wide = placed_alone(kinds, self.cluster)
        if wide is None:
            return None
        alone_s, wider_alone_s = (model.kind_time_s([longest], kind, sync) for kind in (group.kind, wide))
        return WiderGroup(wide.degree, alone_s, wider_alone_s)

    def _lengths(self, group: PlacedGroup) -> list[int]:
        return [self.lengths[i] for i in group.sequences]


def ranks_text(ranks: Sequence[int]) -> str:
    """Name ascending ranks: ``"ranks 0-7, 12"``."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    named = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"rank {named}" if len(ranks) == 1 else f"ranks {named}"
