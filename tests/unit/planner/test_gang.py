"""Per-step: gang schedules, their search, bound and memory, against brute force on tiny batches."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from planner import CostModel, InfeasibleError, PlanError, StepPlan, gang, plan_step, validate_plan
from planner.baselines import feasible_static_degrees
from planner.cluster import Cluster, Node
from planner.gang import search_beyond_tiny_gang
from planner.gang_bound import gang_bound, gang_floor_s
from planner.gang_schedule import GangGroup, gang_step_time_s, in_micro_batches, schedule
from planner.gang_starts import lanes_floor_s, static_lanes
from planner.gang_tables import GangState, GangTables
from planner.problem import make_problem
from planner.sync_choice import better_sync

from .planner_cases import cost_models, long_tail, make_model, set_partitions, unhurried


def per_step_model(**changes: Any) -> CostModel:
    return make_model(**{"unsharded_state_bytes": 1e6, "zero_traffic_s": 0.03, **changes})


def with_per_step(model: CostModel) -> CostModel:
    return dataclasses.replace(model, unsharded_state_bytes=1e6, zero_traffic_s=0.02)


def brute_force_per_step(lengths: Sequence[int], num_ranks: int, model: CostModel, degrees: Sequence[int]) -> float:
    """Least step over all splits into micro-batches in order, groups, degrees and ranks; infinite if none fits."""
    best = math.inf
    for blocks in set_partitions(list(lengths)):
        fitting = []
        for block in blocks:
            kinds = [(d, model.primary_kind(d)) for d in degrees]
            fitting.append(
                [
                    (d, model.kind_time_s(block, kind, "per-step"))
                    for d, kind in kinds
                    if model.kind_memory_bytes(sum(block), kind, num_ranks, "per-step") <= model.memory_limit_bytes
                ]
            )
        for chosen in itertools.product(*fitting):
            for order in itertools.permutations(chosen):
                for ends in every_placement(order, [0.0] * num_ranks):
                    best = min(best, max(ends))
    return best + model.step_fixed_s("per-step")


def every_placement(groups: Sequence[tuple[int, float]], ends: list[float]) -> Iterator[list[float]]:
    """Yield the ends of the ranks after groups in this order, for every choice of ranks."""
    if not groups:
        yield ends
        return
    (degree, time_s), rest = groups[0], groups[1:]
    for ranks in itertools.combinations(range(len(ends)), degree):
        end_s = max(ends[rank] for rank in ranks) + time_s
        yield from every_placement(rest, [end_s if r in ranks else e for r, e in enumerate(ends)])


def test_schedule_waits_for_ranks_so_the_largest_rank_sum_is_only_a_bound() -> None:
    result = schedule([[((0,), 10.0), ((1,), 1.0)], [((0, 1), 5.0)], [((0,), 1.0), ((1,), 10.0)]])
    assert result.last_end_s == 25.0
    assert result.starts_s == ((0.0, 0.0), (10.0,), (15.0, 15.0))
    assert result.ends_s == ((10.0, 1.0), (15.0,), (16.0, 25.0))


def test_micro_batches_keep_the_order_of_every_rank() -> None:
    groups = [GangGroup(0, (0, 1), (0,)), GangGroup(0, (0,), (1,)), GangGroup(0, (2,), (2,)), GangGroup(0, (0,), (3,))]
    plan = in_micro_batches(groups)
    assert [[group.sequences for group in groups] for groups in plan] == [[(0,), (2,)], [(1,)], [(3,)]]


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12000), min_size=1, max_size=4),
    num_ranks=st.integers(1, 3),
    model=cost_models().map(with_per_step),
    rule=st.sampled_from(["powers-of-two", "any"]),
)
def test_plan_of_a_tiny_batch_equals_brute_force_over_every_per_step_plan(
    lengths: list[int], num_ranks: int, model: CostModel, rule: str
) -> None:
    degrees = [d for d in (1, 2, 3) if d <= num_ranks and (rule == "any" or d != 3)]
    expected_s = brute_force_per_step(lengths, num_ranks, model, degrees)
    if math.isinf(expected_s):
        with pytest.raises(InfeasibleError):
            plan_step(lengths, num_ranks, model, degrees=rule, sync="per-step")
        return
    plan = plan_step(lengths, num_ranks, model, degrees=rule, sync="per-step")
    assert plan.predicted_step_time_s == pytest.approx(expected_s, rel=1e-12)
    assert plan.outcome == "optimal"
    assert validate_plan(plan, lengths, model) == []


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12000), min_size=1, max_size=4),
    num_ranks=st.integers(1, 3),
    model=cost_models().map(with_per_step),
)
def test_bounds_are_below_brute_force_and_the_search_beyond_tiny_batches_is_close(
    lengths: list[int], num_ranks: int, model: CostModel
) -> None:
    expected_s = brute_force_per_step(lengths, num_ranks, model, [d for d in (1, 2) if d <= num_ranks])
    assume(math.isfinite(expected_s))
    problem = make_problem(lengths, num_ranks, model, sync="per-step")
    assert gang_floor_s(problem) <= expected_s
    assert gang_bound(problem, 1.1 * expected_s, unhurried(), ("HiGHS",), None).bound_s <= expected_s
    result = search_beyond_tiny_gang(problem, unhurried(), ("HiGHS",))
    assert result.lower_bound_s <= expected_s
    assert not result.exact
    found_s = gang_step_time_s(problem, result.micro_batches)
    assert expected_s * (1 - 1e-12) <= found_s <= expected_s * 1.001


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12000), min_size=1, max_size=30),
    num_ranks=st.sampled_from([1, 3, 4, 6, 7, 8]),
    model=cost_models().map(with_per_step),
    rule=st.sampled_from(["powers-of-two", "any"]),
)
def test_plans_are_valid_and_between_the_bound_and_every_single_degree(
    lengths: list[int], num_ranks: int, model: CostModel, rule: str
) -> None:
    try:
        plan = plan_step(lengths, num_ranks, model, sync="per-step", degrees=rule, node_limit=2)
    except InfeasibleError:
        assume(False)
    assert validate_plan(plan, lengths, model) == []
    assert plan.lower_bound_s <= plan.predicted_step_time_s
    adaptive = plan_step(lengths, num_ranks, model, sync="per-step", degrees=rule, policy="batch-adaptive")
    assert validate_plan(adaptive, lengths, model) == []
    assert plan.predicted_step_time_s <= adaptive.predicted_step_time_s * (1 + 1e-12)
    degrees = range(1, num_ranks + 1) if rule == "any" else [d for d in (1, 2, 4, 8) if d <= num_ranks]
    for degree in degrees:
        try:
            static = plan_step(lengths, num_ranks, model, sync="per-step", degrees=rule, policy=f"static:{degree}")
        except InfeasibleError:
            continue
        assert validate_plan(static, lengths, model) == []
        assert adaptive.predicted_step_time_s <= static.predicted_step_time_s * (1 + 1e-12)


def micro_batches_of_ranks(plan: StepPlan) -> Counter[int]:
    return Counter(rank for micro_batch in plan.micro_batches for group in micro_batch.groups for rank in group.ranks)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9000), min_size=1, max_size=25), num_ranks=st.integers(1, 8), model=cost_models()
)
def test_lanes_of_a_degree_are_never_faster_than_their_floor(
    lengths: list[int], num_ranks: int, model: CostModel
) -> None:
    model = dataclasses.replace(model, unsharded_state_bytes=0.0)
    assume(model.max_tokens(num_ranks, num_ranks) >= max(lengths))
    tables = GangTables.of(make_problem(lengths, num_ranks, model, None, "any", sync="per-step"))
    for degree in feasible_static_degrees(tables.problem):
        _, step_time_s = static_lanes(tables, degree)
        assert lanes_floor_s(tables, degree) <= step_time_s * (1 + 1e-12)


def test_few_of_many_degrees_are_tried_before_the_clock_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def counted(tables: GangTables, degree: int) -> tuple[GangState, float]:
        tried.append(degree)
        return static_lanes(tables, degree)

    monkeypatch.setattr(gang, "static_lanes", counted)
    lengths, model = [200, 3000, 7000, 20000, 40000], make_model(b1_s=0.5, unsharded_state_bytes=0.0)
    plan = plan_step(lengths, 256, model, sync="per-step", degrees="any", attention="ring", time_limit_s=0.0)
    assert validate_plan(plan, lengths, model) == []
    assert len(tried) < 20


def test_ranks_have_unequal_numbers_of_micro_batches_where_that_pays() -> None:
    # The long ones fill a rank's time, the short ones its memory.
    model = per_step_model(a1_s_per_token2=1e-7, b1_s=0.1, zero_traffic_s=0.0, communication_s=((2, 1e-2),))
    lengths = [9000] * 2 + [3000] * 12
    per_layer = plan_step(lengths, 4, model, node_limit=20)
    for policy in ("static:1", "batch-adaptive", "adaptive"):
        plan = plan_step(lengths, 4, model, sync="per-step", policy=policy, node_limit=20)
        counts = micro_batches_of_ranks(plan)
        assert min(counts.values()) < max(counts.values())
        assert plan.predicted_step_time_s < per_layer.predicted_step_time_s * 0.9


def test_per_step_is_refused_where_its_memory_is_unknown_or_too_much() -> None:
    with pytest.raises(PlanError, match="unsharded_state_bytes"):
        plan_step([100, 200], 2, make_model(), sync="per-step")
    with pytest.raises(InfeasibleError, match="per-step"):
        plan_step([100, 200], 2, per_step_model(unsharded_state_bytes=3e7), sync="per-step")
    with pytest.raises(InfeasibleError, match="sequence 1"):
        plan_step([100, 9000], 1, per_step_model(unsharded_state_bytes=1e7), sync="per-step", policy="static:1")


def test_unsharded_states_take_memory_from_sequences() -> None:
    lengths = long_tail(40, 3, cap=9000)
    small = plan_step(lengths, 4, per_step_model(), sync="per-step", node_limit=3)
    large = plan_step(lengths, 4, per_step_model(unsharded_state_bytes=1e7), sync="per-step", node_limit=3)
    held = [g.num_tokens / g.degree * 2000 for m in large.micro_batches for g in m.groups]
    assert max(held) <= 2e7 - 1e6 / 4 - 1e7 + 1
    assert large.predicted_step_time_s > small.predicted_step_time_s


def test_equal_inputs_give_equal_plans_with_a_node_limit() -> None:
    lengths = long_tail(60, 5)
    model = per_step_model()
    one, two = (
        plan_step(lengths, 8, model, sync="per-step", node_limit=3, seed=7, num_threads=threads) for threads in (1, 2)
    )
    assert one.plan_id == two.plan_id
    assert validate_plan(one, lengths, model) == []


def test_nodes_of_different_size_speed_and_memory_get_valid_plans() -> None:
    cluster = Cluster((Node(3, 1.0, 2e7), Node(2, 0.5, 3e7), Node(4, 1.0, 2e7)))
    model = per_step_model()
    lengths = long_tail(40, 9, cap=20000)
    plan = plan_step(lengths, 9, model, sync="per-step", cluster=cluster, node_limit=3)
    floor = plan_step(lengths, 9, model, sync="per-step", cluster=cluster, policy="batch-adaptive")
    assert validate_plan(plan, lengths, model, cluster) == []
    assert validate_plan(floor, lengths, model, cluster) == []
    assert plan.lower_bound_s <= plan.predicted_step_time_s <= floor.predicted_step_time_s * (1 + 1e-12)


def test_the_clock_ends_the_search_and_the_first_plan_comes_at_once() -> None:
    told: list[StepPlan] = []
    lengths = long_tail(100, 11)
    model = per_step_model()
    plan = plan_step(lengths, 8, model, sync="per-step", time_limit_s=0.3, on_incumbent=told.append)
    assert told
    assert told[-1].predicted_step_time_s >= plan.predicted_step_time_s
    assert validate_plan(plan, lengths, model) == []
    at_once = plan_step(lengths, 8, model, sync="per-step", time_limit_s=0.0, solvers=())
    assert validate_plan(at_once, lengths, model) == []


def test_better_sync_weighs_traffic_saved_against_memory_lost() -> None:
    lengths = long_tail(40, 13, cap=9000)
    plan, other, reason = better_sync(lengths, 4, per_step_model(zero_traffic_s=0.1), node_limit=3, solvers=())
    assert (plan.sync, other is not None and other.sync) == ("per-step", "per-layer")
    assert "traffic" in reason
    plan, other, reason = better_sync(lengths, 4, per_step_model(unsharded_state_bytes=3e7), node_limit=3, solvers=())
    assert (plan.sync, other) == ("per-layer", None)
    assert "only one with a plan" in reason
    plan, other, reason = better_sync(lengths, 4, make_model(), node_limit=3, solvers=())
    assert (plan.sync, other) == ("per-layer", None)
    assert "unsharded_state_bytes" in reason
    crowded = per_step_model(unsharded_state_bytes=1.4e7, zero_traffic_s=0.0)
    plan, other, reason = better_sync(lengths, 4, crowded, node_limit=3, solvers=())
    assert plan.sync == "per-layer"
    assert other is not None
    assert "holds" in reason
