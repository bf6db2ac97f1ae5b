"""Calibration: constants recovered, residuals honest, bad samples and bad fits refused."""

from __future__ import annotations

import dataclasses
import json
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
    GroupKind,
    MethodCost,
    RecomputePolicy,
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
        ([*measured(), Sample((5,), 2, 0.1, attention="bogus")], "sample 21 has attention 'bogus'"),
        ([*measured(), Sample((5,), 2, 0.1, attention="local")], "sample 21 of degree 2 has attention 'local'"),
        ([*measured(), Sample((5,), 2, 0.1, 9.0, "ring", recompute="x")], "but none with the default policy did"),
        ([*measured(), Sample((5,), 1, 0.1, recompute="x")], "no sample with recompute 'x' carries memory_bytes"),
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


def test_samples_of_other_kinds_round_trip_and_the_default_is_not_written(tmp_path: Path) -> None:
    samples = [Sample((7,), 2, 0.25, None, "ring", True, "full"), Sample((9,), 4, 0.5, spans_nodes=True)]
    write_samples(samples, tmp_path / "samples.json")
    assert read_samples(tmp_path / "samples.json") == samples
    (tmp_path / "samples.csv").write_text(
        "lengths,degree,time_s,attention,spans_nodes,recompute\n7,2,0.25,ring,True,full\n9,4,0.5,,1,\n"
    )
    assert read_samples(tmp_path / "samples.csv") == samples
    write_samples([Sample((9,), 1, 0.5)], tmp_path / "plain.json")
    assert json.loads((tmp_path / "plain.json").read_text()) == [
        {"lengths": [9], "degree": 1, "time_s": 0.5, "memory_bytes": None}
    ]


def test_csv_of_a_spreadsheet_is_read(tmp_path: Path) -> None:
    path = tmp_path / "samples.csv"
    path.write_text("\ufefflengths,degree,time_s\r\n1000;24,1,0.5\r\n", encoding="utf-8")
    assert read_samples(path) == [Sample((1000, 24), 1, 0.5)]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "lengths,lengths,degree,time_s\n1,2,3,4\n", r"column\(s\) lengths twice"),
        ("a.json", '[{"lengths": [1], "degree": 1, "time_s": ' + "9" * 5000 + "}]", "cannot be read"),
        ("a.csv", "lengths,degree,time_s\n5,x,1\n", "row 2 has degree 'x'"),
        ("a.csv", "lengths,degree\n5,1\n", r"lacks the key\(s\) time_s"),
        ("a.csv", "lengths,degree,time_s,speed\n5,1,1,1\n", r"unknown key\(s\) speed"),
        ("a.csv", "lengths,degree,time_s\n5,1,nan\n", "time_s is nan"),
        ("a.csv", "lengths,degree,time_s\n5,1,1,9\n", "more cells than columns"),
        ("a.csv", "lengths,degree,time_s,spans_nodes\n5,1,1,maybe\n", "spans_nodes 'maybe'; expected true, false"),
        ("a.json", '[{"lengths": [1], "degree": 1, "time_s": 1, "spans_nodes": 1}]', "spans_nodes is 1"),
        ("a.json", '[{"lengths": [1], "degree": 1, "time_s": 1, "recompute": ""}]', "recompute is ''"),
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


KINDS = make_model(
    model_state_bytes_fixed=5e5,
    communication_s=((2, 1e-6), (4, 2e-6)),
    between_nodes_s=((2, 4e-6), (4, 9e-6)),
    methods=(MethodCost(name="ring", communication_s=((2, 3e-6),), between_nodes_s=((4, 2e-5),), fixed_s=0.003),),
    recompute_policies=(
        RecomputePolicy(name="full", bytes_per_token=300.0, compute_factor=1.3, communication_factor=1.5),
    ),
    per_sequence_s=1e-3,
    gpus_per_node=4,
)


def measured_kinds(noise: float = 0.0) -> list[Sample]:
    kinds = [
        GroupKind(1),
        *[GroupKind(d, "ulysses", spans_nodes=spans) for d in (2, 4) for spans in (False, True)],
        GroupKind(2, "ring"),
        GroupKind(4, "ring", spans_nodes=True),
        GroupKind(1, "local", "full"),
        GroupKind(2, "ulysses", "full"),
        GroupKind(4, "ring", "full", spans_nodes=True),
    ]
    generator = np.random.default_rng(5)
    samples = []
    for kind in kinds:
        for lengths in [(100,), (1000,), (8000,), (4000, 4000), (30000,), (500,) * 20, (50,) * 90, (20000, 10, 3000)]:
            time_s = KINDS.kind_time_s(lengths, kind) * (1 + noise * generator.uniform(-1, 1))
            memory = KINDS.kind_memory_bytes(sum(lengths), kind, NUM_RANKS)
            attention = kind.attention if kind.attention == "ring" else None
            samples.append(Sample(lengths, kind.degree, time_s, memory, attention, kind.spans_nodes, kind.recompute))
    return samples


def test_methods_links_policies_and_time_per_sequence_are_found() -> None:
    found = fit(measured_kinds(), gpus_per_node=4, num_kv_heads=2, unsharded_state_bytes=7.0)
    model = found.cost_model
    keys = ("per_sequence_s", "a1_s_per_token2", "a2_s_per_token", "b1_s", "b2_s", "bytes_per_token")
    for key in (*keys, "model_state_bytes_fixed"):
        assert getattr(model, key) == pytest.approx(getattr(KINDS, key), rel=1e-5), key
    assert dict(model.communication_s) == pytest.approx(dict(KINDS.communication_s), rel=1e-4)
    assert dict(model.between_nodes_s) == pytest.approx(dict(KINDS.between_nodes_s), rel=1e-4)
    ring = model.method_cost("ring")
    assert dict(ring.communication_s) == pytest.approx({2: 3e-6}, rel=1e-4)
    assert dict(ring.between_nodes_s) == pytest.approx({4: 2e-5}, rel=1e-4)
    assert ring.fixed_s == pytest.approx(0.003, rel=1e-4)
    full = model.recompute_policy("full")
    assert full.bytes_per_token == pytest.approx(300.0, rel=1e-6)
    assert full.compute_factor == pytest.approx(1.3, rel=1e-6)
    assert full.communication_factor == pytest.approx(1.5, rel=1e-4)
    assert (model.gpus_per_node, model.num_kv_heads, model.unsharded_state_bytes) == (4, 2, 7.0)
    assert found.mean_relative_error < 1e-6
    assert CostModel.from_json(model.to_json()) == model


def test_time_per_sequence_is_left_out_where_it_does_not_explain_clearly_more() -> None:
    assert fit(measured()).cost_model.per_sequence_s == 0.0
    found = fit(measured_kinds(noise=0.05))
    assert found.cost_model.per_sequence_s == pytest.approx(1e-3, rel=0.2)
    assert 0.0 < found.mean_relative_error < 0.05


def test_link_between_nodes_is_never_fitted_faster_than_inside() -> None:
    samples = [dataclasses.replace(s, time_s=s.time_s * 0.97) if s.spans_nodes else s for s in measured_kinds()]
    swapped = [dataclasses.replace(s, spans_nodes=s.degree > 1 and not s.spans_nodes) for s in samples]
    model = fit(swapped).cost_model
    assert all(seconds >= model.communication_s_per_share(d) for d, seconds in model.between_nodes_s)


def test_known_half_length_is_kept_apart_from_linear_compute() -> None:
    truth = make_model(half_length_tokens=400.0)
    found = fit(measured(model=truth), half_length_tokens=400.0, bytes_per_token=2000.0)
    assert found.cost_model.a2_s_per_token == pytest.approx(truth.a2_s_per_token, rel=1e-6)
    assert found.cost_model.half_length_tokens == 400.0
    assert dict(found.cost_model.communication_s) == pytest.approx({2: 1e-6, 4: 2e-6}, rel=1e-5)
