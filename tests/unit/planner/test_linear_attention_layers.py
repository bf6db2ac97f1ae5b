"""Models with linear layers: no quadratic time, states that do not grow with the length, plans and bounds that hold."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from planner import (
    CostModel,
    CostModelError,
    GroupKind,
    LayerMix,
    LinearAttentionShape,
    Link,
    RecomputePolicy,
    Sample,
    explain_plan,
    fit_cost_model,
    flexsp_plan,
    load_preset,
    plan_step,
    simulate,
    state_exchange_table,
    validate_plan,
    with_linear_layers,
)

from .planner_cases import brute_force_makespan, long_tail, make_model

SHAPE = LinearAttentionShape(num_heads=16, key_size=128, value_size=128)
LINEAR = LayerMix(num_softmax_layers=0, num_linear_layers=16, shape=SHAPE)
HYBRID = LayerMix(num_softmax_layers=4, num_linear_layers=12, shape=SHAPE)
STATES = ((2, 0.002), (4, 0.003), (8, 0.009))
PROBES = [(100,), (1000,), (8000,), (4000, 4000), (30000,), (500,) * 20, (20000, 10, 3000)]


def linear_model(**changes: Any) -> CostModel:
    """Fully linear, without tables."""
    return make_model(
        **{
            "a1_s_per_token2": 0.0,
            "communication_s": (),
            "softmax_layer_share": 0.0,
            "state_exchange_s": 0.002,
            **changes,
        }
    )


def measured(model: CostModel, methods: tuple[str, ...] = ("ulysses",), noise: float = 0.0) -> list[Sample]:
    draws = np.random.default_rng(0)
    return [
        Sample(lengths, degree, time_s * (1 + noise * draws.uniform(-1, 1)), attention=method)
        for degree in (1, 2, 4, 8)
        for lengths in PROBES
        for method in (methods if degree > 1 else methods[:1])
        for time_s in [model.kind_time_s(lengths, GroupKind(degree, method if degree > 1 else "local"))]
    ]


def fit(samples: list[Sample], layers: LayerMix, **changes: Any) -> CostModel:
    constants = {"num_ranks": 8, "model_state_bytes_total": 1e6, "memory_limit_bytes": 2e7, "bytes_per_token": 2000.0}
    return fit_cost_model(samples, name="fitted", layers=layers, **{**constants, **changes}).cost_model


def test_states_cost_the_same_whatever_the_length_and_nothing_at_degree_1() -> None:
    model = linear_model(state_exchange_by_degree_s=STATES, state_exchange_between_nodes_s=((2, 0.004), (8, 0.02)))
    for lengths in ([10], [30000], [5, 5, 5]):
        kind = GroupKind(4, "ulysses")
        assert model.kind_state_exchange_s(kind) == 0.002 + 0.003
        assert model.time_parts(lengths, kind).fixed_s == pytest.approx(0.02 + 0.004 + 0.005)
        assert model.time_parts(lengths, kind).communication_s == 0
        assert model.time_parts(lengths, kind).quadratic_s == 0
    # Degrees that are not listed as in every table; between nodes by the other one.
    assert [model.kind_state_exchange_s(GroupKind(d, "ring")) for d in (1, 3, 64)] == [0, 0.005, 0.011]
    assert model.kind_state_exchange_s(GroupKind(4, "ring", spans_nodes=True)) == 0.022


def test_tables_of_states_round_trip_and_are_left_out_where_empty() -> None:
    preset = load_preset("flexsp-gpt7b-64xa100-40g")
    assert not any("state_exchange_by" in key for key in preset.to_content())
    model = linear_model(state_exchange_by_degree_s=STATES)
    assert CostModel.from_json(model.to_json()) == model
    assert json.loads(model.to_json())["state_exchange_by_degree_s"] == {"2": 0.002, "4": 0.003, "8": 0.009}
    with pytest.raises(CostModelError, match=r"state_exchange_between_nodes_s gives 0\.001 s at degree 2"):
        linear_model(state_exchange_by_degree_s=STATES, state_exchange_between_nodes_s=((2, 0.001),))


def test_fit_of_a_fully_linear_model_finds_states_and_nothing_quadratic() -> None:
    truth = linear_model(state_exchange_s=0.0, state_exchange_by_degree_s=STATES, b2_s=0.0)
    found = fit(measured(truth), LINEAR, num_heads=6, num_kv_heads=6)
    assert (found.a1_s_per_token2, found.softmax_layer_share) == (0, 0)
    # Free, but the table still says which degrees were measured.
    assert found.communication_s == ((2, 0.0), (4, 0.0), (8, 0.0))
    assert dict(found.state_exchange_by_degree_s) == pytest.approx(dict(STATES), rel=1e-6)
    assert found.a2_s_per_token == pytest.approx(truth.a2_s_per_token, rel=1e-6)
    # Nothing runs the attention method whose name groups carry, so its heads limit nothing.
    assert (found.attention, found.num_heads, found.allows_degree(8)) == ("ulysses", None, True)
    assert found.metadata["layers"]["num_linear_layers"] == 16
    assert CostModel.from_json(found.to_json()) == found


def test_noise_never_becomes_quadratic_time_of_a_fully_linear_model() -> None:
    truth = linear_model(state_exchange_s=0.0, state_exchange_by_degree_s=STATES)
    samples = measured(truth, noise=0.1)
    assert fit(samples, LINEAR).a1_s_per_token2 == 0
    assert fit(samples, LINEAR).kind_time_s([50000], GroupKind(1)) == pytest.approx(
        truth.kind_time_s([50000], GroupKind(1)), rel=0.1
    )


def test_fit_of_a_hybrid_tells_rows_of_softmax_layers_from_states() -> None:
    truth = make_model(softmax_layer_share=0.25, state_exchange_by_degree_s=STATES, b2_s=0.0)
    ring = dataclasses.replace(truth.method_cost("ring"), communication_s=((2, 2e-6), (4, 3e-6), (8, 4e-6)))
    truth = dataclasses.replace(truth, methods=(ring,))
    found = fit(measured(truth, ("ulysses", "ring")), HYBRID)
    assert found.softmax_layer_share == 0.25
    assert found.a1_s_per_token2 == pytest.approx(truth.a1_s_per_token2, rel=1e-6)
    assert dict(found.communication_s) == pytest.approx(dict(truth.communication_s), rel=1e-5)
    assert dict(found.methods[0].communication_s) == pytest.approx(dict(ring.communication_s), rel=1e-5)
    assert dict(found.state_exchange_by_degree_s) == pytest.approx(dict(STATES), rel=1e-5)


@pytest.mark.parametrize("method", ["ulysses", "auto"])
def test_linear_layers_that_may_trade_rows_keep_a_cost_per_token(method: str) -> None:
    truth = make_model(a1_s_per_token2=0.0, b2_s=0.0)
    layers = dataclasses.replace(LINEAR, method=method)
    found = fit(measured(truth), layers)
    assert found.a1_s_per_token2 == 0
    assert dict(found.communication_s) == pytest.approx(dict(truth.communication_s), rel=1e-5)
    assert found.softmax_layer_share == 1


def test_recompute_is_fitted_beside_states() -> None:
    policy = RecomputePolicy(name="full", bytes_per_token=500.0, compute_factor=1.25)
    truth = linear_model(
        state_exchange_s=0.0, state_exchange_by_degree_s=STATES, recompute_policies=(policy,), b2_s=0.0
    )
    again = [
        Sample((s,), d, truth.kind_time_s([s], kind), truth.kind_memory_bytes(s, kind, 8), "ulysses", recompute="full")
        for d in (1, 2, 4)
        for s in (4000, 20000)
        for kind in [GroupKind(d, "ulysses" if d > 1 else "local", "full")]
    ]
    found = fit(measured(truth) + again, LINEAR)
    assert found.recompute_policies[0].compute_factor == pytest.approx(1.25, rel=1e-6)


def test_state_exchange_is_latency_and_state_bytes_of_all_layers_both_ways() -> None:
    link = Link(bandwidth_bytes_per_s=1e9, latency_s=1e-4)
    table = dict(state_exchange_table(HYBRID, (2, 4), lambda degree: link))
    assert table[2] == pytest.approx(12 * 2 * (1e-4 + SHAPE.state_bytes / 1e9))
    last_receives = 3 * SHAPE.state_bytes + 2 * SHAPE.transition_bytes
    assert table[4] == pytest.approx(12 * 2 * (1e-4 + last_receives / 1e9))
    serial = dict(state_exchange_table(dataclasses.replace(HYBRID, method="lasp1"), (4,), lambda degree: link))
    assert serial[4] == pytest.approx(12 * 2 * 3 * (1e-4 + SHAPE.state_bytes / 1e9))
    assert state_exchange_table(dataclasses.replace(HYBRID, method="ulysses"), (4,), lambda degree: link) == ()
    with pytest.raises(CostModelError, match="shape of the linear layers is unknown"):
        state_exchange_table(dataclasses.replace(HYBRID, shape=None), (4,), lambda degree: link)


def test_a_softmax_model_with_linear_layers_keeps_only_the_others_share() -> None:
    softmax = make_model(num_heads=4)
    hybrid = with_linear_layers(softmax, HYBRID, state_exchange_s=STATES, linear_s_per_token=1e-7)
    kind = GroupKind(4, "ulysses")
    before, after = softmax.time_parts([20000], kind), hybrid.time_parts([20000], kind)
    assert after.quadratic_s == pytest.approx(before.quadratic_s / 4)
    assert after.communication_s == pytest.approx(before.communication_s / 4)
    assert after.linear_s == pytest.approx(before.linear_s + 12 * 1e-7 * 20000 / 4)
    assert after.fixed_s == pytest.approx(before.fixed_s + 0.003)
    assert hybrid.num_heads == 4
    linear = with_linear_layers(softmax, LINEAR, state_exchange_s=STATES)
    assert (linear.num_heads, linear.time_parts([20000], kind).quadratic_s) == (None, 0)
    with pytest.raises(CostModelError, match=r"softmax_layer_share 0.25; expected 1"):
        with_linear_layers(hybrid, HYBRID, state_exchange_s=STATES)
    with pytest.raises(CostModelError, match="may exchange rows"):
        with_linear_layers(softmax, dataclasses.replace(HYBRID, method="ulysses"), state_exchange_s=())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_softmax_layers": 0}, "has no layers"),
        ({"num_softmax_layers": 1, "method": "ring"}, "expected one of lasp2"),
        ({"num_softmax_layers": -1}, "num_softmax_layers"),
    ],
)
def test_impossible_layers_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(CostModelError, match=message):
        LayerMix(**arguments)


@pytest.mark.parametrize("sync", ["per-layer", "per-step"])
def test_plans_bounds_and_explanations_of_a_fully_linear_model(sync: str) -> None:
    model = linear_model(unsharded_state_bytes=1e5)
    lengths = [*long_tail(14, 3), 30000]
    plan = plan_step(lengths, num_ranks=8, cost_model=model, sync=sync, node_limit=50)
    assert validate_plan(plan, lengths, model) == []
    assert 0 < plan.lower_bound_s <= plan.predicted_step_time_s
    shared = [group for micro_batch in plan.micro_batches for group in micro_batch.groups if group.degree > 1]
    # The longest sequence needs more than one rank's memory; groups carry the configured method's name.
    assert shared
    assert {group.attention for group in shared} == {"ulysses"}
    assert explain_plan(plan, lengths, model, node_limit=2, num_long_sequences=1).lines()


def test_a_fully_linear_model_plans_as_well_as_brute_force() -> None:
    model = linear_model(fixed_step_s=0.0)
    lengths = [9000, 3000, 2500, 400, 100]
    plan = plan_step(lengths, num_ranks=4, cost_model=model, node_limit=50)
    assert plan.micro_batches[0].predicted_time_s <= brute_force_makespan(lengths, 4, model, (1, 2, 4)) * (1 + 1e-9)


def test_only_memory_or_balance_give_long_documents_of_linear_models_large_degrees() -> None:
    lengths = [30000] * 8

    def degrees(model: CostModel) -> set[int]:
        plan = plan_step(lengths, 8, model, node_limit=100)
        return {group.degree for micro_batch in plan.micro_batches for group in micro_batch.groups}

    assert degrees(linear_model(memory_limit_bytes=1e9)) == {1}
    assert min(degrees(linear_model())) > 1


def test_simulation_and_flexsp_cope_without_quadratic_time() -> None:
    model = linear_model(memory_limit_bytes=1e8)
    batches = [long_tail(24, seed) for seed in range(2)]
    made = simulate(batches, [8], model, node_limit=50)
    assert made.steps
    assert all(step.gap is None or step.gap >= 0 for step in made.steps)
    plan = flexsp_plan(batches[0], 8, model, solver_cpu_s=0.2)
    assert validate_plan(plan, batches[0], model) == []
    assert plan.lower_bound_s <= plan.predicted_step_time_s
