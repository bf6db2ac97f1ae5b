"""Tiny batches: plan, integer program and bound against brute force over everything."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from planner import CostModel, InfeasibleError, plan_step, validate_plan
from planner.bounds import step_lower_bound_s
from planner.buckets import bucket_lengths
from planner.integer_program import build_program, possible_slots, read_solution
from planner.portfolio import search_beyond_tiny
from planner.problem import make_problem
from planner.solver import SolveLimits, solve

from .planner_cases import brute_force_makespan, brute_force_step, cost_models, make_model, unhurried

LENGTHS = st.lists(st.integers(1, 12000), min_size=1, max_size=5)
RANKS = st.integers(1, 4)


def powers(num_ranks: int) -> list[int]:
    return [degree for degree in (1, 2, 4) if degree <= num_ranks]


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, num_ranks=RANKS, model=cost_models(), rule=st.sampled_from(["powers-of-two", "any"]))
def test_plan_of_a_tiny_batch_equals_brute_force_over_every_plan(
    lengths: list[int], num_ranks: int, model: CostModel, rule: str
) -> None:
    degrees = powers(num_ranks) if rule == "powers-of-two" else list(range(1, num_ranks + 1))
    expected_s = brute_force_step(lengths, num_ranks, model, degrees)
    if math.isinf(expected_s):
        with pytest.raises(InfeasibleError):
            plan_step(lengths, num_ranks, model, degrees=rule)
        return
    plan = plan_step(lengths, num_ranks, model, degrees=rule)
    assert plan.predicted_step_time_s == pytest.approx(expected_s, rel=1e-12)
    assert plan.outcome == "optimal"
    assert validate_plan(plan, lengths, model) == []


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, num_ranks=RANKS, model=cost_models())
def test_bound_is_below_the_best_plan_and_the_heuristics_are_not(
    lengths: list[int], num_ranks: int, model: CostModel
) -> None:
    best_s = brute_force_step(lengths, num_ranks, model, powers(num_ranks))
    assume(math.isfinite(best_s))
    problem = make_problem(lengths, num_ranks, model, None, "powers-of-two")
    assert step_lower_bound_s(problem) <= best_s
    result = search_beyond_tiny(problem, unhurried(), ("HiGHS",))
    assert problem.step_time_s(result.draft) >= best_s * (1 - 1e-12)
    assert result.lower_bound_s <= best_s
    assert not result.exact


@pytest.mark.parametrize("solver", ["HiGHS", "CBC"])
def test_integer_program_of_one_micro_batch_equals_brute_force(solver: str) -> None:
    cases = [
        ([9000, 5000, 5000, 200, 100], 4, make_model()),
        ([12000, 300, 300, 300], 3, make_model(memory_limit_bytes=1e9)),
        ([7000, 6500, 6000, 5500, 10], 4, make_model(b2_s=0.0, communication_s=())),
        ([1, 1, 1, 1, 1], 2, make_model()),
        ([9000, 1000], 2, make_model()),
        ([4000], 1, make_model()),
    ]
    for lengths, num_ranks, model in cases:
        expected_s = brute_force_makespan(lengths, num_ranks, model, powers(num_ranks))
        problem = make_problem(lengths, num_ranks, model, None, "powers-of-two")
        bucketing = bucket_lengths(lengths, len(lengths))
        slots = possible_slots(problem, len(lengths))
        outcome = solve(
            build_program(problem, bucketing, slots, scale_s=expected_s), limits=SolveLimits(), solvers=[solver]
        )
        assert outcome.solver == solver
        assert outcome.status == "optimal"
        assert outcome.objective == pytest.approx(1.0, rel=1e-5)
        micro_batch = read_solution(outcome.values, bucketing, slots, range(len(lengths)))
        assert micro_batch is not None
        assert problem.makespan_s(micro_batch) == pytest.approx(expected_s, rel=1e-5)


@settings(max_examples=25, deadline=None)
@given(lengths=LENGTHS, num_ranks=RANKS, model=cost_models())
def test_integer_program_equals_brute_force_on_random_micro_batches(
    lengths: list[int], num_ranks: int, model: CostModel
) -> None:
    assume(model.max_tokens(1, num_ranks) > 0 and model.b1_s + model.a2_s_per_token > 1e-6)
    expected_s = brute_force_makespan(lengths, num_ranks, model, powers(num_ranks))
    problem = make_problem(lengths, num_ranks, model, None, "powers-of-two")
    bucketing = bucket_lengths(lengths, len(lengths))
    slots = possible_slots(problem, len(lengths))
    scale_s = expected_s if math.isfinite(expected_s) else 1.0
    program = build_program(problem, bucketing, slots, scale_s=scale_s)
    outcome = solve(program, limits=SolveLimits(), solvers=["HiGHS"])
    if math.isinf(expected_s):
        assert outcome.status == "infeasible"
        assert outcome.values == {}
        return
    assert outcome.status == "optimal"
    assert outcome.objective == pytest.approx(1.0, rel=1e-5)


def test_two_micro_batches_win_where_one_would_need_a_slow_shape() -> None:
    # Alone at degree 4 the long one shares its quadratic part; beside the short ones it could not.
    model = make_model(b1_s=0.0, b2_s=0.0, communication_s=(), memory_limit_bytes=1e9, a1_s_per_token2=1e-6)
    lengths = [10000, 100, 100, 100, 100]
    plan = plan_step(lengths, 4, model)
    assert plan.predicted_step_time_s == pytest.approx(brute_force_step(lengths, 4, model, [1, 2, 4]), rel=1e-12)
    assert plan.outcome == "optimal"
