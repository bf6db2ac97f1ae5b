"""What is learnt from steps: drift told once per change, groups whose times are their own, refits that follow them."""

from __future__ import annotations

import numpy as np
import pytest

from planner import CostModel, CostModelReference, GroupPlan, MicroBatchPlan, StepPlan
from raysp.cluster.run_watch import RunWatch, group_samples, measured_group_times_s
from raysp.train.work import StepResult

_MODEL = CostModel(
    name="test",
    a1_s_per_token2=2e-8,
    a2_s_per_token=4e-5,
    b1_s=0.01,
    communication_s=((2, 1e-5),),
    bytes_per_token=2000.0,
    model_state_bytes_total=1e6,
    memory_limit_bytes=2e8,
    attention="ring",
)
_LENGTHS = (4000, 900, 800, 100)


def _group(ranks: tuple[int, ...], sequences: tuple[int, ...], recompute: str = "default") -> GroupPlan:
    lengths = [_LENGTHS[i] for i in sequences]
    degree = len(ranks)
    return GroupPlan(
        ranks=ranks,
        degree=degree,
        attention="ring" if degree > 1 else "local",
        sequences=sequences,
        num_tokens=sum(lengths),
        predicted_time_s=_MODEL.group_time_s(lengths, degree),
        predicted_memory_bytes=0,
        recompute=recompute,
    )


def _plan(sync: str) -> StepPlan:
    micro_batches = [(_group((0, 1), (0,)), _group((2,), (3,))), (_group((1, 2), (1, 2), "full"),)]
    return StepPlan(
        plan_id="",
        num_ranks=3,
        num_sequences=4,
        sync=sync,
        cost_model=CostModelReference(_MODEL.name, _MODEL.sha256),
        micro_batches=tuple(
            MicroBatchPlan(max(g.predicted_time_s for g in groups), groups) for groups in micro_batches
        ),
        predicted_step_time_s=1.0,
        lower_bound_s=1.0,
        outcome="feasible",
        solve_time_s=0.0,
    )


def _results(times_s: list[tuple[float, ...]]) -> list[StepResult]:
    return [
        StepResult(
            step=0,
            global_rank=rank,
            loss=1.0,
            num_targets=1,
            local_loss_is_finite=True,
            grad_norm=1.0,
            updated=True,
            learning_rate=1.0,
            step_time_s=sum(times),
            micro_batch_times_s=times,
            peak_memory_bytes=0,
        )
        for rank, times in enumerate(times_s)
    ]


def test_group_of_per_step_does_not_count_its_wait_for_the_last_rank() -> None:
    # Rank 2 is free early and waits 0.4 s of its 0.6 s for rank 1.
    results = _results([(0.5, 0.0), (0.5, 0.2), (0.1, 0.6)])
    plan = _plan("per-step")
    assert measured_group_times_s(plan, results) == [[0.5, 0.1], [0.2]]
    samples = group_samples(plan, _LENGTHS, results)
    assert [(s.lengths, s.degree, s.time_s, s.attention, s.recompute) for s in samples] == [
        ((4000,), 2, 0.5, "ring", "default"),
        ((100,), 1, 0.1, None, "default"),
        ((900, 800), 2, 0.2, "ring", "full"),
    ]


def test_per_layer_shows_the_slowest_group_of_a_micro_batch_alone() -> None:
    results = _results([(0.5, 0.2), (0.5, 0.21), (0.51, 0.2)])
    samples = group_samples(_plan("per-layer"), _LENGTHS, results)
    assert [(sample.lengths, sample.time_s) for sample in samples] == [((4000,), 0.51), ((900, 800), 0.21)]


def _finished_drift(watch: RunWatch, lengths: tuple[int, ...]) -> tuple[float | None, str | None]:
    watch.begin_batch(lengths)
    assert watch._drift is not None
    watch._drift.exception()  # returns when the comparison is done
    return watch.drift()


def test_drift_is_told_once_per_change() -> None:
    random = np.random.default_rng(0)

    def batch(median: int) -> tuple[int, ...]:
        return tuple(int(x) for x in np.maximum(1, random.lognormal(np.log(median), 1.0, 256)))

    with RunWatch(_MODEL, sync="per-layer", refit=False) as watch:
        assert watch.drift() == (None, None)
        found = [_finished_drift(watch, batch(300)) for _ in range(5)]
        found += [_finished_drift(watch, batch(5000)) for _ in range(6)]
    statistics = [statistic for statistic, _ in found]
    assert statistics[0] == 0
    assert all(0 < statistic < 0.3 for statistic in statistics[1:5])
    assert all(statistic > 0.5 for statistic in statistics[5:8])
    # Three drifted batches in a row become the reference, so the ones after agree with it.
    assert statistics[-1] < 0.3
    texts = [text for _, text in found]
    assert [index for index, text in enumerate(texts) if text] == [5]
    assert "lengths drifted" in str(texts[5])


def test_refit_follows_groups_that_take_twice_as_long_and_names_both_errors() -> None:
    plan = _plan("per-step")
    doubled = [[2 * group.predicted_time_s for group in micro_batch.groups] for micro_batch in plan.micro_batches]
    times_s = [(doubled[0][0], 0.0), (doubled[0][0], doubled[1][0]), (doubled[0][1], doubled[1][0])]
    samples = group_samples(plan, _LENGTHS, _results(times_s))[:2]
    with RunWatch(_MODEL, sync="per-step", refit=True, samples_between_refits=8) as watch:
        for _ in range(3):
            watch.observe_groups(samples)
        assert watch.take_refit(wait=True) is None
        watch.observe_groups(samples)
        refitted = watch.take_refit(wait=True)
        assert refitted is not None
        assert watch.take_refit(wait=True) is None
    assert refitted.cost_model.sha256 != _MODEL.sha256
    assert refitted.cost_model.group_time_s([4000], 2) == pytest.approx(2 * _MODEL.group_time_s([4000], 2), rel=1e-3)
    assert refitted.mean_relative_error < 1e-3
    assert "from 50.0% to 0.0%" in refitted.text


def test_without_refit_nothing_is_observed() -> None:
    with RunWatch(_MODEL, sync="per-step", refit=False, samples_between_refits=1) as watch:
        watch.observe_groups(group_samples(_plan("per-step"), _LENGTHS, _results([(1.0, 1.0)] * 3)))
        assert watch.take_refit(wait=True) is None
