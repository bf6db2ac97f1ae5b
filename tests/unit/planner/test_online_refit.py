"""The online refit: drift seen, scales recovered, outliers and thin samples resisted."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from planner import CalibrationError, CostModel, CostModelError, MethodCost, OnlineRefit, Sample
from planner.calibration import sample_kind

from .planner_cases import make_model

MODEL = make_model(
    overlap=0.3,
    methods=(
        MethodCost(name="ring", communication_s=((2, 3e-5),), between_nodes_s=((2, 6e-5),), overlap=0.5, fixed_s=0.002),
    ),
    per_sequence_s=2e-4,
    metadata={"hardware": "test"},
)


def scaled(model: CostModel, compute: float, ulysses: float, ring: float, fixed: float) -> CostModel:
    """The model with its constants multiplied."""
    first = model.methods[0]
    method = dataclasses.replace(
        first,
        communication_s=tuple((d, s * ring) for d, s in first.communication_s),
        between_nodes_s=tuple((d, s * ring) for d, s in first.between_nodes_s),
        fixed_s=first.fixed_s * fixed,
    )
    return dataclasses.replace(
        model,
        a1_s_per_token2=model.a1_s_per_token2 * compute,
        a2_s_per_token=model.a2_s_per_token * compute,
        communication_s=tuple((d, s * ulysses) for d, s in model.communication_s),
        methods=(method,),
        b1_s=model.b1_s * fixed,
        b2_s=model.b2_s * fixed,
        per_sequence_s=model.per_sequence_s * fixed,
    )


def run(truth: CostModel, num: int, *, seed: int = 0, noise: float = 0.0) -> list[Sample]:
    """Groups as a step would run them, measured by `truth`."""
    generator = np.random.default_rng(seed)
    samples = []
    for _ in range(num):
        lengths = tuple(int(s) for s in np.clip(generator.lognormal(7, 1.5, generator.integers(1, 20)), 1, 60000))
        degree = int(generator.choice([1, 2, 4, 8]))
        attention = str(generator.choice(["ulysses", "ring"])) if degree > 1 else None
        sample = Sample(lengths, degree, 1.0, None, attention, bool(degree > 1 and generator.integers(2)))
        time_s = truth.kind_time_s(lengths, sample_kind(sample, truth.attention))
        samples.append(dataclasses.replace(sample, time_s=time_s * (1 + noise * generator.uniform(-1, 1))))
    return samples


def observed(model: CostModel, samples: list[Sample], **options: Any) -> OnlineRefit:
    refit = OnlineRefit(model, **options)
    for sample in samples:
        refit.observe(sample)
    return refit


def worst_error(model: CostModel, samples: list[Sample]) -> float:
    kinds = [sample_kind(sample, model.attention) for sample in samples]
    pairs = zip(samples, kinds, strict=True)
    return max(abs(model.kind_time_s(sample.lengths, kind) / sample.time_s - 1) for sample, kind in pairs)


@pytest.mark.parametrize(
    "scales", [(1.5, 1.5, 1.5, 1.5), (1.3, 1.0, 1.0, 1.0), (1.0, 4.0, 2.0, 1.0), (0.7, 2.0, 3.0, 1.8)]
)
def test_drift_is_seen_and_scales_are_recovered(scales: tuple[float, float, float, float]) -> None:
    truth = scaled(MODEL, *scales)
    refit = observed(MODEL, run(truth, 200))
    model = refit.refit()
    assert model is not None, refit.reason
    fresh = run(truth, 100, seed=9)
    assert worst_error(MODEL, fresh) > 0.05
    assert worst_error(model, fresh) < 0.01
    assert model.name == MODEL.name
    record = model.metadata["refit"]
    assert (record["num_samples"], record["from_sha256"]) == (200, MODEL.sha256)
    assert record["mean_relative_error"] < 0.01
    assert model.metadata["hardware"] == "test"
    assert CostModel.from_json(model.to_json()) == model
    assert refit.cost_model is model
    assert abs(refit.drift) < 0.01


def test_drift_is_below_zero_where_groups_take_longer_than_predicted() -> None:
    samples = [dataclasses.replace(s, time_s=2 * s.time_s) for s in run(MODEL, 20)]
    assert observed(MODEL, samples).drift == pytest.approx(-0.5)
    assert observed(MODEL, run(MODEL, 20)).drift == pytest.approx(0.0, abs=1e-12)
    assert OnlineRefit(MODEL).drift == 0.0


def test_outliers_hardly_move_the_fit() -> None:
    truth = scaled(MODEL, 1.4, 1.4, 1.4, 1.0)
    samples = run(truth, 240, noise=0.02)
    spoilt = [dataclasses.replace(s, time_s=s.time_s * 20) if i % 12 == 0 else s for i, s in enumerate(samples)]
    model = observed(MODEL, spoilt).refit()
    assert model is not None
    assert model.a1_s_per_token2 == pytest.approx(truth.a1_s_per_token2, rel=0.05)
    assert worst_error(model, run(truth, 100, seed=9)) < 0.1


def test_refit_is_refused_with_a_reason() -> None:
    few = observed(scaled(MODEL, 2, 2, 2, 2), run(MODEL, 7))
    assert few.refit() is None
    assert few.reason == "there are 7 samples; expected at least 8"
    settled = observed(MODEL, run(MODEL, 100, noise=0.05))
    assert settled.refit() is None
    assert "the model as it is" in settled.reason
    moved = observed(MODEL, run(scaled(MODEL, 2, 2, 2, 2), 100))
    assert moved.refit() is not None
    assert moved.refit() is None
    assert moved.num_samples == 100


def test_equal_groups_scale_everything_alike() -> None:
    truth = scaled(MODEL, 1.25, 1.25, 1.25, 1.25)
    samples = [Sample((4000,), 1, truth.group_time_s([4000], 1))] * 10
    model = observed(MODEL, samples).refit()
    assert model is not None
    assert model.a1_s_per_token2 == pytest.approx(truth.a1_s_per_token2, rel=1e-3)
    assert model.b1_s == pytest.approx(truth.b1_s, rel=1e-3)
    assert model.communication_s == MODEL.communication_s


def test_window_and_forgetting_follow_the_latest_samples() -> None:
    old, new = run(scaled(MODEL, 3, 3, 3, 3), 50), run(scaled(MODEL, 0.5, 0.5, 0.5, 0.5), 50, seed=1)
    sliding = observed(MODEL, [*old, *new], window=50)
    assert sliding.num_samples == 50
    assert sliding.drift == pytest.approx(1.0)
    for refit in (sliding, observed(MODEL, [*old, *new], forgetting=0.8)):
        model = refit.refit()
        assert model is not None
        assert model.a1_s_per_token2 == pytest.approx(MODEL.a1_s_per_token2 / 2, rel=0.02)


def test_malformed_samples_and_options_are_refused() -> None:
    refit = OnlineRefit(MODEL)
    with pytest.raises(CalibrationError, match="the sample has time_s nan"):
        refit.observe(Sample((5,), 1, float("nan")))
    with pytest.raises(CostModelError, match="no recompute policy 'full'"):
        refit.observe(Sample((5,), 1, 1.0, recompute="full"))
    assert refit.num_samples == 0
    for options in ({"window": 4}, {"min_samples": 0}, {"forgetting": 0.0}, {"forgetting": 1.1}):
        with pytest.raises(CalibrationError, match="expected"):
            OnlineRefit(MODEL, **options)


def test_states_of_linear_layers_follow_the_fixed_seconds() -> None:
    tables: dict[str, tuple[tuple[int, float], ...]] = {
        "state_exchange_by_degree_s": ((2, 0.01), (4, 0.02), (8, 0.03)),
        "state_exchange_between_nodes_s": ((2, 0.02), (8, 0.06)),
    }
    model = make_model(a1_s_per_token2=0.0, communication_s=(), softmax_layer_share=0.0, **tables)
    twice = {key: tuple((degree, 2 * seconds) for degree, seconds in table) for key, table in tables.items()}
    truth = dataclasses.replace(model, b1_s=2 * model.b1_s, b2_s=2 * model.b2_s, **twice)
    samples = [dataclasses.replace(sample, attention=None) for sample in run(truth, 60)]
    refitted = observed(model, samples).refit()
    assert refitted is not None
    assert worst_error(refitted, samples) < 1e-3
    assert dict(refitted.state_exchange_by_degree_s) == pytest.approx(dict(truth.state_exchange_by_degree_s), rel=1e-2)
