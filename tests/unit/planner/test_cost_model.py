"""The cost model: formulas, presets, strict JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner import (
    CostModel,
    CostModelError,
    GroupKind,
    InfeasibleError,
    MethodCost,
    RecomputePolicy,
    list_presets,
    load_preset,
)
from planner.cost_model import NO_LIMIT_TOKENS

PRESET_7B = "flexsp-gpt7b-64xa100-40g"
MIB = 2**20


def small_model(**changes: Any) -> CostModel:
    constants: dict[str, Any] = {
        "name": "test",
        "a1_s_per_token2": 1e-6,
        "a2_s_per_token": 1e-3,
        "b1_s": 0.5,
        "b2_s": 0.25,
        "communication_s": ((2, 1e-4), (8, 4e-4)),
        "bytes_per_token": 10.0,
        "model_state_bytes_total": 4000.0,
        "model_state_bytes_fixed": 100.0,
        "memory_limit_bytes": 5000.0,
    }
    return CostModel(**{**constants, **changes})


def test_preset_7b_holds_the_published_tokens_per_gpu() -> None:
    assert load_preset(PRESET_7B).capacity_tokens(1, 64) == pytest.approx(6407.95, abs=0.005)


@pytest.mark.parametrize(
    ("size", "layers", "hidden", "a1", "a2", "b1", "mib_per_token", "states"),
    [
        ("7b", 32, 4096, 5.128e-6, 0.1839576, 629.3563, 4.480441895, 7.8498687744140625),
        ("13b", 40, 5120, 9.2852e-6, 0.3060189, 1132.5632, 4.2204, 14.032),
        ("30b", 60, 6656, 15.4262e-6, 0.8035742, 2789.3644, 3.4174, 32.715),
    ],
)
def test_presets_follow_the_released_arithmetic(
    size: str, layers: int, hidden: int, a1: float, a2: float, b1: float, mib_per_token: float, states: float
) -> None:
    model = load_preset(f"flexsp-gpt{size}-64xa100-40g")
    lengths = [20000, 3000, 7]
    tokens = sum(lengths)
    for degree, v in {2: 119.54, 4: 104.07, 8: 96.5, 16: 10.33, 32: 5.94, 64: 4.87}.items():
        compute_ms = sum(a1 * s * s + a2 * s for s in lengths) / degree
        all_to_all_mib = 16 * layers * hidden * tokens / (2**20 * degree)
        expected_ms = compute_ms + b1 + all_to_all_mib / v
        assert model.group_time_s(lengths, degree) == pytest.approx(expected_ms / 1000, rel=1e-12)
    assert model.group_time_s([100], 1) == pytest.approx((a1 * 1e4 + a2 * 100 + b1) / 1000, rel=1e-12)
    expected_mib = tokens / 8 * mib_per_token + states * 16 * 1024 / 64
    assert model.group_memory_bytes(lengths, 8, 64) == pytest.approx(expected_mib * MIB, rel=1e-12)
    assert model.memory_limit_bytes == 30 * 1024 * MIB
    assert "2412.01523" in model.metadata["source"]


def test_unknown_preset_lists_those_that_exist() -> None:
    with pytest.raises(CostModelError, match=r"unknown preset 'gpt5'.*flexsp-gpt13b.*flexsp-gpt30b.*flexsp-gpt7b"):
        load_preset("gpt5")
    assert len(list_presets()) == 3


def test_degree_without_communication_constant_uses_the_next_listed_and_above_the_largest_the_largest() -> None:
    model = small_model()
    assert [model.communication_s_per_share(d) for d in (1, 2, 3, 8, 9, 64)] == [0.0, 1e-4, 4e-4, 4e-4, 4e-4, 4e-4]
    assert small_model(communication_s=()).communication_s_per_share(4) == 0.0


def test_fixed_cost_of_shared_groups_only_above_degree_one() -> None:
    model = small_model(a1_s_per_token2=0.0, a2_s_per_token=0.0, communication_s=())
    assert model.group_time_s([9], 1) == 0.5
    assert model.group_time_s([9], 2) == 0.75


def test_max_tokens_is_the_last_whole_count_within_the_limit() -> None:
    for degree in (1, 2, 3, 5, 8):
        for bytes_per_token in (10.0, 0.1, 3.3333):
            model = small_model(bytes_per_token=bytes_per_token)
            tokens = model.max_tokens(degree, 4)
            assert model.group_memory_bytes([tokens], degree, 4) <= model.memory_limit_bytes
            assert model.group_memory_bytes([tokens + 1], degree, 4) > model.memory_limit_bytes
    assert small_model(model_state_bytes_total=1e9).max_tokens(1, 4) == -1
    assert small_model(bytes_per_token=0.0).max_tokens(1, 4) > 10**12


def test_ulysses_needs_heads_that_divide() -> None:
    model = small_model(num_heads=6)
    assert [d for d in range(1, 9) if model.allows_degree(d)] == [1, 2, 3, 6]
    assert model.allows_degree(4, attention="ring")


def test_json_round_trip_keeps_value_and_hash(tmp_path: Path) -> None:
    model = small_model(num_heads=8, metadata={"hardware": "cpu", "residuals": [0.1]})
    model.save(tmp_path / "model.json")
    again = CostModel.load(tmp_path / "model.json")
    assert again == model
    assert again.sha256 == model.sha256
    assert pickle.loads(pickle.dumps(model)) == model
    assert dataclasses.replace(model, b1_s=0.6).sha256 != model.sha256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"surprise": 1}, "unknown key.*surprise"),
        ({"b1_s": None}, "b1_s is None"),
        ({"b1_s": "fast"}, "b1_s is 'fast'"),
        ({"b1_s": True}, "b1_s is True"),
        ({"a1_s_per_token2": -1.0}, "a1_s_per_token2 is -1.0"),
        ({"memory_limit_bytes": 0}, "memory_limit_bytes is 0.0"),
        ({"schema_version": 3}, "schema_version 3"),
        ({"communication_s": {"two": 1.0}}, "the key 'two'"),
        ({"communication_s": {"1": 1.0}}, "communication_s degree is 1"),
        ({"communication_s": {"2": -1.0}}, r"communication_s\[2\] is -1.0"),
        ({"communication_s": [1]}, "communication_s is"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"name": ""}, "name is ''"),
        ({"metadata": 3}, "metadata is 3"),
        ({"attention": "bogus"}, "attention is 'bogus'; expected one of ring"),
        ({"overlap": 1.5}, "overlap is 1.5; expected a share from 0 to 1"),
        ({"zero_overlap": -0.1}, "zero_overlap is -0.1"),
        ({"causal_factor": 0}, "causal_factor is 0.0"),
        ({"gpus_per_node": 0}, "gpus_per_node is 0"),
        ({"num_kv_heads": 2.5}, "num_kv_heads is 2.5"),
        ({"unsharded_state_bytes": -1}, "unsharded_state_bytes is -1"),
        ({"between_nodes_s": {"2": 1e-5}}, "between_nodes_s gives 1e-05 s at degree 2, below the 0.0001 s"),
        ({"between_nodes_s": {"2": 2e-4}}, "between_nodes_s gives 0.0002 s at degree 8, below the 0.0004 s"),
        ({"methods": {}}, "methods is {}"),
        ({"methods": [{"name": "bogus"}]}, "methods name is 'bogus'"),
        ({"methods": [{"name": "ulysses"}]}, "methods lists ulysses besides the primary"),
        ({"methods": [{"name": "ring"}, {"name": "ring"}]}, "methods lists ring"),
        ({"methods": [{"name": "ring", "speed": 1}]}, r"methods\[0\] has unknown key\(s\) speed"),
        ({"methods": [{"name": "ring", "overlap": 2}]}, "method ring: overlap is 2.0"),
        ({"methods": [{"name": "ring", "communication_s": {"x": 2}}]}, r"methods\[0\].communication_s has the key 'x'"),
        ({"recompute_policies": [{"name": "full"}]}, r"recompute_policies\[0\] lacks the key\(s\) bytes_per_token"),
        ({"recompute_policies": [{"name": "default", "bytes_per_token": 1}]}, "lists default besides the primary"),
        ({"recompute_policies": [{"name": "x", "bytes_per_token": 1, "compute_factor": 0}]}, "compute_factor is 0.0"),
    ],
)
def test_malformed_cost_model_is_refused_with_the_key(change: dict[str, Any], message: str) -> None:
    content = {**json.loads(small_model().to_json()), **change}
    with pytest.raises(CostModelError, match=message):
        CostModel.from_json(json.dumps(content))


@pytest.mark.parametrize(
    "text", ["{", "[]", "3", '{"schema_version": 1, "schema_version": 1}', '{"a": NaN}', "[" * 99999]
)
def test_text_that_is_no_cost_model_is_refused(text: str) -> None:
    with pytest.raises(CostModelError):
        CostModel.from_json(text)


def test_numbers_beyond_what_can_be_read_are_refused_as_input() -> None:
    with pytest.raises(CostModelError, match="holds a number that cannot be read"):
        CostModel.from_json('{"schema_version": 2, "b1_s": ' + "9" * 10_000 + "}")
    content = {**load_preset("flexsp-gpt7b-64xa100-40g").to_content(), "num_heads": 10**30}
    with pytest.raises(CostModelError, match=r"num_heads is above 2\^63 - 1"):
        CostModel.from_json(json.dumps(content))


def test_missing_key_and_missing_file_are_named(tmp_path: Path) -> None:
    content = json.loads(small_model().to_json())
    del content["b1_s"]
    with pytest.raises(CostModelError, match=r"lacks the key\(s\) b1_s"):
        CostModel.from_json(json.dumps(content))
    with pytest.raises(CostModelError, match=r"nowhere\.json"):
        CostModel.load(tmp_path / "nowhere.json")
    with pytest.raises(CostModelError, match="nan"):
        small_model(b1_s=float("nan"))


def test_errors_survive_pickling() -> None:
    error = pickle.loads(pickle.dumps(InfeasibleError("sequence 3 is too long")))
    assert isinstance(error, InfeasibleError)
    assert str(error) == "sequence 3 is too long"


RICH: dict[str, Any] = {
    "methods": (
        MethodCost(
            name="ring",
            communication_s=((2, 2e-4), (4, 3e-4)),
            between_nodes_s=((2, 1e-3), (16, 2e-3)),
            overlap=0.5,
            fixed_s=0.125,
        ),
    ),
    "recompute_policies": (
        RecomputePolicy(name="full", bytes_per_token=2.0, compute_factor=1.25, communication_factor=1.5),
    ),
    "communication_s": ((2, 1e-4), (8, 4e-4), (16, 9e-4)),
    "overlap": 0.25,
    "method_fixed_s": 0.0625,
    "half_length_tokens": 50.0,
    "per_sequence_s": 1e-3,
    "causal_factor": 0.5,
    "softmax_layer_share": 0.75,
    "state_exchange_s": 0.03125,
    "zero_traffic_s": 2.0,
    "zero_overlap": 0.75,
    "unsharded_state_bytes": 300.0,
    "gpus_per_node": 8,
}


def naive_sequence_s(model: CostModel, s: int, kind: GroupKind) -> float:
    """The formula of one sequence, with the tables read out by hand."""
    policy = model.recompute_policy(kind.recompute)
    method = {"ring": RICH["methods"][0]}.get(kind.attention)
    inside = dict(method.communication_s if method else model.communication_s)
    between = dict(method.between_nodes_s if method else model.between_nodes_s)
    d, a1 = kind.degree, model.a1_s_per_token2 * model.causal_factor * model.softmax_layer_share
    quadratic = policy.compute_factor * a1 * (s * s / d + model.half_length_tokens * s) / kind.speed
    linear = policy.compute_factor * model.a2_s_per_token * s / d / kind.speed + model.per_sequence_s
    if d == 1:
        return quadratic + linear
    table, wanted = inside, d
    if kind.spans_nodes and between:
        table = between
    elif kind.spans_nodes and d <= 8:
        wanted = 16
    constant = table[min([degree for degree in table if degree >= wanted], default=max(table))]
    traffic = policy.communication_factor * model.softmax_layer_share * constant * s / d
    return quadratic + linear + max(0.0, traffic - (method.overlap if method else model.overlap) * quadratic)


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 10**6), max_size=6),
    degree=st.integers(1, 40),
    attention=st.sampled_from(["ulysses", "ring", "token_ring"]),
    recompute=st.sampled_from(["default", "full"]),
    spans_nodes=st.booleans(),
    speed=st.floats(0.1, 4.0),
)
def test_sequence_times_follow_the_formula_and_add_up(
    lengths: list[int], degree: int, attention: str, recompute: str, spans_nodes: bool, speed: float
) -> None:
    model = small_model(**RICH)
    kind = GroupKind(degree, attention, recompute, spans_nodes, speed)
    expected = [naive_sequence_s(model, s, kind) for s in lengths]
    assert model.sequence_times_s(lengths, kind) == pytest.approx(expected, rel=1e-12)
    assert model.sequence_times_s(np.asarray(lengths), kind) == pytest.approx(expected, rel=1e-12)
    fixed_s = 0.5 + (0 if degree == 1 else 0.25 + (0.125 if attention == "ring" else 0.0625) + 0.03125)
    for sync, zero_s in (("per-layer", 0.5), ("per-step", 0.0)):
        assert model.kind_fixed_s(kind, sync) == pytest.approx(fixed_s + zero_s, rel=1e-12)
        time_s = model.kind_time_s(iter(lengths), kind, sync)
        assert time_s == pytest.approx(sum(expected) + fixed_s + zero_s, rel=1e-12)
        assert time_s == model.kind_time_s(lengths[::-1], kind, sync)
        assert model.time_parts(lengths, kind, sync).total_s == pytest.approx(time_s, rel=1e-12)
    primary = GroupKind(degree, "ulysses")
    assert model.group_time_s(lengths, degree) == model.kind_time_s(lengths, primary)
    assert model.group_memory_bytes(lengths, degree, 4) == model.kind_memory_bytes(sum(lengths), primary, 4)


@settings(max_examples=150, deadline=None)
@given(
    degree=st.integers(1, 64),
    bytes_per_token=st.floats(1e-9, 1e7),
    states=st.floats(0.0, 1e12),
    limit=st.floats(1.0, 1e12),
    sync=st.sampled_from(["per-layer", "per-step"]),
)
def test_kind_max_tokens_is_the_last_count_within_the_limit(
    degree: int, bytes_per_token: float, states: float, limit: float, sync: str
) -> None:
    model = small_model(**{**RICH, "model_state_bytes_total": states, "bytes_per_token": bytes_per_token})
    kind = GroupKind(degree, "ring", memory_limit_bytes=limit)
    tokens = model.kind_max_tokens(kind, 8, sync)
    assert -1 <= tokens <= NO_LIMIT_TOKENS
    if tokens >= 0:
        assert model.kind_memory_bytes(tokens, kind, 8, sync) <= limit
    if tokens < NO_LIMIT_TOKENS:
        assert model.kind_memory_bytes(tokens + 1, kind, 8, sync) > limit


def test_memory_by_recompute_policy_sync_and_gpu() -> None:
    model = small_model(**RICH)
    assert model.kind_memory_bytes(100, GroupKind(2, "ring"), 4) == 500 + 1000 + 100
    assert model.kind_memory_bytes(100, GroupKind(2, "ring", "full"), 4, "per-step") == 100 + 1000 + 100 + 300
    assert model.kind_max_tokens(GroupKind(1), 4) == 390
    assert model.kind_max_tokens(GroupKind(1, memory_limit_bytes=1200.0), 4) == 10
    assert model.kind_max_tokens(GroupKind(1, memory_limit_bytes=1000.0), 4) == -1
    assert model.step_fixed_s("per-layer") == 0.0
    assert model.step_fixed_s("per-step") == 0.5
    with pytest.raises(CostModelError, match="expected unsharded_state_bytes"):
        small_model().kind_max_tokens(GroupKind(1), 4, "per-step")
    with pytest.raises(CostModelError, match="sync is 'sometimes'; expected one of per-layer, per-step"):
        model.kind_fixed_s(GroupKind(1), "sometimes")


def test_group_that_spans_nodes_needlessly_costs_the_narrowest_measured_link() -> None:
    preset = load_preset(PRESET_7B)
    assert preset.gpus_per_node == 8
    table = dict(preset.communication_s)

    def constant_s(degree: int, *, spans_nodes: bool) -> float:
        kind = GroupKind(degree, "ulysses", spans_nodes=spans_nodes)
        return float(preset.communication_times_s([degree], kind)[0])

    assert [constant_s(d, spans_nodes=True) for d in (2, 3, 8)] == pytest.approx([table[16]] * 3)
    assert [constant_s(d, spans_nodes=False) for d in (2, 3, 8)] == pytest.approx([table[2], table[4], table[8]])
    assert constant_s(32, spans_nodes=True) == pytest.approx(table[32])
    no_wider = small_model(gpus_per_node=8)
    assert float(no_wider.communication_times_s([2], GroupKind(2, "ulysses", spans_nodes=True))[0]) == 1e-4


def test_methods_and_policies_by_name() -> None:
    model = small_model(**RICH)
    assert model.attentions == ("ulysses", "ring")
    assert model.method_cost("ring") is RICH["methods"][0]
    assert model.method_cost("token_ring").communication_s == model.communication_s
    assert (model.method_cost("ulysses").overlap, model.method_cost("ulysses").fixed_s) == (0.25, 0.0625)
    assert model.recompute_policy("default").bytes_per_token == 10.0
    assert model.knows_method("all_gather")
    assert not model.knows_method("local")
    with pytest.raises(CostModelError, match=r"no attention method 'bogus'.*expected one of ring.*ulysses, ring\)"):
        model.method_cost("bogus")
    with pytest.raises(CostModelError, match="no recompute policy 'some'; expected one of default, full"):
        model.recompute_policy("some")
    for kind in (GroupKind(0), GroupKind(1, speed=0.0), GroupKind(1, speed=math.nan), GroupKind(2)):
        with pytest.raises(CostModelError):
            model.sequence_times_s([5], kind)


def test_ulysses_needs_key_value_heads_that_share_or_repeat_evenly() -> None:
    model = small_model(num_heads=24, num_kv_heads=6)
    assert [d for d in range(1, 25) if model.allows_degree(d)] == [1, 2, 3, 6, 12, 24]
    assert model.allows_degree(8, attention="ring")


def test_version_2_round_trips_and_version_1_is_read_but_knows_no_later_key() -> None:
    model = small_model(**RICH)
    again = CostModel.from_json(model.to_json())
    assert again == model
    assert again.sha256 == model.sha256
    assert json.loads(model.to_json())["schema_version"] == 2
    first = {
        "schema_version": 1,
        "name": "old",
        "a1_s_per_token2": 1.0,
        "a2_s_per_token": 1.0,
        "b1_s": 1.0,
        "communication_s": {"2": 1.0},
        "bytes_per_token": 1.0,
        "model_state_bytes_total": 1.0,
        "memory_limit_bytes": 9.0,
    }
    assert CostModel.from_json(json.dumps(first)).group_time_s([2], 2) == 2 + 1 + 1 + 1
    with pytest.raises(CostModelError, match=r"unknown key\(s\) overlap"):
        CostModel.from_json(json.dumps({**first, "overlap": 0.5}))
    for version in (0, 3, True, 1.0, "2"):
        with pytest.raises(CostModelError, match="reads versions 1 and 2"):
            CostModel.from_json(json.dumps({**first, "schema_version": version}))
