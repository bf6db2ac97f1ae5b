"""The searches beyond tiny batches: what more resources do, kinds of groups, clusters, solvers that fail, bounds."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import (
    Cluster,
    CostModel,
    MethodCost,
    Node,
    RecomputePolicy,
    StepPlan,
    load_preset,
    plan_step,
    validate_plan,
)
from planner import solver as solver_module
from planner.annealing import AnnealingSearch
from planner.annealing_starts import State, cut_state, tables_of, tight_state, with_part
from planner.bound_buckets import dual_feasible
from planner.budget import Budget
from planner.level_bound import level_bound
from planner.portfolio import search_beyond_tiny
from planner.problem import DraftGroup, make_problem
from planner.search_tables import SearchTables

from .planner_cases import brute_force_step, cost_models, long_tail, make_model

PRESET_7B = load_preset("flexsp-gpt7b-64xa100-40g")
BRIEF = Budget.start(0.0, node_limit=3, seed=0)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 12000), min_size=1, max_size=5), model=cost_models())
def test_more_gpus_or_memory_never_hurt_where_the_plan_is_optimal(lengths: list[int], model: CostModel) -> None:
    # Model states are sharded over the ranks, so more of them also free memory.
    if model.max_tokens(2, 2) < max(lengths):
        return
    plans = [plan_step(lengths, num_ranks, model) for num_ranks in (2, 3, 4)]
    roomier = plan_step(lengths, 2, dataclasses.replace(model, memory_limit_bytes=2 * model.memory_limit_bytes))
    assert {plan.outcome for plan in [*plans, roomier]} == {"optimal"}
    times = [plan.predicted_step_time_s for plan in plans]
    assert times[1] <= times[0] * (1 + 1e-12)
    assert times[2] <= times[1] * (1 + 1e-12)
    assert roomier.predicted_step_time_s <= times[0] * (1 + 1e-12)


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12000), min_size=2, max_size=5), num_ranks=st.integers(1, 4), model=cost_models()
)
def test_level_bound_is_below_the_best_of_all_plans(lengths: list[int], num_ranks: int, model: CostModel) -> None:
    if model.max_tokens(num_ranks, num_ranks) < max(lengths):
        return
    for rule in ("powers-of-two", "any"):
        degrees = [d for d in (1, 2, 3, 4) if d <= num_ranks and (rule == "any" or d != 3)]
        best_s = brute_force_step(lengths, num_ranks, model, degrees)
        if math.isinf(best_s):
            continue
        problem = make_problem(lengths, num_ranks, model, None, rule)
        incumbent = search_beyond_tiny(problem, BRIEF, ()).draft
        bound = level_bound(problem, incumbent, BRIEF, ("HiGHS",), None)
        assert bound.bound_s <= best_s * (1 + 1e-9)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([1, 2, 3, 50, 3000, 3001]), min_size=2, max_size=5),
    b1_s=st.sampled_from([0.0, 1e-12, 1e-5]),
    a1_s_per_token2=st.sampled_from([0.0, 1e-9, 1e-6]),
)
def test_level_bound_holds_without_fixed_costs_and_from_a_poor_plan(
    lengths: list[int], b1_s: float, a1_s_per_token2: float
) -> None:
    model = make_model(
        b1_s=b1_s, b2_s=0.0, a1_s_per_token2=a1_s_per_token2, communication_s=((2, 1e-4),), memory_limit_bytes=1e7
    )
    best_s = brute_force_step(lengths, 4, model, [1, 2, 4])
    problem = make_problem(lengths, 4, model)
    one_by_one = tuple((DraftGroup(0, (i,)),) for i in range(len(lengths)))
    bound = level_bound(problem, one_by_one, BRIEF, ("HiGHS",), None)
    assert bound.bound_s <= best_s * (1 + 1e-9)


def test_level_bound_with_merged_degrees_stays_below_the_plan() -> None:
    lengths = long_tail(60, seed=9)
    problem = make_problem(lengths, 40, make_model(), "ring", "any")
    assert len(problem.kinds) > 16
    result = search_beyond_tiny(problem, BRIEF, ("HiGHS",))
    assert 0 < result.lower_bound_s <= problem.step_time_s(result.draft)


@given(st.lists(st.floats(0.01, 1.0), min_size=1, max_size=8))
def test_dual_feasible_values_of_whatever_fits_a_bin_sum_to_at_most_one(shares: list[float]) -> None:
    shares = [*shares, 1 / 7, 1 / 7 * (1 - 2e-10), 0.5]
    chosen: list[int] = []
    for place, share in enumerate(shares):
        if sum(shares[i] for i in chosen) + share <= 1:
            chosen.append(place)
    for values in dual_feasible(np.asarray(shares)):
        assert float(values[chosen].sum()) <= 1 + 1e-9


def test_the_plan_of_a_long_tail_is_close_to_its_bound_and_far_below_one_degree() -> None:
    lengths = long_tail(256, seed=0, median=2000, sigma=1.6, cap=131072)
    plan = plan_step(lengths, 64, PRESET_7B, time_limit_s=3.0)
    single = plan_step(lengths, 64, PRESET_7B, policy="batch-adaptive")
    assert validate_plan(plan, lengths, PRESET_7B) == []
    assert plan.predicted_step_time_s < 0.85 * single.predicted_step_time_s
    assert 0 < plan.lower_bound_s <= plan.predicted_step_time_s


def test_plans_do_not_depend_on_threads_where_nodes_are_counted() -> None:
    lengths = long_tail(60, seed=4)
    one, two = (plan_step(lengths, 8, make_model(), node_limit=2, num_threads=n) for n in (1, 2))
    assert one.plan_id == two.plan_id


def test_first_incumbents_are_valid_and_the_answer_is_none_of_the_worse() -> None:
    lengths = long_tail(80, seed=6)
    told: list[StepPlan] = []
    plan = plan_step(lengths, 8, make_model(), time_limit_s=0.3, on_incumbent=told.append)
    assert told
    for incumbent in told:
        assert validate_plan(incumbent, lengths, make_model()) == []
        assert plan.predicted_step_time_s <= incumbent.predicted_step_time_s


@pytest.mark.parametrize("num_threads", [1, 2])
def test_solver_that_crashes_leaves_a_valid_plan_and_says_so(monkeypatch: pytest.MonkeyPatch, num_threads: int) -> None:
    def crash(*_: object) -> None:
        raise OSError("solver died")

    monkeypatch.setattr(solver_module, "_solve_highs", crash)
    monkeypatch.setattr(solver_module, "_solve_cbc", crash)
    lengths = long_tail(40, seed=2)
    plan = plan_step(lengths, 8, make_model(), time_limit_s=2.0, num_threads=num_threads)
    assert validate_plan(plan, lengths, make_model()) == []
    assert plan.outcome == "feasible"
    assert "solver died" in plan.reason


def test_unknown_solver_leaves_a_valid_plan_and_says_so() -> None:
    lengths = long_tail(40, seed=2)
    plan = plan_step(lengths, 8, make_model(), node_limit=2, solvers=("NoSuchSolver",))
    assert validate_plan(plan, lengths, make_model()) == []
    assert "NoSuchSolver" in plan.reason


def test_groups_choose_among_measured_methods() -> None:
    # Ring hides its exchange behind long sequences, Ulysses is cheaper for short ones.
    ring = MethodCost(name="ring", communication_s=((2, 4e-6), (4, 4e-6), (8, 4e-6)), overlap=1.0)
    model = make_model(methods=(ring,), communication_s=((2, 2e-6), (4, 2e-6), (8, 2e-6)))
    alone = {}
    for length in (12000, 28000):
        plan = plan_step([length], 8, model)
        alone[length] = plan.micro_batches[0].groups[0].attention
        assert validate_plan(plan, [length], model) == []
    assert alone[28000] == "ring"
    lengths = [28000, 27000, *[9500] * 12, *[400] * 30]
    both = plan_step(lengths, 8, model, node_limit=10)
    assert validate_plan(both, lengths, model) == []
    for method in ("ring", "ulysses"):
        one = plan_step(lengths, 8, model, node_limit=10, attention=method)
        assert both.predicted_step_time_s <= one.predicted_step_time_s * 1.01


def test_groups_choose_a_recompute_policy_where_memory_is_short() -> None:
    full = RecomputePolicy(name="full", bytes_per_token=400.0, compute_factor=1.33)
    model = make_model(recompute_policies=(full,))
    longest = make_model().max_tokens(8, 8) + 1000
    lengths = [longest, *long_tail(60, seed=1)]
    plan = plan_step(lengths, 8, model, node_limit=5)
    assert validate_plan(plan, lengths, model) == []
    holding = [group for m in plan.micro_batches for group in m.groups if 0 in group.sequences]
    assert [group.recompute for group in holding] == ["full"]
    assert StepPlan.from_json(plan.to_json()) == plan
    # Where nothing is short of memory, nobody pays for saving it.
    short = [500] * 16
    relaxed = plan_step(short, 8, model, node_limit=5)
    assert {group.recompute for m in relaxed.micro_batches for group in m.groups} == {"default"}


CLUSTERS = {
    "missing GPUs": Cluster((Node(7), Node(8), Node(5))),
    "six a node": Cluster((Node(6), Node(6))),
    "a slow node": Cluster((Node(4), Node(4, speed=0.6))),
    "a small node": Cluster((Node(4, memory_limit_bytes=4e7), Node(4, memory_limit_bytes=1e7))),
    "fast and small, slow and large": Cluster(
        (Node(4, speed=2.0, memory_limit_bytes=1e7), Node(4, memory_limit_bytes=4e7))
    ),
}


@pytest.mark.parametrize("degrees", ["powers-of-two", "any"])
@pytest.mark.parametrize("name", CLUSTERS)
def test_plans_fit_unequal_nodes_and_beat_single_degrees(name: str, degrees: str) -> None:
    cluster = CLUSTERS[name]
    model = make_model(between_nodes_s=((2, 8e-6), (4, 8e-6), (8, 9e-6)), gpus_per_node=4)
    lengths = [*long_tail(50, seed=3, cap=12000), 25000]
    arguments = {"attention": "ring", "degrees": degrees, "cluster": cluster, "node_limit": 2}
    plan = plan_step(lengths, cluster.num_ranks, model, **arguments)  # type: ignore[arg-type]
    assert validate_plan(plan, lengths, model) == []
    assert StepPlan.from_json(plan.to_json()) == plan
    assert plan.lower_bound_s <= plan.predicted_step_time_s
    single = plan_step(lengths, cluster.num_ranks, model, policy="batch-adaptive", **arguments)  # type: ignore[arg-type]
    assert validate_plan(single, lengths, model) == []
    assert plan.predicted_step_time_s <= single.predicted_step_time_s * (1 + 1e-12)


def test_the_fast_node_gets_more_tokens() -> None:
    cluster = Cluster((Node(4), Node(4, speed=0.5)))
    lengths = [700] * 96
    plan = plan_step(lengths, 8, make_model(communication_s=()), cluster=cluster, node_limit=10)
    tokens = [0, 0]
    for micro_batch in plan.micro_batches:
        for group in micro_batch.groups:
            for rank in group.ranks:
                tokens[cluster.node_of_rank(rank)] += group.num_tokens // group.degree
    assert tokens[0] > 1.3 * tokens[1]


def test_micro_batches_made_anew_keep_their_sequences_and_leave_the_others_alone() -> None:
    lengths = long_tail(80, seed=5)
    problem = make_problem(lengths, 8, make_model())
    tables, random = SearchTables.of(problem), np.random.default_rng(0)
    before = cut_state(problem, tables, 4, random)
    batches = np.asarray([1, 3])
    members = np.flatnonzero(np.isin(before.batch[before.assign], batches))
    part = tight_state(problem, tables_of(tables, members), 2, random)
    after = with_part(problem, tables, before, batches, members, part)
    assert (after.kind[after.assign] >= 0).all()
    old, new = before.batch[before.assign], after.batch[after.assign]
    others = np.setdiff1d(np.arange(len(lengths)), members)
    assert (old[others] == new[others]).all()
    assert (before.kind[before.assign][others] == after.kind[after.assign][others]).all()
    assert (new[members] == batches[part.batch[part.assign]]).all()
    assert (after.kind[after.assign][members] == part.kind[part.assign]).all()
    for m in range(4):
        groups = (after.batch == m) & (after.kind >= 0)
        assert tables.degree[after.kind[groups]].sum() <= problem.num_ranks


def test_micro_batches_that_annealing_emptied_are_not_made_anew() -> None:
    lengths = long_tail(20, seed=5)
    problem = make_problem(lengths, 4, make_model())
    search = AnnealingSearch(problem, SearchTables.of(problem), BRIEF, seed=0)
    draft = search_beyond_tiny(problem, BRIEF, ()).draft
    search.offer(draft)
    best = search.best
    assert best is not None
    empty = np.full(8, -1, dtype=np.int64)
    num_batches = len(draft) + 8
    batch = np.concatenate([best.batch, np.arange(len(draft), num_batches)])
    for seed in range(10):
        state = State(best.assign.copy(), np.concatenate([best.kind, empty]), batch.copy(), num_batches)
        search.best, search.num_runs, search.seed = state, 7, seed
        search.run(0.0)
        assert problem.step_time_s(search.draft_of(search.best)) <= problem.step_time_s(draft) * (1 + 1e-12)
