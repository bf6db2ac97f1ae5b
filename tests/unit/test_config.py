"""Configuration: unknown keys, wrong types and contradictions are one clear line."""

from __future__ import annotations

from pathlib import Path

import pytest

from raysp.config import load_config
from raysp.errors import InputError

_DEMO = Path(__file__).parents[2] / "jobs" / "configs" / "demo.toml"


def test_demo_configuration_is_valid() -> None:
    assert load_config(_DEMO).planner.policy == "adaptive"


def test_overrides_replace_values_and_read_toml_types() -> None:
    config = load_config(
        _DEMO, ["train.num_steps=3", "train.dtype=bfloat16", "data.path=/a b", "model.config.hidden_size=64"]
    )
    assert (config.train.num_steps, config.train.dtype, config.data.path) == (3, "bf16", "/a b")
    assert isinstance(config.model.config, dict)
    assert config.model.config["hidden_size"] == 64


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stepz=3", "unknown key 'train.stepz'; expected one of num_steps"),
        ("trian.num_steps=3", "unknown key 'trian'; expected one of model, data"),
        ("train.num_steps=many", "'train.num_steps' is 'many'"),
        ("train.num_steps=0", "'train.num_steps' is 0"),
        ("train.learning_rate=nan", "'train.learning_rate' is nan"),
        ("planner.policy=static:0", "'planner.policy' is 'static:0'"),
        ("data.sequences_per_step=4", "exactly one of data.tokens_per_step and data.sequences_per_step"),
        ("model.path=x", r"exactly one of model\.path and model\.config"),
        ("num_steps", "expected key.path=value"),
        ("data.path.x=3", "data.path.x=3': path is a value, not a section"),
    ],
)
def test_bad_value_is_named(override: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(_DEMO, [override])


def test_missing_file_and_bad_toml_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the configuration"):
        load_config(tmp_path / "none.toml")
    bad = tmp_path / "bad.toml"
    bad.write_text("[train\n")
    with pytest.raises(InputError, match="is not valid TOML"):
        load_config(bad)
    bad.write_text("[train]\nnum_steps = 3\n")
    with pytest.raises(InputError, match="'model' is missing"):
        load_config(bad)
