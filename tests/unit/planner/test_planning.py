"""`plan_step`: properties of every plan, policies, limits, refusals."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from planner import (
    Cluster,
    CostModel,
    CostModelError,
    InfeasibleError,
    PlanError,
    StepPlan,
    load_preset,
    plan_step,
    validate_plan,
)

from .planner_cases import cost_models, long_tail, make_model

PRESET_7B = load_preset("flexsp-gpt7b-64xa100-40g")


def degrees_of(plan: StepPlan) -> set[int]:
    return {group.degree for micro_batch in plan.micro_batches for group in micro_batch.groups}


def quick(lengths: Sequence[int], num_ranks: int, model: CostModel, policy: str = "adaptive") -> StepPlan:
    return plan_step(lengths, num_ranks, model, policy=policy, node_limit=20)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9000), min_size=1, max_size=40),
    num_ranks=st.integers(1, 9),
    model=cost_models(),
)
def test_every_plan_is_valid_and_no_slower_than_any_single_degree(
    lengths: list[int], num_ranks: int, model: CostModel
) -> None:
    degrees = [1 << power for power in range(num_ranks.bit_length())]
    fitting = [d for d in degrees if model.max_tokens(d, num_ranks) >= max(lengths)]
    assume(fitting)
    plan = quick(lengths, num_ranks, model)
    assert validate_plan(plan, lengths, model) == []
    dealt = sorted(i for m in plan.micro_batches for group in m.groups for i in group.sequences)
    assert dealt == list(range(len(lengths)))
    for micro_batch in plan.micro_batches:
        ranks = [rank for group in micro_batch.groups for rank in group.ranks]
        assert len(set(ranks)) == len(ranks)
        assert set(ranks) <= set(range(num_ranks))
        for group in micro_batch.groups:
            assert group.degree == len(group.ranks)
            assert group.sequences
            tokens = [lengths[i] for i in group.sequences]
            assert model.group_memory_bytes(tokens, group.degree, num_ranks) <= model.memory_limit_bytes
    assert plan.lower_bound_s <= plan.predicted_step_time_s
    assert plan.outcome in ("optimal", "feasible")
    for policy in [*(f"static:{d}" for d in fitting), "batch-adaptive", "static:auto"]:
        other = quick(lengths, num_ranks, model, policy)
        assert validate_plan(other, lengths, model) == []
        assert plan.predicted_step_time_s <= other.predicted_step_time_s
        assert plan.lower_bound_s <= other.predicted_step_time_s


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9000), min_size=1, max_size=25), num_ranks=st.integers(1, 7), model=cost_models()
)
def test_any_degree_plans_are_valid(lengths: list[int], num_ranks: int, model: CostModel) -> None:
    assume(model.max_tokens(num_ranks, num_ranks) >= max(lengths))
    plan = plan_step(lengths, num_ranks, model, degrees="any", node_limit=20, attention="ring")
    assert validate_plan(plan, lengths, model) == []
    assert {g.attention for m in plan.micro_batches for g in m.groups if g.degree > 1} <= {"ring"}


@pytest.mark.parametrize(
    "lengths",
    [
        [1000] * 48,
        [28000] + [50] * 30,
        [2**power + 1 for power in range(14)] * 2,
        [1] * 100,
        [3000, 200, 5],
        [17],
        [9000] * 7,
    ],
    ids=["all equal", "one giant", "powers of two plus one", "one token", "fewer than ranks", "single", "seven equal"],
)
@pytest.mark.parametrize("num_ranks", [6, 8])
def test_adversarial_mixes(lengths: list[int], num_ranks: int) -> None:
    model = make_model()
    plan = quick(lengths, num_ranks, model)
    assert validate_plan(plan, lengths, model) == []
    assert plan.predicted_step_time_s <= quick(lengths, num_ranks, model, "batch-adaptive").predicted_step_time_s


def test_same_seed_and_node_limit_give_the_same_plan_whatever_the_clock() -> None:
    lengths = long_tail(50, seed=3)
    hurried = iter(range(0, 10**9, 10**6))
    first = plan_step(lengths, 8, make_model(), node_limit=30, seed=7, time_limit_s=0.0, clock=lambda: next(hurried))
    second = plan_step(lengths, 8, make_model(), node_limit=30, seed=7, time_limit_s=60.0)
    assert first.plan_id == second.plan_id
    assert first.micro_batches == second.micro_batches


@settings(max_examples=12, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9000), min_size=1, max_size=25),
    num_ranks=st.sampled_from([1, 4, 6]),
    sync=st.sampled_from(["per-layer", "per-step"]),
    data=st.data(),
)
def test_order_of_the_batch_changes_neither_time_nor_bound(
    lengths: list[int], num_ranks: int, sync: str, data: st.DataObject
) -> None:
    model = make_model(unsharded_state_bytes=0.0)
    assume(model.max_tokens(num_ranks if num_ranks != 6 else 4, num_ranks) >= max(lengths))
    shuffled = data.draw(st.permutations(lengths))
    plan, other = (plan_step(batch, num_ranks, model, sync=sync, node_limit=2) for batch in (lengths, shuffled))
    assert other.predicted_step_time_s == pytest.approx(plan.predicted_step_time_s, rel=1e-12)
    assert other.lower_bound_s == pytest.approx(plan.lower_bound_s, rel=1e-12)
    assert other.outcome == plan.outcome


def test_no_time_at_all_still_gives_a_plan_no_slower_than_one_degree() -> None:
    lengths = long_tail(60, seed=1)
    plan = plan_step(lengths, 8, make_model(), time_limit_s=0.0)
    assert validate_plan(plan, lengths, make_model()) == []
    other = quick(lengths, 8, make_model(), "batch-adaptive")
    assert plan.predicted_step_time_s <= other.predicted_step_time_s
    assert plan.outcome == "feasible"


def test_long_tail_on_64_gpus_beats_single_degrees_and_stays_above_the_bound() -> None:
    lengths = long_tail(512, seed=0, median=2000, sigma=1.6, cap=196608)
    plan = plan_step(lengths, 64, PRESET_7B, node_limit=1, solvers=())
    assert validate_plan(plan, lengths, PRESET_7B) == []
    best_single = plan_step(lengths, 64, PRESET_7B, policy="batch-adaptive")
    static = plan_step(lengths, 64, PRESET_7B, policy="static:auto")
    assert plan.predicted_step_time_s < 0.9 * best_single.predicted_step_time_s
    assert plan.predicted_step_time_s < 0.8 * static.predicted_step_time_s
    assert plan.lower_bound_s <= plan.predicted_step_time_s


def test_static_degree_that_does_not_divide_leaves_ranks_idle() -> None:
    plan = plan_step([500] * 12, 7, make_model(), policy="static:3")
    assert degrees_of(plan) == {3}
    assert all(rank < 6 for m in plan.micro_batches for group in m.groups for rank in group.ranks)
    assert validate_plan(plan, [500] * 12, make_model()) == []


def test_static_auto_is_the_smallest_degree_that_holds_the_longest_sequence() -> None:
    model = make_model()
    holds = model.max_tokens(1, 8)
    assert degrees_of(plan_step([holds] * 3, 8, model, policy="static:auto")) == {1}
    assert degrees_of(plan_step([holds + 1, 5], 8, model, policy="static:auto")) == {2}


def test_degree_one_is_local_and_others_run_the_method_of_the_model_or_the_argument() -> None:
    lengths = [*[300] * 20, 28000]
    for attention, expected in [(None, "ulysses"), ("token_ring", "token_ring")]:
        plan = plan_step(lengths, 8, make_model(), attention=attention, node_limit=5)
        methods = {(group.degree > 1, group.attention) for m in plan.micro_batches for group in m.groups}
        assert methods == {(False, "local"), (True, expected)} or methods == {(True, expected)}


def test_heads_that_do_not_divide_rule_ulysses_degrees_out() -> None:
    model = make_model(num_heads=6)
    lengths = [16000, 12000, 500, 400]
    plan = plan_step(lengths, 8, model)
    assert max(degrees_of(plan)) <= 2
    assert validate_plan(plan, lengths, model) == []
    with pytest.raises(PlanError, match="cannot share 6 heads among 4 ranks"):
        plan_step(lengths, 8, model, policy="static:4")
    assert max(degrees_of(plan_step([30000], 8, model, attention="ring"))) > 2


def test_groups_are_placed_descending_on_aligned_ranks() -> None:
    lengths = long_tail(60, seed=2)
    for micro_batch in quick(lengths, 8, make_model()).micro_batches:
        degrees = [group.degree for group in micro_batch.groups]
        assert degrees == sorted(degrees, reverse=True)
        for group in micro_batch.groups:
            assert group.ranks[0] % group.degree == 0
            assert group.ranks == tuple(range(group.ranks[0], group.ranks[0] + group.degree))


def test_sequence_that_fits_no_group_is_named_with_what_it_needs() -> None:
    model = make_model()
    holds = model.max_tokens(4, 4)
    needed = model.group_memory_bytes([holds + 1], 4, 4)
    with pytest.raises(InfeasibleError) as caught:
        plan_step([5, 7, holds + 1], 4, model)
    message = str(caught.value)
    for part in ["sequence 2", f"{holds + 1} tokens", f"{needed:.0f} bytes", "20000000 bytes", f"holds {holds} tokens"]:
        assert part in message
    assert plan_step([5, 7, holds], 4, model).num_sequences == 3
    with pytest.raises(InfeasibleError, match=r"static degree 1 .*use a degree of at least 4"):
        plan_step([holds], 4, model, policy="static:1")


def test_model_states_that_do_not_fit_are_named() -> None:
    with pytest.raises(InfeasibleError, match="model states need 50000000 bytes on each of 2 ranks"):
        plan_step([5], 2, make_model(model_state_bytes_total=1e8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lengths": []}, "no sequences"),
        ({"lengths": [5, 0]}, "sequence 1 has length 0"),
        ({"lengths": [5, 2.5]}, "sequence 1 has length 2.5"),
        ({"lengths": [True]}, "sequence 0 has length True"),
        ({"lengths": [5, 10**16]}, "sequence 1 has a length of 16 digits or more"),
        ({"num_ranks": 0}, "num_ranks is 0"),
        ({"num_ranks": 10**9}, "num_ranks is 1000000000; expected at most 65536"),
        ({"num_ranks": 10**5, "degrees": "any"}, "expected at most 4096 with degrees 'any'"),
        ({"num_ranks": 2.0}, "num_ranks is 2.0"),
        ({"policy": "best"}, "policy is 'best'"),
        ({"policy": "static:"}, "policy is 'static:'"),
        ({"policy": "static:0"}, "policy is 'static:0'"),
        ({"policy": "static:9"}, "policy is 'static:9'"),
        ({"policy": "static:-1"}, "policy is 'static:-1'"),
        ({"sync": "per-step"}, "does not say how many bytes a rank holds with sync 'per-step'"),
        ({"sync": "never"}, "'never' is unknown"),
        ({"degrees": "odd"}, "degrees is 'odd'"),
        ({"time_limit_s": math.nan}, "time_limit_s is nan"),
        ({"time_limit_s": math.inf}, "time_limit_s is inf"),
        ({"time_limit_s": -1}, "time_limit_s is -1"),
        ({"node_limit": 0}, "node_limit is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"attention": "local"}, "attention is 'local'"),
        ({"attention": ""}, "attention is ''"),
        ({"attention": "bogus"}, "attention is 'bogus'; expected one of ring"),
        ({"cluster": Cluster.uniform(3)}, "the cluster has 3 GPUs, but num_ranks is 4"),
    ],
)
def test_malformed_requests_are_refused(arguments: dict[str, object], message: str) -> None:
    request: dict[str, object] = {"lengths": [5, 6], "num_ranks": 4, "cost_model": make_model(), **arguments}
    with pytest.raises(PlanError, match=message):
        plan_step(**request)  # type: ignore[arg-type]


def test_constants_whose_times_are_not_finite_are_refused() -> None:
    with pytest.raises(CostModelError, match="no finite time for sequence 1 of 6 tokens; its constants are too large"):
        plan_step([1, 6, 2], 4, make_model(a1_s_per_token2=1e307))


def test_fixed_part_of_the_step_is_in_time_and_bound() -> None:
    lengths = long_tail(30, seed=8)
    without, with_ = (quick(lengths, 4, make_model(fixed_step_s=s)) for s in (0.0, 5.0))
    assert with_.predicted_step_time_s == pytest.approx(without.predicted_step_time_s + 5)
    assert with_.lower_bound_s == pytest.approx(without.lower_bound_s + 5)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9000), min_size=1, max_size=25),
    num_ranks=st.sampled_from([1, 2, 4]),
    model=cost_models(),
    scale=st.sampled_from([2.0**-20, 2.0**-3, 2.0, 2.0**10]),
)
def test_scaling_all_costs_scales_the_plan(lengths: list[int], num_ranks: int, model: CostModel, scale: float) -> None:
    # Powers of two scale floats without rounding, so that no tie is broken otherwise.
    assume(model.max_tokens(num_ranks, num_ranks) >= max(lengths))
    scaled = dataclasses.replace(
        model,
        a1_s_per_token2=model.a1_s_per_token2 * scale,
        a2_s_per_token=model.a2_s_per_token * scale,
        b1_s=model.b1_s * scale,
        b2_s=model.b2_s * scale,
        fixed_step_s=model.fixed_step_s * scale,
        communication_s=tuple((d, s * scale) for d, s in model.communication_s),
    )
    plain, other = (plan_step(lengths, num_ranks, m, solvers=(), node_limit=1) for m in (model, scaled))
    assert other.predicted_step_time_s == pytest.approx(plain.predicted_step_time_s * scale, rel=1e-9)
    assert other.lower_bound_s == pytest.approx(plain.lower_bound_s * scale, rel=1e-9)
