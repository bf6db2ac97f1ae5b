"""What-if: batches drop nothing, rows and ratios follow from plans, what more ranks are worth."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from planner import (
    LengthsError,
    PlanError,
    SimulatedStep,
    Simulation,
    draw_batches,
    marginal_value,
    plan_step,
    simulate,
)
from planner.simulation import expanded_policies

from .planner_cases import long_tail, make_model

MODEL = make_model()
BATCHES = [tuple(long_tail(12, seed=seed, cap=9000)) for seed in (1, 2)]


def test_batches_are_a_shuffled_corpus_without_loss() -> None:
    corpus = long_tail(60, seed=4)
    batches = draw_batches(corpus, 20, 3, seed=1)
    assert Counter(s for batch in batches for s in batch) == Counter(corpus)
    assert batches == draw_batches(corpus, 20, 3, seed=1) != draw_batches(corpus, 20, 3, seed=2)
    assert [s for batch in batches for s in batch] != corpus


def test_long_documents_are_split_and_a_small_corpus_is_passed_over_again() -> None:
    assert draw_batches([25], 3, 2, max_length=10) == [(10, 10, 5), (10, 10, 5)]
    assert Counter(draw_batches([1, 2, 3], 6, 1)[0]) == {1: 2, 2: 2, 3: 2}
    for lengths, size, num in (([], 1, 1), ([1], 0, 1), ([1], 1, 0)):
        with pytest.raises(LengthsError, match="expected at least 1 each"):
            draw_batches(lengths, size, num)


def test_rows_are_those_of_the_plans_and_say_what_does_not_fit() -> None:
    seen: list[tuple[SimulatedStep, int, int]] = []
    policies = ("static", "batch-adaptive", "flexsp", "adaptive")
    simulation = simulate(
        BATCHES,
        [2, 8],
        MODEL,
        policies=policies,
        node_limit=1,
        flexsp_cpu_s=0.2,
        on_progress=lambda *event: seen.append(event),
    )
    assert len(simulation.steps) == len(seen) == seen[-1][1] == seen[-1][2] == 2 * (2 + 3) + 2 * (4 + 3)
    for step in simulation.steps:
        if step.infeasible:
            assert step.step_time_s is step.gap is None
            continue
        assert step.step_time_s is not None
        assert step.num_tokens == sum(BATCHES[step.batch])
        assert step.tokens_per_s == pytest.approx(step.num_tokens / step.step_time_s)
        assert step.tokens_per_s_per_gpu == pytest.approx(step.num_tokens / step.step_time_s / step.num_ranks)
        # One bound for all policies of a batch.
        assert step.lower_bound_s is not None
        assert step.gap == pytest.approx(step.step_time_s / step.lower_bound_s - 1)
        assert step.gap >= 0
        if step.policy != "flexsp":
            plan = plan_step(BATCHES[step.batch], step.num_ranks, MODEL, policy=step.policy, node_limit=1)
            assert plan.predicted_step_time_s == step.step_time_s
    adaptive, whole = simulation.summary(8, "adaptive"), simulation.summary(8, "batch-adaptive")
    assert adaptive is not None
    assert whole is not None
    assert adaptive.relative_to_adaptive == pytest.approx(1.0)
    assert whole.relative_to_adaptive >= 1.0  # type: ignore[operator]
    times = {(s.policy, s.batch): s.step_time_s for s in simulation.steps if s.num_ranks == 8}
    ratios = [times["batch-adaptive", b] / times["flexsp", b] for b in (0, 1)]  # type: ignore[operator]
    assert whole.relative_to_flexsp == pytest.approx(math.sqrt(ratios[0] * ratios[1]))


def test_the_best_static_degree_is_the_best_over_all_batches_that_holds_them_all() -> None:
    simulation = simulate([(100, 90, 80, 70), (9900, 5)], [4], MODEL, policies=["static", "adaptive"], node_limit=5)
    best = simulation.summary(4, "best static")
    assert best is not None
    assert best.degree in (2, 4)
    single = simulation.summary(4, f"static:{best.degree}")
    one = simulation.summary(4, "static:1")
    assert single is not None
    assert one is not None
    assert best.mean_step_time_s == single.mean_step_time_s
    assert (one.num_infeasible, one.tokens_per_s) == (1, None)
    # Still compared on the batch that it can run.
    assert one.relative_to_adaptive is not None


def test_a_stopped_simulation_keeps_what_is_done() -> None:
    done: list[SimulatedStep] = []

    def stop(step: SimulatedStep, count: int, total: int) -> None:
        done.append(step)
        if count == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(BATCHES, [4], MODEL, policies=["static:4", "adaptive"], node_limit=5, on_progress=stop)
    summaries = Simulation.of(done).summaries
    # The best static degree is compared on batches that all policies could have seen.
    assert {item.policy: item.num_batches for item in summaries} == {"best static": 2, "static:4": 2, "adaptive": 1}


def test_policies_are_checked_and_expanded() -> None:
    assert expanded_policies(["static", "static:2", "adaptive"], 6, make_model(num_heads=2)) == [
        "static:1", "static:2", "adaptive",
    ]  # fmt: skip
    for policies in (["best"], ["static:x"], ["static:"], []):
        with pytest.raises(PlanError, match="polic"):
            simulate(BATCHES, [4], MODEL, policies=policies)
    with pytest.raises(PlanError, match="0 batches"):
        simulate([], [4], MODEL)
    with pytest.raises(PlanError, match="at least one rank"):
        simulate(BATCHES, [0], MODEL)


def test_more_ranks_are_never_worth_less_than_nothing() -> None:
    for num_ranks in (3, 6):
        value = marginal_value(BATCHES, num_ranks, MODEL, gpus_per_node=2, node_limit=1)
        assert 0 <= value.gained_per_added_gpu <= value.gained_per_added_node
        assert value.lost_per_removed_gpu is not None
        assert value.lost_per_removed_node is None or value.lost_per_removed_node >= value.lost_per_removed_gpu >= 0
        assert value.reason.count("\n") == 0
        assert f"on {num_ranks} GPUs" in value.reason
    assert value == marginal_value(BATCHES, num_ranks, MODEL, gpus_per_node=2, node_limit=1)


def test_a_job_at_its_smallest_size_cannot_lose_a_gpu_and_one_below_gains_from_a_node() -> None:
    batch = [(18000, 200, 100)]
    smallest = marginal_value(batch, 2, MODEL, gpus_per_node=2, node_limit=5)
    assert smallest.lost_per_removed_gpu is smallest.lost_per_removed_node is None
    assert "one GPU less: it no longer fits" in smallest.reason
    below = marginal_value(batch, 1, MODEL, gpus_per_node=2, node_limit=5)
    assert below.tokens_per_s == 0
    assert below.gained_per_added_node > 0
    assert "does not fit on 1 GPUs; one node of 2 more: then" in below.reason
    with pytest.raises(PlanError, match="gpus_per_node is 0"):
        marginal_value(batch, 1, MODEL, gpus_per_node=0)
