"""The explanation of a plan adds up and names what others would take."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from planner import Cluster, Node, PlanError, explain_plan, plan_step, validate_plan
from planner.bottleneck import BottleneckFacts, WiderGroup, bottleneck_reasons
from planner.cost_model import GroupTimeParts
from planner.micro_batch_explanation import ranks_text
from planner.plan import CostModelReference, GroupPlan, MicroBatchPlan, StepPlan

from .planner_cases import long_tail, make_model

FACTS = BottleneckFacts(
    parts=GroupTimeParts(5.0, 4.0, 0.5, 0.5),
    spans_nodes=False,
    longest_tokens=2000,
    longest_time_s=2.0,
    num_tokens=5000,
    max_tokens=10000,
    others_end_earlier=0.02,
    num_idle_ranks=0,
    num_ranks=8,
    num_micro_batches=3,
    wider=WiderGroup(8, 2.5, 1.4),
)


def unlike(**changes: Any) -> tuple[list[str], str]:
    """Names of the reasons of changed facts, and the first sentence."""
    reasons = bottleneck_reasons(dataclasses.replace(FACTS, **changes))
    return [reason.name for reason in reasons], reasons[0].sentence


def per_step_plan(micro_batches: list[list[tuple[tuple[int, ...], int]]]) -> tuple[StepPlan, list[int], Any]:
    """A plan in which a sequence of n tokens takes n seconds on each of its ranks, one sequence for each group."""
    model = make_model(
        a1_s_per_token2=0.0, a2_s_per_token=1.0, b1_s=0.0, b2_s=0.0, communication_s=(), unsharded_state_bytes=0.0
    )
    lengths: list[int] = []
    plans = []
    for micro_batch in micro_batches:
        groups = []
        for ranks, seconds in micro_batch:
            lengths.append(seconds * len(ranks))
            groups.append(
                GroupPlan(
                    ranks=ranks,
                    degree=len(ranks),
                    attention="ulysses" if len(ranks) > 1 else "local",
                    sequences=(len(lengths) - 1,),
                    num_tokens=lengths[-1],
                    predicted_time_s=float(seconds),
                    predicted_memory_bytes=round(model.state_bytes(2) + 2000 * seconds),
                )
            )
        plans.append(MicroBatchPlan(max(group.predicted_time_s for group in groups), tuple(groups)))
    free = [0.0, 0.0]
    for plan in plans:
        for group in plan.groups:
            end = max(free[rank] for rank in group.ranks) + group.predicted_time_s
            for rank in group.ranks:
                free[rank] = end
    made = StepPlan(
        plan_id="",
        num_ranks=2,
        num_sequences=len(lengths),
        sync="per-step",
        cost_model=CostModelReference(model.name, model.sha256),
        micro_batches=tuple(plans),
        predicted_step_time_s=max(free) + model.fixed_step_s,
        lower_bound_s=0.0,
        outcome="feasible",
        solve_time_s=0.0,
    ).with_plan_id()
    assert validate_plan(made, lengths, model) == []
    return made, lengths, model


def test_parts_idle_shares_and_alternatives_add_up() -> None:
    lengths, model = [*long_tail(30, seed=6, cap=8000), 20000], make_model()
    plan = plan_step(lengths, 4, model, time_limit_s=0.1)
    explanation = explain_plan(plan, lengths, model, with_what_ifs=False)
    assert len(explanation.micro_batches) == len(plan.micro_batches)
    for item, micro_batch in zip(explanation.micro_batches, plan.micro_batches, strict=True):
        assert item.parts.total_s == pytest.approx(micro_batch.predicted_time_s)
        assert item.time_s == max(group.predicted_time_s for group in micro_batch.groups)
        assert sum(count for _, count in item.shape) == len(micro_batch.groups)
        assert item.num_tokens == sum(group.num_tokens for group in micro_batch.groups)
        assert list(item.longest_lengths) == sorted(item.longest_lengths, reverse=True)
        assert 0 <= item.idle_share < 1
    assert len(explanation.idle_share_by_rank) == 4
    total_s = sum(m.predicted_time_s for m in plan.micro_batches)
    idle = sum(m.idle_share * m.time_s for m in explanation.micro_batches) / total_s
    assert sum(explanation.idle_share_by_rank) / 4 == pytest.approx(idle)
    alternatives = {other.policy: other.time_s for other in explanation.alternatives}
    assert set(alternatives) == {"static:1", "static:2", "static:4", "batch-adaptive"}
    assert alternatives["static:1"] is None
    fitting = [time_s for time_s in alternatives.values() if time_s is not None]
    assert min(fitting) == alternatives["batch-adaptive"] >= plan.predicted_step_time_s
    text = "\n".join(explanation.lines())
    assert "static:1: does not fit" in text
    assert "micro-batch 0:" in text
    assert "idle share of the ranks" in text


def test_largest_part_is_named() -> None:
    long, short = [20000], [1]
    model = make_model()
    for lengths, expected in [(long, "quadratic"), (short, "fixed")]:
        explanation = explain_plan(plan_step(lengths, 4, model), lengths, model, with_what_ifs=False)
        assert expected in explanation.micro_batches[0].largest_part


def test_proven_plan_is_called_optimal() -> None:
    lengths = [5000, 300]
    explanation = explain_plan(plan_step(lengths, 2, make_model()), lengths, make_model(), with_what_ifs=False)
    assert explanation.gap == 0
    assert "proven optimal" in explanation.lines()[0]


def test_plain_compute_is_the_reason_where_nothing_stands_out() -> None:
    names, sentence = unlike()
    assert names == ["compute"]
    assert "compute is 90%, mostly attention" in sentence


@pytest.mark.parametrize(
    ("changes", "name", "text"),
    [
        (
            {"longest_time_s": 9.6},
            "longest-sequence",
            "(2,000 tokens) alone takes 96% of it: only a larger degree helps",
        ),
        (
            {"longest_time_s": 9.6, "wider": WiderGroup(8, 2.5, 3.0)},
            "longest-sequence",
            "a larger degree does not help",
        ),
        ({"longest_time_s": 9.6, "wider": None}, "longest-sequence", "and none is possible"),
        ({"parts": GroupTimeParts(2, 2, 5.5, 0.5), "spans_nodes": True}, "communication", "between nodes is 55%"),
        ({"parts": GroupTimeParts(2, 2, 5.5, 0.5)}, "communication", "inside the node is 55%"),
        ({"parts": GroupTimeParts(3, 3, 0, 4)}, "fixed-cost", "fixed cost is 40%: fewer micro-batches would help"),
        ({"parts": GroupTimeParts(3, 3, 0, 4), "num_micro_batches": 1}, "fixed-cost", "only a larger batch"),
        ({"num_tokens": 9900}, "memory", "memory: 99% of its capacity of 10,000 tokens"),
        ({"others_end_earlier": 0.12}, "imbalance", "imbalance: the other groups end 12% earlier"),
        ({"num_idle_ranks": 4, "others_end_earlier": None}, "idle-ranks", "4 of 8 ranks have no group"),
        ({"parts": GroupTimeParts(0, 0, 0, 0)}, "compute", "0 s"),
    ],
)
def test_each_reason_is_named(changes: dict[str, Any], name: str, text: str) -> None:
    names, sentence = unlike(**changes)
    assert names == [name]
    assert text in sentence


def test_reasons_are_ordered_and_thresholds_include_their_value() -> None:
    names, _ = unlike(
        longest_time_s=7.5, parts=GroupTimeParts(4, 0, 3, 3), num_tokens=9500, others_end_earlier=0.1, num_idle_ranks=1
    )
    assert names == ["longest-sequence", "communication", "fixed-cost", "memory", "imbalance", "idle-ranks"]
    names, _ = unlike(longest_time_s=7.4, num_tokens=9499, others_end_earlier=0.099)
    assert names == ["compute"]


def test_long_sequence_bounds_its_group_and_what_it_costs() -> None:
    lengths, model = [20000, 900, 800, 700], make_model()
    plan = plan_step(lengths, 4, model, node_limit=5)
    explanation = explain_plan(plan, lengths, model, node_limit=5, num_long_sequences=3)
    longest = explanation.long_sequences[0]
    assert [item.sequence for item in explanation.long_sequences] == [0, 1, 2]
    assert (longest.num_tokens, longest.replanned_saved_s is not None) == (20000, True)
    assert 0 <= longest.saved_s <= (longest.replanned_saved_s or 0) < plan.predicted_step_time_s
    assert longest.relative_cost_per_token > 1 > explanation.long_sequences[2].relative_cost_per_token
    assert explanation.long_sequences[1].replanned_saved_s is None
    slowest = explanation.micro_batches[longest.micro_batch]
    assert slowest.reasons[0].name == "longest-sequence"
    assert "20,000 tokens" in slowest.reasons[0].sentence


def test_only_sequence_costs_all_but_the_fixed_part() -> None:
    lengths, model = [5000], make_model()
    plan = plan_step(lengths, 2, model, time_limit_s=0.05)
    (only,) = explain_plan(plan, lengths, model, with_what_ifs=False).long_sequences
    assert only.saved_s == pytest.approx(plan.predicted_step_time_s - model.fixed_step_s)
    assert only.replanned_saved_s is None
    assert only.relative_cost_per_token == pytest.approx(1.0)


def test_per_step_plan_names_the_ranks_that_end_last_and_its_chain() -> None:
    plan, lengths, model = per_step_plan([[((0,), 10), ((1,), 1)], [((1,), 2)], [((0,), 1), ((1,), 3)]])
    explanation = explain_plan(plan, lengths, model, what_if_time_limit_s=0.02)
    assert explanation.end_by_rank_s == (11.0, 6.0)
    assert explanation.last_ranks == (0,)
    assert explanation.idle_share_by_rank == (0.0, pytest.approx(5 / 11))
    # Rank 0 skips the second micro-batch, and in the third the step waits for it, not for the slowest group.
    assert [item.critical for item in explanation.micro_batches] == [True, False, True]
    assert explanation.micro_batches[2].bottleneck.ranks == (0,)
    assert explanation.micro_batches[2].start_s == 10.0
    text = "\n".join(explanation.lines())
    assert "ends last: rank 0 after 11 s; rank 1 has ended after 6 s" in text
    assert "the step does not wait for it" in text


def test_groups_across_slow_nodes_are_explained_with_their_true_kind() -> None:
    cluster = Cluster((Node(2), Node(2, speed=0.5)))
    model = make_model(between_nodes_s=((2, 1e-4), (4, 2e-4)))
    lengths = [20000, 3000, 500]
    plan = plan_step(lengths, 4, model, time_limit_s=0.05, cluster=cluster)
    assert plan.cluster == cluster
    explanation = explain_plan(plan, lengths, model, with_what_ifs=False)
    for item, micro_batch in zip(explanation.micro_batches, plan.micro_batches, strict=True):
        assert item.parts.total_s == pytest.approx(micro_batch.predicted_time_s)
    wide = next(item for item in explanation.micro_batches if item.bottleneck.degree == 4)
    assert wide.spans_nodes
    assert "communication between nodes" in wide.why()


def test_content_is_json_with_rows_and_lines() -> None:
    lengths, model = long_tail(5, seed=2, cap=8000), make_model()
    plan = plan_step(lengths, 4, model, node_limit=1)
    seen: list[str] = []
    explanation = explain_plan(plan, lengths, model, node_limit=1, on_progress=seen.append)
    content = json.loads(json.dumps(explanation.to_content(), allow_nan=False))
    assert (content["plan_id"], content["lines"]) == (plan.plan_id, explanation.lines())
    assert set(content["micro_batches"][0]["parts"]) >= {"quadratic_s", "fixed_s", "total_s"}
    assert content["micro_batches"][0]["reasons"][0]["name"]
    assert [row["name"] for row in content["what_ifs"]] == [row.name for row in explanation.what_ifs]
    assert content["long_sequences"][0]["num_tokens"] == max(lengths)
    assert {"without the longest sequence", "twice the memory", "static:1"} <= set(seen)
    again = explain_plan(plan, lengths, model, node_limit=1)
    assert again == explanation


def test_malformed_limit_is_refused_rather_than_shown_as_no_plan() -> None:
    lengths, model = [5000, 300], make_model()
    plan = plan_step(lengths, 2, model, time_limit_s=0.05)
    with pytest.raises(PlanError, match="node_limit"):
        explain_plan(plan, lengths, model, node_limit=-1)


def test_ranks_are_named_in_runs() -> None:
    assert ranks_text((3,)) == "rank 3"
    assert ranks_text((0, 1, 2, 5, 7, 8)) == "ranks 0-2, 5, 7-8"
