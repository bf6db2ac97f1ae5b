"""Calibration: constants recovered, residuals honest, bad samples and bad fits refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import (
    CalibrationError,
    CalibrationFit,
    CostModel,
    Sample,
    fit_cost_model,
    read_samples,
    write_samples,
)
from planner.nnls import nonnegative_least_squares

from .planner_cases import make_model

TRUTH = make_model(model_state_bytes_fixed=5e5)
NUM_RANKS = 4


def measured(noise: float = 0.0, model: CostModel = TRUTH, degrees: tuple[int, ...] = (1, 2, 4)) -> list[Sample]:
    generator = np.random.default_rng(0)
    samples = []
    for degree in degrees:
        for lengths in [(100,), (1000,), (8000,), (4000, 4000), (30000,), (500,) * 20, (20000, 10, 3000)]:
            time_s = model.group_time_s(lengths, degree) * (1 + noise * generator.uniform(-1, 1))
            memory = model.group_memory_bytes(lengths, degree, NUM_RANKS) * (1 + noise * generator.uniform(-0.1, 0.1))
            samples.append(Sample(lengths, degree, time_s, memory))
    return samples


def fit(samples: list[Sample], **changes: Any) -> CalibrationFit:
    arguments: dict[str, Any] = {
        "name": "fitted",
        "num_ranks": NUM_RANKS,
        "model_state_bytes_total": TRUTH.model_state_bytes_total,
        "memory_limit_bytes": TRUTH.memory_limit_bytes,
        **changes,
    }
    return fit_cost_model(samples, **arguments)


def test_exact_samples_give_the_constants_back() -> None:
    found = fit(measured(), fixed_step_s=0.5, attention="ring", metadata={"hardware": "test"})
    model = found.cost_model
    for key in ("a1_s_per_token2", "a2_s_per_token", "b1_s", "b2_s", "bytes_per_token", "model_state_bytes_fixed"):
        assert getattr(model, key) == pytest.approx(getattr(TRUTH, key), rel=1e-6), key
    assert dict(model.communication_s) == pytest.approx({2: 1e-6, 4: 2e-6}, rel=1e-5)
    assert (model.fixed_step_s, model.attention, model.metadata["hardware"]) == (0.5, "ring", "test")
    assert found.mean_relative_error < 1e-9
    assert found.r2 == pytest.approx(1.0)
    assert CostModel.from_json(model.to_json()) == model


def test_noise_shows_in_the_residuals_and_memory_is_never_predicted_below_a_measurement() -> None:
    samples = measured(noise=0.1)
    found = fit(samples)
    errors = [abs(residual.relative_error) for residual in found.residuals]
    assert found.mean_relative_error == pytest.approx(sum(errors) / len(errors))
    assert found.max_relative_error == max(errors)
    assert 0.001 < found.mean_relative_error < 0.1
    assert found.cost_model.metadata["fit"]["num_samples"] == len(samples)
    for residual in found.residuals:
        assert residual.predicted_s == found.cost_model.group_time_s(residual.sample.lengths, residual.sample.degree)
        memory = found.cost_model.group_memory_bytes(residual.sample.lengths, residual.sample.degree, NUM_RANKS)
        assert residual.sample.memory_bytes is not None
        assert memory >= residual.sample.memory_bytes * (1 - 1e-9)


def test_constants_are_never_negative_even_where_sharing_beats_the_model() -> None:
    samples = [dataclasses.replace(s, time_s=s.time_s * 0.9) if s.degree > 1 else s for s in measured()]
    model = fit(samples).cost_model
    assert all(seconds >= 0 for _, seconds in model.communication_s)
    assert model.b2_s >= 0


def test_only_degree_one_is_enough_and_says_that_communication_is_unknown() -> None:
    found = fit(measured(degrees=(1,)), bytes_per_token=2000.0)
    assert found.cost_model.communication_s == ()
    assert any("communication counts as free" in note for note in found.notes)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "0 samples of degree 1"),
        (measured(degrees=(2, 4)), "0 samples of degree 1"),
        ([Sample((100,), 1, 0.1)] * 5, "1 different totals"),
        ([*measured(), Sample((100,), 1, float("nan"))], "sample 21 has time_s nan"),
        ([*measured(), Sample((100,), 1, 0.0)], "sample 21 has time_s 0.0"),
        ([*measured(), Sample((), 1, 0.1)], "sample 21 has lengths"),
        ([*measured(), Sample((5,), 0, 0.1)], "sample 21 has degree 0"),
        ([*measured(), Sample((5,), 1, 0.1, float("inf"))], "sample 21 has memory_bytes inf"),
        ([dataclasses.replace(s, memory_bytes=None) for s in measured()], "give bytes_per_token"),
        ([dataclasses.replace(s, memory_bytes=9e5) for s in measured()], "does not grow with tokens"),
    ],
)
def test_unusable_samples_are_refused(samples: list[Sample], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        fit(samples)


def test_bad_fit_is_refused_with_its_worst_sample() -> None:
    generator = np.random.default_rng(3)
    noise = [dataclasses.replace(s, time_s=float(generator.uniform(0.01, 3))) for s in measured()]
    with pytest.raises(CalibrationError, match=r"misses the samples by .* expected at most 10\.0%"):
        fit(noise, max_mean_relative_error=0.1)


def test_samples_round_trip_as_json_and_read_as_csv(tmp_path: Path) -> None:
    samples = [Sample((100, 20), 1, 0.5, 1000.0), Sample((7,), 2, 0.25)]
    write_samples(samples, tmp_path / "samples.json")
    assert read_samples(tmp_path / "samples.json") == samples
    (tmp_path / "samples.csv").write_text("lengths,degree,time_s,memory_bytes\n100 20,1,0.5,1000\n7,2,0.25,\n")
    assert read_samples(tmp_path / "samples.csv") == samples


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "lengths,degree,time_s\n5,x,1\n", "row 2 has degree 'x'"),
        ("a.csv", "lengths,degree\n5,1\n", r"lacks the key\(s\) time_s"),
        ("a.csv", "lengths,degree,time_s,speed\n5,1,1,1\n", r"unknown key\(s\) speed"),
        ("a.csv", "lengths,degree,time_s\n5,1,nan\n", "time_s is nan"),
        ("a.csv", "lengths,degree,time_s\n5,1,1,9\n", "more cells than columns"),
        ("a.json", "{}", "expected a JSON array"),
        ("a.json", "[1]", "expected a JSON object"),
        ("a.json", '[{"lengths": [0], "degree": 1, "time_s": 1}]', "lengths is 0"),
        ("a.json", "[", "not valid JSON"),
        ("a.json", '[], "other": []', r"unknown key\(s\) other"),
        ("a.txt", "", "expected .json or .csv"),
    ],
)
def test_malformed_sample_files_are_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(CalibrationError, match=message):
        read_samples(tmp_path / name)
    with pytest.raises(CalibrationError, match="cannot read"):
        read_samples(tmp_path / "none.json")


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), rows=st.integers(2, 8), columns=st.integers(1, 4))
def test_least_squares_meets_the_optimality_conditions(seed: int, rows: int, columns: int) -> None:
    generator = np.random.default_rng(seed)
    matrix = generator.normal(size=(rows, columns)) * 10.0 ** generator.integers(-8, 4, columns)
    target = generator.normal(size=rows)
    x = nonnegative_least_squares(matrix, target)
    assert (x >= 0).all()
    gradient = matrix.T @ (target - matrix @ x) / np.linalg.norm(matrix, axis=0)
    assert (gradient <= 1e-8).all()
    assert np.abs(gradient[x > 0]).max(initial=0.0) <= 1e-8
