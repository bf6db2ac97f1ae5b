"""FlexSP's formulation as a baseline: optimal where the program is exact, always valid, honest about time limits."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence

import pytest

from planner import CostModel, InfeasibleError, PlanError, StepPlan, flexsp_plan, load_preset, validate_plan
from planner.flexsp import FilledGroup, assembled_plan, possible_groups

from .planner_cases import brute_force_makespan, long_tail, make_model

PRESET_7B = load_preset("flexsp-gpt7b-64xa100-40g")


def solved(lengths: Sequence[int], num_ranks: int, model: CostModel, **changes: object) -> StepPlan:
    plan = flexsp_plan(lengths, num_ranks, model, **{"solver_cpu_s": 5.0, **changes})  # type: ignore[arg-type]
    assert validate_plan(plan, lengths, model) == []
    assert plan.outcome == "feasible"
    return plan


@pytest.mark.parametrize(
    ("lengths", "num_ranks", "changes"),
    [
        ([9000, 4000, 700, 650, 300], 4, {}),
        ([3000, 2900, 2800, 100, 90, 80], 4, {"b2_s": 0.02}),
        ([5000, 5000, 1000, 1000, 30], 3, {}),
        ([2000] * 5, 4, {"bytes_per_token": 0.0}),
    ],
)
def test_one_micro_batch_reaches_the_best_of_all_partitions(
    lengths: list[int], num_ranks: int, changes: dict[str, float]
) -> None:
    model = make_model(**changes)
    degrees = [1 << power for power in range(num_ranks.bit_length())]
    plan = solved(lengths, num_ranks, model, micro_batch_counts=[1])
    best_s = brute_force_makespan(lengths, num_ranks, model, degrees) + model.fixed_step_s
    assert plan.predicted_step_time_s == pytest.approx(best_s, rel=2e-4)
    assert plan.reason == "FlexSP: 1 optimal of 1 programs (1 tried, 5 s each)"


def test_counts_start_where_memory_allows_and_the_best_is_taken() -> None:
    model = make_model()
    lengths = long_tail(24, seed=3, cap=15000)
    chosen = solved(lengths, 2, model)
    first = -(-sum(lengths) // model.max_tokens(2, 2))
    assert first > 1
    singles: list[StepPlan] = []
    for count in range(first, len(lengths)):
        with contextlib.suppress(PlanError):
            singles.append(solved(lengths, 2, model, micro_batch_counts=[count]))
        if len(singles) == 3:
            break
    # Solver gaps aside; the time limit is never reached here.
    assert chosen.predicted_step_time_s == pytest.approx(min(p.predicted_step_time_s for p in singles), rel=1e-3)
    spans = [[lengths[i] for group in m.groups for i in group.sequences] for m in chosen.micro_batches]
    assert all(min(longer) >= max(shorter) for longer, shorter in itertools.pairwise(spans))


def test_without_an_incumbent_the_best_homogeneous_fill_is_taken() -> None:
    model = make_model()
    lengths = long_tail(40, seed=5, cap=9000)
    plan = solved(lengths, 8, model, solvers=(), micro_batch_counts=[1])
    assert "1 fallback of 1 programs" in plan.reason
    assert len({group.degree for group in plan.micro_batches[0].groups}) == 1


def test_cpu_time_ends_a_hard_program() -> None:
    lengths = long_tail(100, seed=2, median=1200, cap=100000)
    plan = solved(lengths, 64, PRESET_7B, solver_cpu_s=0.3, micro_batch_counts=[1])
    assert "optimal" not in plan.reason
    # Presolve and one linear program may pass between two looks at the clock, not a search.
    assert plan.solve_time_s < 20


def test_processes_change_nothing_but_the_time() -> None:
    model, lengths = make_model(), long_tail(12, seed=7, cap=9000)
    alone = solved(lengths, 2, model, micro_batch_counts=[2])
    assert solved(lengths, 2, model, micro_batch_counts=[2], num_processes=2).plan_id == alone.plan_id


def test_groups_are_all_powers_of_two_that_the_heads_allow() -> None:
    assert len(possible_groups(64, PRESET_7B)) == 127
    assert possible_groups(6, make_model()) == [4] + [2] * 3 + [1] * 6
    assert set(possible_groups(8, make_model(num_heads=4))) == {4, 2, 1}


def test_groups_across_nodes_cost_what_their_ranks_say() -> None:
    model = make_model(gpus_per_node=2, between_nodes_s=((4, 5e-5), (8, 5e-5)))
    plan = solved([25000, *long_tail(30, seed=1, cap=9000)], 8, model, solvers=())
    assert any(group.degree > 2 for micro_batch in plan.micro_batches for group in micro_batch.groups)


def test_refusals() -> None:
    model = make_model()
    with pytest.raises(PlanError, match="0 lengths on 4 ranks"):
        flexsp_plan([], 4, model)
    with pytest.raises(InfeasibleError, match="a sequence has 900000 tokens, but 4 ranks"):
        flexsp_plan([900000, 5], 4, model)
    with pytest.raises(PlanError, match=r"no micro-batch count of \[1\] holds the batch"):
        flexsp_plan([20000] * 8, 4, model, micro_batch_counts=[1], solvers=())
    with pytest.raises(PlanError, match="groups of 6 ranks; 4 exist"):
        assembled_plan([5, 5, 5], [[FilledGroup(2, (i,)) for i in range(3)]], 4, model)
