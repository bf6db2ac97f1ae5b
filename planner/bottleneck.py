"""Why the slowest group of a micro-batch takes as long as it does: `bottleneck_reasons`, a pure classification."""

from __future__ import annotations

from dataclasses import dataclass

from planner.cost_model import GroupTimeParts

LONGEST_SEQUENCE, COMMUNICATION, FIXED_COST, MEMORY = "longest-sequence", "communication", "fixed-cost", "memory"
IMBALANCE, IDLE_RANKS, COMPUTE = "imbalance", "idle-ranks", "compute"

_PART_NAMES = (
    "attention (quadratic compute)",
    "linear compute",
    "communication",
    "fixed cost per micro-batch",
)


@dataclass(frozen=True)
class Thresholds:
    """From which share on (0 to 1) something counts as a reason.

    Attributes:
        longest_sequence: Of the group's time that its longest sequence takes.
        communication: Of the group's time that is exposed communication.
        fixed_cost: Of the group's time that does not depend on its sequences.
        memory: Of the tokens that the group can hold.
        imbalance: Of the group's time that the other groups end earlier.
        idle_ranks: Of the ranks without a group.
    """

    longest_sequence: float = 0.75
    communication: float = 0.3
    fixed_cost: float = 0.3
    memory: float = 0.95
    imbalance: float = 0.1
    idle_ranks: float = 0.1


@dataclass(frozen=True)
class WiderGroup:
    """The longest sequence alone in a group of its degree and in one of twice that, in seconds."""

    degree: int
    alone_s: float
    wider_alone_s: float


@dataclass(frozen=True)
class BottleneckFacts:
    """What is known of the slowest group of a micro-batch.

    Attributes:
        parts: Where its time goes.
        spans_nodes: Its ranks are on different nodes.
        longest_tokens: Tokens of its longest sequence.
        longest_time_s: What that sequence adds to its time.
        num_tokens: Tokens of all its sequences.
        max_tokens: Tokens that it can hold.
        others_end_earlier: Mean over the ranks of the other groups of the share of the time that they end earlier;
            `None` where there is no other group, or none waits for it.
        num_idle_ranks: Ranks that wait without a group.
        num_ranks: Ranks of the job.
        num_micro_batches: Of the step.
        wider: `None` where no group of twice the degree is possible.
    """

    parts: GroupTimeParts
    spans_nodes: bool
    longest_tokens: int
    longest_time_s: float
    num_tokens: int
    max_tokens: int
    others_end_earlier: float | None
    num_idle_ranks: int
    num_ranks: int
    num_micro_batches: int
    wider: WiderGroup | None


@dataclass(frozen=True)
class BottleneckReason:
    """One reason: `name` for programs, `sentence` for people."""

    name: str
    sentence: str


def largest_part(parts: GroupTimeParts) -> str:
    """Name the largest part of a group's time, for people."""
    return max(zip(parts, _PART_NAMES, strict=True), key=lambda named: named[0])[1]


def bottleneck_reasons(facts: BottleneckFacts, thresholds: Thresholds | None = None) -> tuple[BottleneckReason, ...]:
    """Say why the slowest group takes as long as it does, and what would help.

    Args:
        facts: Of the group.
        thresholds: From where on something counts; `None`: the usual ones.

    Returns:
        At least one reason, that which limits most first: what no other grouping changes (the longest sequence), then
        costs beside compute, then memory, then how even the groups are. Plain compute where nothing else holds.
    """
    limits = thresholds or Thresholds()
    time_s = facts.parts.total_s
    found: list[BottleneckReason] = []
    if time_s <= 0:
        return (BottleneckReason(COMPUTE, "its time is predicted as 0 s"),)
    longest = facts.longest_time_s / time_s
    if longest >= limits.longest_sequence:
        found.append(BottleneckReason(LONGEST_SEQUENCE, _longest_sentence(facts, longest)))
    communication = facts.parts.communication_s / time_s
    if communication >= limits.communication:
        where, what = (
            ("between nodes", "groups inside a node or a faster network")
            if facts.spans_nodes
            else ("inside the node", "a smaller degree or a faster link")
        )
        found.append(
            BottleneckReason(COMMUNICATION, f"communication {where} is {communication:.0%}: {what} would help")
        )
    fixed = facts.parts.fixed_s / time_s
    if fixed >= limits.fixed_cost:
        what = (
            "fewer micro-batches would help"
            if facts.num_micro_batches > 1
            else "there is only one micro-batch, so only a larger batch spreads it"
        )
        found.append(BottleneckReason(FIXED_COST, f"fixed cost is {fixed:.0%}: {what}"))
    memory = facts.num_tokens / facts.max_tokens if facts.max_tokens > 0 else 1.0
    if memory >= limits.memory:
        sentence = (
            f"memory: {memory:.0%} of its capacity of {facts.max_tokens:,} tokens; more would allow smaller degrees or "
            "fewer micro-batches"
        )
        found.append(BottleneckReason(MEMORY, sentence))
    if facts.others_end_earlier is not None and facts.others_end_earlier >= limits.imbalance:
        sentence = f"imbalance: the other groups end {facts.others_end_earlier:.0%} earlier"
        found.append(BottleneckReason(IMBALANCE, sentence))
    if facts.num_idle_ranks >= limits.idle_ranks * facts.num_ranks and facts.num_idle_ranks:
        sentence = f"{facts.num_idle_ranks} of {facts.num_ranks} ranks have no group"
        found.append(BottleneckReason(IDLE_RANKS, sentence))
    if not found:
        compute = (facts.parts.quadratic_s + facts.parts.linear_s) / time_s
        sentence = (
            f"compute is {compute:.0%}, mostly {largest_part(facts.parts)}, and nothing else stands out: only fewer "
            "tokens or more GPUs help"
        )
        found.append(BottleneckReason(COMPUTE, sentence))
    return tuple(found)


def _longest_sentence(facts: BottleneckFacts, share: float) -> str:
    text = f"its longest sequence ({facts.longest_tokens:,} tokens) alone takes {share:.0%} of it: "
    wider = facts.wider
    if wider is None:
        return f"{text}only a larger degree would help, and none is possible"
    if wider.wider_alone_s < wider.alone_s:
        return (
            f"{text}only a larger degree helps (alone at degree {wider.degree}: {wider.wider_alone_s:.4g} s rather than "
            f"{wider.alone_s:.4g} s)"
        )
    return (
        f"{text}a larger degree does not help (alone at degree {wider.degree}: {wider.wider_alone_s:.4g} s rather than "
        f"{wider.alone_s:.4g} s), only a shorter sequence or faster links"
    )
