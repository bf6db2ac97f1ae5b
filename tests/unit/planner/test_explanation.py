"""The explanation of a plan adds up and names what others would take."""

from __future__ import annotations

import pytest

from planner import explain_plan, plan_step

from .planner_cases import long_tail, make_model


def test_parts_idle_shares_and_alternatives_add_up() -> None:
    lengths, model = [*long_tail(30, seed=6, cap=8000), 20000], make_model()
    plan = plan_step(lengths, 4, model, node_limit=10)
    explanation = explain_plan(plan, lengths, model)
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
        explanation = explain_plan(plan_step(lengths, 4, model), lengths, model)
        assert expected in explanation.micro_batches[0].parts.largest


def test_proven_plan_is_called_optimal() -> None:
    lengths = [5000, 300]
    explanation = explain_plan(plan_step(lengths, 2, make_model()), lengths, make_model())
    assert explanation.gap == 0
    assert "proven optimal" in explanation.lines()[0]
