"""Which models are accepted, and what the others are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from raysp.config import ModelConfig
from raysp.errors import InputError
from raysp.train.model import build_model, read_model_config

_LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_vocabulary_and_positions_are_filled_from_the_data() -> None:
    config = read_model_config(ModelConfig(config=_LLAMA), vocab_size=123, max_length=4567)
    assert config.vocab_size == 123
    assert config.max_position_embeddings == 4567


def test_configuration_may_be_a_json_file(tmp_path: Path) -> None:
    file = tmp_path / "model.json"
    file.write_text(json.dumps(_LLAMA))
    assert read_model_config(ModelConfig(config=str(file)), vocab_size=7, max_length=8).hidden_size == 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "lama"}, "model_type = 'lama' is not understood"),
        ({"vocab_size": 5}, "the model knows 5 tokens, the dataset uses 100"),
        ({"max_position_embeddings": 10}, "longest sequence has 50 tokens"),
        ({"attention_dropout": 0.1}, "attention_dropout = 0.1; expected 0"),
        ({"hiden_size": 64}, "unknown key 'hiden_size' for 'llama'; did you mean 'hidden_size'"),
        ({"hidden_size": "wide"}, "model.config does not fit 'llama'"),
    ],
)
def test_unsupported_model_is_refused_with_its_reason(change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_model_config(ModelConfig(config={**_LLAMA, **change}), vocab_size=100, max_length=50)


def test_missing_folder_and_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        read_model_config(ModelConfig(path=str(tmp_path / "none")), vocab_size=None, max_length=5)
    with pytest.raises(InputError, match=r"cannot read model\.config"):
        read_model_config(ModelConfig(config=str(tmp_path / "none.json")), vocab_size=None, max_length=5)


def _save_model(folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**_LLAMA, vocab_size=50)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def _load(folder: Path) -> torch.nn.Module:
    config = ModelConfig(path=str(folder))
    model_config = read_model_config(config, vocab_size=50, max_length=8)
    return build_model(config, model_config, dtype=torch.float32, device=torch.device("cpu"), seed=0)


def test_pretrained_weights_are_loaded(tmp_path: Path) -> None:
    _save_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert torch.equal(_load(tmp_path).lm_head.weight, weights["lm_head.weight"])


@pytest.mark.parametrize("damage", ["missing", "unexpected", "corrupt"])
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, damage: str) -> None:
    _save_model(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    if damage == "corrupt":
        file.write_bytes(file.read_bytes()[:100])
    else:
        if damage == "missing":
            del weights["model.layers.1.mlp.up_proj.weight"]
        else:
            weights["model.layers.7.mlp.up_proj.weight"] = torch.zeros(3)
        save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"1 {damage} tensors" if damage != "corrupt" else "cannot load the weights"):
        _load(tmp_path)
