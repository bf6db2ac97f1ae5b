"""The cost model: formulas, presets, strict JSON."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from planner import CostModel, CostModelError, InfeasibleError, list_presets, load_preset

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
        ({"schema_version": 2}, "schema_version 2"),
        ({"communication_s": {"two": 1.0}}, "the key 'two'"),
        ({"communication_s": {"1": 1.0}}, "communication_s degree is 1"),
        ({"communication_s": {"2": -1.0}}, r"communication_s\[2\] is -1.0"),
        ({"communication_s": [1]}, "communication_s is"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"name": ""}, "name is ''"),
        ({"metadata": 3}, "metadata is 3"),
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
