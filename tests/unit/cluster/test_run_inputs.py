"""Cost models that are given: what the workers cannot run is refused by name, what only they know is filled in."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from planner import CostModel, MethodCost, RecomputePolicy
from planner.method_cost import METHOD_NAMES
from raysp.attention import METHODS
from raysp.cluster.run_inputs import for_model, read_cost_model
from raysp.config import Config, parse_config
from raysp.errors import InputError
from raysp.train.session import ModelSize

_MODEL = CostModel(
    name="test",
    a1_s_per_token2=2e-9,
    a2_s_per_token=4e-6,
    b1_s=0.02,
    communication_s=((2, 1e-5),),
    bytes_per_token=2000.0,
    model_state_bytes_total=1e6,
    memory_limit_bytes=2e7,
    attention="ring",
)
_SIZE = ModelSize(
    num_parameters=1000,
    num_embedding_parameters=100,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    hidden_size=32,
    largest_layer_parameters=300,
)


def _config(path: Path | None = None, *, dtype: str = "bf16", method: str = "auto", **planner: object) -> Config:
    return parse_config(
        {
            "model": {"config": {}},
            "data": {"path": "unused", "tokens_per_step": 1},
            "train": {"dtype": dtype},
            "attention": {"method": method},
            "planner": {**({"cost_model": str(path)} if path else {}), **planner},
        },
        source="test",
    )


def _saved(tmp_path: Path, **changes: object) -> Path:
    path = tmp_path / "model.json"
    dataclasses.replace(_MODEL, **changes).save(path)
    return path


def test_recompute_policy_that_training_cannot_run_is_named(tmp_path: Path) -> None:
    policies = (RecomputePolicy(name="full", bytes_per_token=9.0), RecomputePolicy(name="half", bytes_per_token=5.0))
    path = _saved(tmp_path, recompute_policies=policies)
    with pytest.raises(InputError, match="recompute policy 'half'; expected 'none' or 'full'"):
        read_cost_model(_config(path))
    path = _saved(tmp_path, recompute_policies=policies[:1])
    assert read_cost_model(_config(path)).recompute_policies == policies[:1]


def test_training_runs_every_method_that_a_cost_model_may_name() -> None:
    assert set(METHOD_NAMES) <= set(METHODS)


def test_configured_method_is_the_only_one_and_keeps_its_own_constants() -> None:
    ulysses = MethodCost(name="ulysses", communication_s=((2, 7e-6),), overlap=0.5, fixed_s=1e-3)
    given = dataclasses.replace(_MODEL, methods=(ulysses,))
    model = for_model(given, _config(method="ulysses"), _SIZE)
    assert (model.attention, model.methods, model.method_cost("ulysses")) == ("ulysses", (), ulysses)
    assert for_model(given, _config(), _SIZE).attentions == ("ring", "ulysses")


def test_heads_are_those_of_the_model_that_trains_not_of_the_one_that_was_measured() -> None:
    """Ulysses on 6 ranks would stop the step: 4 key heads and 6 ranks do not share."""
    given = dataclasses.replace(_MODEL, attention="ulysses", num_heads=8, num_kv_heads=8)
    model = for_model(given, _config(), dataclasses.replace(_SIZE, num_heads=12, num_kv_heads=4))
    assert [degree for degree in range(1, 13) if model.allows_degree(degree)] == [1, 2, 4, 12]


@pytest.mark.parametrize(("dtype", "bytes_per_parameter"), [("bf16", 2 + 4), ("fp32", 4 + 4), ("fp64", 8 + 8)])
def test_unsharded_bytes_are_filled_in_for_per_step(dtype: str, bytes_per_parameter: int) -> None:
    model = for_model(_MODEL, _config(sync="per-step", dtype=dtype), _SIZE)
    assert model.unsharded_state_bytes == 1000 * bytes_per_parameter
    assert for_model(_MODEL, _config(dtype=dtype), _SIZE).unsharded_state_bytes is None
    measured = dataclasses.replace(_MODEL, unsharded_state_bytes=5.0)
    assert for_model(measured, _config(sync="per-step", dtype=dtype), _SIZE).unsharded_state_bytes == 5.0
