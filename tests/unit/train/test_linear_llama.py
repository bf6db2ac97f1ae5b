"""Linear-Llama: its configuration, every family's layer against the recurrence written out, and its way to disk and back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, elu, logsigmoid, silu, softplus

from raysp.attention import SequenceLayout
from raysp.config import ModelConfig
from raysp.errors import InputError
from raysp.train.linear_families import FAMILIES
from raysp.train.model import build_model, read_model_config
from raysp.train.sequence_mixing import AttentionContext

_TABLE: dict[str, Any] = {
    "model_type": "linear_llama",
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_HEADS, _SIZE, _RANK = 4, 4, 16


def _read(**changes: Any) -> Any:
    return read_model_config(ModelConfig(config={**_TABLE, **changes}), vocab_size=50, max_length=32)


def _build(dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    config = ModelConfig(config={**_TABLE, **changes})
    return build_model(config, _read(**changes), dtype=dtype, device=torch.device("cpu"), seed=1)


def _states(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor | None) -> Tensor:
    """Token by token; q, k ``[T, H, K]``, decay ``[T, H, K]`` factors."""
    state = v.new_zeros(v.shape[1], q.shape[2], v.shape[2])
    outs = []
    for t in range(len(v)):
        state = decay[t].unsqueeze(2) * state
        value = v[t]
        if beta is not None:
            value = beta[t].unsqueeze(1) * (value - torch.einsum("hkv,hk->hv", state, k[t]))
        state = state + torch.einsum("hk,hv->hkv", k[t], value)
        outs.append(torch.einsum("hkv,hk->hv", state, q[t]))
    return torch.stack(outs)


def _rotated(x: Tensor) -> Tensor:
    """Llama's rotation of ``[T, H, K]`` by positions 0 to T - 1."""
    half = x.shape[2] // 2
    angles = torch.arange(len(x))[:, None] / 10000 ** (torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    cos, sin = angles.cos().unsqueeze(1).to(x), angles.sin().unsqueeze(1).to(x)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def _written_out(family: str, layer: Any, x: Tensor) -> Tensor:
    """One layer on one document ``[T, E]``, from its weights and the papers' formulas."""
    weights = dict(layer.named_parameters())
    convolved = family in ("mamba2", "deltanet", "gated_deltanet", "kda")
    names = ["q_proj", "v_proj"] if family == "hgrn2" else ["q_proj", "k_proj", "v_proj"]
    parts = [x @ weights[f"{name}.weight"].T for name in names]
    if convolved:
        mixed = torch.cat(parts, 1).T.unsqueeze(0)
        kernel = weights["conv_weight"]
        mixed = conv1d(mixed, kernel.unsqueeze(1), padding=kernel.shape[1] - 1, groups=len(kernel))[0, :, : len(x)].T
        parts = list(mixed.split([p.shape[1] for p in parts], dim=1))
    q, v = parts[0].unflatten(1, (-1, layer.key_size)), parts[-1].unflatten(1, (_HEADS, _SIZE))
    k = q if family == "hgrn2" else parts[1].unflatten(1, (-1, layer.key_size))
    if family in ("lightning", "mamba2", "deltanet", "gated_deltanet", "kda"):
        q, k, v = silu(q), silu(k), silu(v)
    if family == "basic":
        q, k = elu(q) + 1, elu(k) + 1
    if family in ("deltanet", "gated_deltanet", "kda"):
        q, k = q / q.norm(dim=2, keepdim=True), k / k.norm(dim=2, keepdim=True)
    if family in ("retention", "lightning"):
        q, k = _rotated(q), _rotated(k)
    q, k = (part.expand(-1, _HEADS, -1) for part in (q, k))
    decay = torch.ones(len(x), _HEADS, layer.key_size, dtype=x.dtype)
    if family == "retention":
        decay = decay * torch.tensor([1 - 2.0 ** (-5 - h) for h in range(_HEADS)], dtype=x.dtype)[:, None]
    if family == "lightning":
        slopes = [2.0 ** (-8 * (h + 1) / _HEADS) * (1 - layer.layer_idx / 3 + 1e-5) for h in range(_HEADS)]
        decay = decay * torch.tensor([math.exp(-s) for s in slopes], dtype=x.dtype)[:, None]
    if family in ("gated_deltanet", "mamba2"):
        step = softplus(x @ weights["decay_proj.weight"].T + weights["dt_bias"])
        decay = (-weights["A_log"].exp() * step).exp().unsqueeze(2).expand_as(decay)
        k = k * step.unsqueeze(2) if family == "mamba2" else k
    if family in ("gla", "kda"):
        raw = x @ weights["decay_proj.0.weight"].T @ weights["decay_proj.1.weight"].T
        if family == "gla":
            decay = (logsigmoid(raw + weights["decay_proj.1.bias"]) / 16).exp().view_as(decay)
        else:
            step = softplus(raw + weights["dt_bias"]).view_as(decay)
            decay = (-weights["A_log"].exp()[:, None] * step).exp()
    if family == "hgrn2":
        floor = layer.layer_idx / 4
        decay = floor + (1 - floor) * (x @ weights["decay_proj.weight"].T).sigmoid().view_as(decay)
        q, k = silu(q), 1 - decay
    beta = (x @ weights["beta_proj.weight"].T).sigmoid() if "beta_proj.weight" in weights else None
    scale = 1.0 if family in ("lightning", "mamba2", "hgrn2") else layer.key_size**-0.5
    out = scale * _states(q, k, v, decay, beta)
    if family == "mamba2":
        out = (out + weights["D"][:, None] * v) * silu(x @ weights["gate_proj.weight"].T).view_as(out)
    out = out * (out.square().mean(2, keepdim=True) + 1e-6).rsqrt() * weights["norm.weight"]
    if family in ("retention", "gla", "gated_deltanet"):
        out = out * silu(x @ weights["gate_proj.weight"].T).view_as(out)
    if family == "lightning":
        out = out * (x @ weights["gate_proj.weight"].T).sigmoid().view_as(out)
    if family == "kda":
        gate = x @ weights["gate_proj.0.weight"].T @ weights["gate_proj.1.weight"].T + weights["gate_proj.1.bias"]
        out = out * gate.sigmoid().view_as(out)
    return out.flatten(1) @ weights["o_proj.weight"].T


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_of_every_family_is_its_recurrence(family: str) -> None:
    model = _build(linear_attention=family, linear_key_head_dim=None, softmax_every=4)
    layer = model.model.layers[1].self_attn
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    documents = [torch.randn(length, 16, dtype=torch.float64, requires_grad=True) for length in (70, 1, 9)]
    context = AttentionContext(
        layout=SequenceLayout([70, 1, 9], 1, "contiguous"), group=None, group_rank=0, method="auto", kernel="auto"
    )
    positions = torch.cat([torch.arange(len(x)) for x in documents])
    rotations = model.model.rotary_emb(documents[0], positions[None])
    out, _ = layer(torch.cat(documents)[None], position_embeddings=rotations, attention_context=context)
    expected = torch.cat([_written_out(family, layer, x) for x in documents])
    tolerance = 1e-5 if family in ("retention", "lightning") else 1e-10  # transformers rotates in fp32
    torch.testing.assert_close(out[0], expected, rtol=tolerance, atol=tolerance)
    inputs = [*documents, *layer.parameters()]
    seed = torch.randn_like(expected)
    for name, ours, theirs in zip(
        ["x"] * 3 + [name for name, _ in layer.named_parameters()],
        torch.autograd.grad((out[0] * seed).sum(), inputs),
        torch.autograd.grad((expected * seed).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(
            ours, theirs, rtol=10 * tolerance, atol=10 * tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_softmax_layers_stand_where_they_are_asked_for() -> None:
    expected = ["linear_attention", "full_attention"] * 2
    assert _read(softmax_every=2).layer_types == expected
    assert _read(layer_types=expected).layer_types == expected
    assert _read().layer_types == ["linear_attention"] * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"linear_attention": "mamba3"}, "linear_attention is 'mamba3'; expected one of basic, retention"),
        (
            {"linear_atention": "gla"},
            "unknown key 'linear_atention' for 'linear_llama'; did you mean 'linear_attention'",
        ),
        ({"softmax_every": -1}, "softmax_every is -1"),
        ({"layer_types": ["linear_attention"]}, "layer_types has 1 entries"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types has 4 entries sliding_attention"),
        ({"layer_types": ["linear_attention"] * 4, "softmax_every": 2}, "disagree"),
        ({"linear_num_heads": 0}, "linear_num_heads is 0; expected at least 1"),
        ({"linear_attention": "retention", "linear_key_head_dim": 8}, "retention rotates keys by position"),
        ({"linear_num_heads": "four"}, "model.config does not fit 'linear_llama'"),
    ],
)
def test_configuration_that_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        _read(**change)


@pytest.mark.parametrize("family", ["mamba2", "kda"])
def test_saved_model_is_loaded_again_as_safetensors(family: str, tmp_path: Path) -> None:
    model = _build(torch.float32, linear_attention=family, softmax_every=2)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    config = ModelConfig(path=str(tmp_path))
    read = read_model_config(config, vocab_size=50, max_length=32)
    loaded: Any = build_model(config, read, dtype=torch.float32, device=torch.device("cpu"), seed=9)
    for (name, ours), theirs in zip(loaded.named_parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    assert read.layer_types == model.config.layer_types


def test_without_context_every_row_of_the_batch_is_a_document() -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(_read(linear_attention="gated_deltanet", softmax_every=2)).eval()
    ids = torch.randint(0, 50, (2, 11))
    both, alone = model(ids).logits, model(ids[1:, :7]).logits
    torch.testing.assert_close(both[1:, :7], alone)
    with pytest.raises(InputError, match="pass use_cache=False"):
        model(ids, use_cache=True)


def test_weights_are_finite_and_gates_begin_where_states_last() -> None:
    model = _build(torch.float32, linear_attention="kda")
    layer: nn.Module = model.model.layers[0].self_attn
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    steps = softplus(layer.dt_bias)
    assert 9e-4 < steps.min() < steps.max() < 0.11
