"""A small real corpus and its configuration; every test here starts a real Ray."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import raysp

from planner import CostModel

_MODEL = """
[model.config]
model_type = "llama"
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
"""


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three packages of the standard library, prepared by the command users run."""
    root = tmp_path_factory.mktemp("corpus")
    source = root / "source"
    source.mkdir()
    stdlib = Path(sysconfig.get_path("stdlib"))
    for package in ("json", "email", "logging"):
        shutil.copytree(stdlib / package, source / package)
    output = str(root / "data")
    done = raysp("prepare", str(source), "--include", "*.py", "--train-tokenizer", "512", "--output", output)
    assert done.code == 0, done.err
    return root / "data"


@pytest.fixture
def write_config(corpus: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write a configuration whose outputs all lie in the test's folder; its cost model is given, not measured."""
    cost_model = tmp_path / "given_cost_model.json"
    CostModel(
        name="given",
        a1_s_per_token2=1e-8,
        a2_s_per_token=5e-5,
        b1_s=0.02,
        b2_s=0.02,
        communication_s=((2, 1e-5),),
        bytes_per_token=10_000.0,
        model_state_bytes_total=1e6,
        memory_limit_bytes=50e6,
        attention="ring",
    ).save(cost_model)

    def write(**values: str) -> Path:
        sections: dict[str, list[str]] = {
            "cluster": ["num_workers = 2"],
            "data": [
                f'path = "{corpus}"',
                "max_length = 1024",
                "tokens_per_step = 4096",
                "validation_fraction = 0.1",
            ],
            "train": ["num_steps = 4", "learning_rate = 1e-3"],
            "planner": ['policy = "adaptive"', "time_limit_s = 0.3", f'cost_model = "{cost_model}"'],
            "checkpoint": [f'dir = "{tmp_path / "checkpoints"}"', "every_steps = 2"],
            "tracking": [f'uri = "sqlite:///{tmp_path / "mlflow.db"}"', 'experiment = "test"'],
        }
        for key, value in values.items():
            section, _, name = key.partition("__")
            lines = sections.setdefault(section, [])
            lines[:] = [line for line in lines if not line.startswith(f"{name} =")]
            lines.append(f"{name} = {value}")
        text = _MODEL + "".join(f"\n[{name}]\n" + "\n".join(lines) + "\n" for name, lines in sections.items())
        path = tmp_path / "config.toml"
        path.write_text(text)
        return path

    return write
