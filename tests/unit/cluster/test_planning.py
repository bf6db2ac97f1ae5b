"""Steps planned ahead: in order, each with a checked plan of its own batch, errors at the step they belong to; and what
of a plan each rank is told."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import planner
from planner import CostModel, CostModelReference, GroupPlan, InfeasibleError, MicroBatchPlan, StepPlan
from raysp.cluster import planning
from raysp.cluster.planning import PlanAhead, assign_work, plan_batch
from raysp.config import PlannerConfig
from raysp.data.loader import BatchLoader, Cursor, GlobalBatch
from raysp.errors import RayspError
from raysp.train.work import GroupWork, StepWork

_MODEL = CostModel(
    name="test",
    a1_s_per_token2=2e-9,
    a2_s_per_token=4e-6,
    b1_s=0.02,
    bytes_per_token=2000.0,
    model_state_bytes_total=1e6,
    memory_limit_bytes=2e7,
    attention="ring",
)


def _ahead(lengths: list[int], *, num_steps: int, sequences_per_step: int = 4, **config: Any) -> PlanAhead:
    loader = BatchLoader(list(range(len(lengths))), lengths, seed=0, sequences_per_step=sequences_per_step)
    return PlanAhead(
        loader,
        config=PlannerConfig(**{"node_limit": 1, **config}),
        cost_model=_MODEL,
        num_ranks=4,
        seed=0,
        first_step=2,
        num_steps=num_steps,
        cursor=Cursor(),
    )


def test_steps_come_in_order_with_plans_of_their_batches() -> None:
    lengths = [300, 9000, 40, 500, 12000, 700, 80, 90, 1000]
    with _ahead(lengths, num_steps=6) as steps:
        planned = list(steps)
    assert [item.step for item in planned] == [2, 3, 4, 5]
    for item in planned:
        own = plan_batch(
            item.batch.lengths,
            config=PlannerConfig(node_limit=1),
            cost_model=_MODEL,
            num_ranks=4,
            seed=0,
            policy="adaptive",
        )
        assert item.plan.plan_id == own.plan_id
        assert item.source == "planned"
        assert item.plan_wait_s > 0


def test_repeated_batch_comes_from_the_cache() -> None:
    with _ahead([300, 9000, 40, 500], num_steps=6) as steps:
        assert [item.source for item in steps] == ["planned", "cache", "cache", "cache"]


def test_error_is_raised_by_the_step_it_belongs_to() -> None:
    lengths = [10**6, 300, 9000, 40]
    loader = BatchLoader(list(range(4)), lengths, seed=0, sequences_per_step=1)
    bad = [loader.batch_at(Cursor(0, i)).lengths for i in range(4)].index((10**6,))
    assert bad > 0
    with _ahead(lengths, num_steps=6, sequences_per_step=1, lookahead_steps=4) as ahead:
        steps = iter(ahead)
        assert [next(steps).step for _ in range(bad)] == [2 + i for i in range(bad)]
        with pytest.raises(InfeasibleError):
            next(steps)


def test_plan_that_the_validator_refuses_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert planning.validate_plan is planner.validate_plan
    monkeypatch.setattr(planning, "validate_plan", lambda *_: ["group 0 is wrong"])
    with _ahead([300, 9000], num_steps=3) as steps, pytest.raises(RayspError, match="group 0 is wrong"):
        next(iter(steps))


def test_deadline_and_processes_are_numbers_above_zero() -> None:
    assert PlannerConfig(deadline_s=1, processes=2).deadline_s == 1.0
    with pytest.raises(ValueError, match="deadline_s"):
        PlannerConfig(deadline_s=0.0)


def test_refitted_cost_model_plans_the_steps_that_are_not_yet_in_the_background() -> None:
    lengths = [300, 9000, 40, 500, 12000, 700, 80, 90, 1000]
    slower = dataclasses.replace(_MODEL, a2_s_per_token=2 * _MODEL.a2_s_per_token)
    with _ahead(lengths, num_steps=7, lookahead_steps=2) as ahead:
        steps = iter(ahead)
        used = [next(steps).plan.cost_model.sha256]
        ahead.use_cost_model(slower)
        used += [item.plan.cost_model.sha256 for item in steps]
    # Two were submitted before, and one more when the first was taken.
    assert used == [_MODEL.sha256] * 3 + [slower.sha256] * 2


def test_ranks_are_told_sync_and_recompute_and_where_they_have_no_group() -> None:
    def group(ranks: tuple[int, ...], sequence: int, recompute: str) -> GroupPlan:
        attention = "ring" if len(ranks) > 1 else "local"
        return GroupPlan(ranks, len(ranks), attention, (sequence,), 10 + sequence, 1.0, 1, recompute)

    plan = StepPlan(
        plan_id="",
        num_ranks=3,
        num_sequences=2,
        sync="per-step",
        cost_model=CostModelReference("test", "0"),
        micro_batches=(
            MicroBatchPlan(1.0, (group((0, 1), 0, "full"),)),
            MicroBatchPlan(1.0, (group((1,), 1, "default"),)),
        ),
        predicted_step_time_s=2.0,
        lower_bound_s=1.0,
        outcome="feasible",
        solve_time_s=0.0,
    )
    batch = GlobalBatch(sequence_ids=(70, 80), lengths=(10, 11), next_cursor=Cursor())
    shared = GroupWork((0, 1), "ring", (70,), (10,), "full")
    alone = GroupWork((1,), "local", (80,), (11,), "default")
    assert assign_work(plan, batch, step=5, num_ranks=3) == [
        StepWork(5, (shared, None), "per-step"),
        StepWork(5, (shared, alone), "per-step"),
        StepWork(5, (None, None), "per-step"),
    ]
