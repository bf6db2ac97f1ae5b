"""Which real transformers models are accepted, what the others are told, and that the accepted ones compute what they did."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from raysp.attention import SequenceLayout
from raysp.cluster.calibration import model_flops
from raysp.config import ModelConfig
from raysp.errors import InputError
from raysp.train.model import build_model, read_model_config
from raysp.train.model_size import size_of
from raysp.train.row_check import check_rows_are_apart, record_layers
from raysp.train.sequence_mixing import AttentionContext

_TINY: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_experts": 4}
_DELTA_NET = {
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_QWEN3_NEXT = {"model_type": "qwen3_next", **_EXPERTS, **_DELTA_NET, "shared_expert_intermediate_size": 16}
_HALF_SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}


def _table(model_type: str, **fields: Any) -> dict[str, Any]:
    return {"model_type": model_type, **_TINY, **fields}


def _read(table: dict[str, Any]) -> Any:
    return read_model_config(ModelConfig(config=table), vocab_size=None, max_length=64)


def _build(table: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    return build_model(ModelConfig(config=table), _read(table), dtype=dtype, device=torch.device("cpu"), seed=0)


def _layer_kinds(model: Any) -> list[tuple[str, int | None]]:
    return [(layer.kind, layer.window) for layer in record_layers(model)]


_FULL, _LINEAR = ("full_attention", None), ("linear_attention", None)
_ACCEPTED: list[tuple[dict[str, Any], list[tuple[str, int | None]]]] = [
    (_table("llama"), [_FULL] * 2),
    (_table("qwen3", head_dim=8), [_FULL] * 2),
    (
        _table("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1),
        [_FULL, ("sliding_attention", 8)],
    ),
    (_table("mistral", sliding_window=8), [("sliding_attention", 8)] * 2),
    (_table("phi3", sliding_window=8), [("sliding_attention", 8)] * 2),
    (_table("gemma3_text", head_dim=8, **_HALF_SLIDING), [("sliding_attention", 8), _FULL]),
    (_table("olmo3", **_HALF_SLIDING), [("sliding_attention", 8), _FULL]),
    (_table("exaone4", **_HALF_SLIDING), [("sliding_attention", 8), _FULL]),
    (_table("mixtral", num_local_experts=4, num_experts_per_tok=2), [_FULL] * 2),
    (_table("qwen3_moe", **_EXPERTS), [_FULL] * 2),
    (_table("olmoe", num_experts=4, num_experts_per_tok=2), [_FULL] * 2),
    ({**_TINY, **_QWEN3_NEXT}, [_LINEAR, _FULL]),
    ({**_TINY, **_QWEN3_NEXT, "mlp_only_layers": [0]}, [_LINEAR, _FULL]),
    (_table("qwen3_5_text", **_DELTA_NET), [_LINEAR, _FULL]),
]


@pytest.mark.parametrize(
    ("table", "kinds"), _ACCEPTED, ids=lambda value: value.get("model_type", "") if isinstance(value, dict) else ""
)
def test_accepted_model_computes_what_transformers_does(table: dict[str, Any], kinds: list[Any]) -> None:
    from transformers import AutoModelForCausalLM

    config = _read(table)
    eager = AutoModelForCausalLM.from_config(
        copy.deepcopy(config), dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    torch.manual_seed(3)
    for parameter in eager.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    model = _build(table)
    model.load_state_dict(eager.state_dict())
    assert _layer_kinds(model) == kinds
    ids = torch.randint(1, 97, (1, 41))
    positions = torch.arange(41)[None]
    expected = eager(input_ids=ids, position_ids=positions, use_cache=False).logits
    logits = model(
        input_ids=ids, position_ids=positions, use_cache=False, attention_context=AttentionContext.of_whole_rows(1, 41)
    ).logits
    assert (logits - expected).abs().max() < 2e-5 * expected.abs().max()
    gradients = torch.autograd.grad(logits.square().sum(), list(model.parameters()))
    for (name, parameter), gradient in zip(eager.named_parameters(), gradients, strict=True):
        theirs = torch.autograd.grad(expected.square().sum(), parameter, retain_graph=True)[0]
        assert (gradient - theirs).abs().max() <= 2e-4 * theirs.abs().max(), name


def test_packed_documents_of_a_gated_delta_net_do_not_see_each_other() -> None:
    table = {**_TINY, **_QWEN3_NEXT}
    model = _build(table, torch.float64)

    def hidden(ids: Tensor, lengths: list[int]) -> Tensor:
        layout = SequenceLayout(lengths, 1, "contiguous")
        context = AttentionContext(layout=layout, group=None, group_rank=0, method="auto", kernel="auto")
        out: Tensor = model.model(
            input_ids=ids[None], position_ids=layout.positions(0)[None], use_cache=False, attention_context=context
        ).last_hidden_state[0]
        return out

    ids = torch.randint(1, 97, (50,))
    apart = torch.cat([hidden(part, [len(part)]) for part in ids.split([3, 40, 7])])
    torch.testing.assert_close(hidden(ids, [3, 40, 7]), apart, rtol=1e-6, atol=1e-6)


_BY_STRUCTURE = "which mixes tokens in its own way"
_REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("bamba", {}, r"layer 0 has mamba \(BambaMixer\), " + _BY_STRUCTURE),
    ("jamba", {}, r"layer 0 has mamba \(JambaMambaMixer\)"),
    ("granitemoehybrid", {"layer_types": ["mamba", "attention"]}, r"layer 0 has mamba \(GraniteMoeHybridMambaLayer\)"),
    ("nemotron_h", {}, r"layer 0 has mixer \(NemotronHMamba2Mixer\)"),
    ("lfm2", {"layer_types": ["conv", "full_attention"]}, r"layer 0 has conv \(Lfm2ShortConv\)"),
    (
        "minimax",
        {"layer_types": ["linear_attention", "full_attention"]},
        r"layer 0 has self_attn \(MiniMaxLightningAttention\)",
    ),
    ("kimi_linear", {}, r"layer 0 has self_attn \(KimiLinearDeltaAttention\)"),
    (
        "olmo_hybrid",
        {"layer_types": ["linear_attention", "full_attention"]},
        r"layer 0 has linear_attn \(OlmoHybridGatedDeltaNet\)",
    ),
    ("recurrent_gemma", {}, r"layer 0 has temporal_block.conv_1d \(Conv1d\)"),
    ("mamba", {}, "MambaForCausalLM has no model.layers"),
    ("mamba2", {}, "Mamba2ForCausalLM has no model.layers"),
    ("falcon_mamba", {}, "has no model.layers"),
    ("rwkv", {}, "RwkvForCausalLM has no model.layers"),
    ("xlstm", {}, "has no model.layers"),
    ("deepseek_v32", {}, r"layer 0 has self_attn.indexer \(DeepseekV32Indexer\)"),
    ("xglm", {"attention_dropout": 0.0, "dropout": 0.0}, r"layer 0 has self_attn \(XGLMAttention\)"),
    ("gemma2", {"final_logit_softcapping": None}, "Gemma2Attention of layer 0 asks its attention for softcap"),
    ("gemma2", {"attn_logit_softcapping": None}, "final_logit_softcapping = 30.0"),
    ("gpt_oss", {}, "GptOssAttention of layer 0 asks its attention for s_aux"),
    ("llama4_text", {}, "layer 0 of 'llama4_text' is declared chunked_attention"),
    ("deepseek_v3", {}, "queries, keys and values of 192, 192 and 128 numbers per head"),
    ("diffllama", {}, "mixed its tokens through raysp 2 times"),
    ("cohere", {}, "logit_scale = 0.0625"),
    ("phi", {}, "has a bias in its output embedding"),
    ("qwen3_5", {}, "Use its text model's configuration, 'qwen3_5_text'"),
    ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type = 'dynamic'"),
    ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise = 0.1"),
    (
        "mixtral",
        {"output_router_logits": True},
        "output_router_logits = True, which asks for the routers' auxiliary loss",
    ),
    ("qwen3_next", {"output_router_logits": True}, "output_router_logits = True"),
]


@pytest.mark.parametrize(
    ("model_type", "fields", "message"), _REFUSED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_model_that_would_be_trained_wrongly_is_refused_with_its_layer(
    model_type: str, fields: dict[str, Any], message: str
) -> None:
    from transformers import CONFIG_MAPPING

    # Sizes stay as they are by default: on the meta device they cost nothing.
    layers = {"num_hidden_layers": 2} if "layer_types" in fields else {}
    known = CONFIG_MAPPING[model_type]().to_dict()
    positions = {"max_position_embeddings": 4096} if "max_position_embeddings" in known else {}
    with pytest.raises(InputError, match=message):
        _read({"model_type": model_type, **positions, **layers, **fields})


def _llama_with(mlp: nn.Module) -> Any:
    table = _table("llama")
    model = _build(table)
    model.model.layers[1].mlp = mlp
    return model


class _LooksBack(nn.Module):
    """Adds the row before, like a token shift; neither its name nor its arguments say so."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.roll(1, dims=1)


class _Averages(nn.Module):
    """Sees all rows, whatever their order."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


class _KnowsItsPlace(nn.Module):
    """Adds the index in the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.arange(x.shape[1]).unsqueeze(1)


@pytest.mark.parametrize(
    "mlp", [_LooksBack(), _Averages(), _KnowsItsPlace(), nn.Dropout(0.5)], ids=lambda m: type(m).__name__
)
def test_rows_that_see_each_other_by_unknown_ways_are_found_by_running_them(mlp: nn.Module) -> None:
    with pytest.raises(InputError, match=r"layer 1 \(LlamaDecoderLayer\) mixes tokens in its own way"):
        check_rows_are_apart(_llama_with(mlp))


def test_logits_that_are_changed_after_the_embedding_are_found_by_running_them() -> None:
    model = _llama_with(nn.Identity())
    model.lm_head.register_forward_hook(lambda module, args, out: out * 0.5)
    with pytest.raises(InputError, match="changes its logits after the output embedding"):
        check_rows_are_apart(model)


def test_size_tells_linear_and_sliding_layers_and_idle_experts_apart() -> None:
    table = {
        **_TINY,
        **_QWEN3_NEXT,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention"] * 2 + ["full_attention"],
    }
    size = size_of(_build(table))
    assert (size.num_layers, size.num_linear_layers, size.num_full_layers) == (3, 2, 1)
    assert (size.linear_num_heads, size.linear_key_size, size.linear_value_size) == (4, 8, 8)
    assert (size.num_heads, size.num_kv_heads, size.head_dim) == (4, 2, 8)
    assert size.num_idle_expert_parameters == 3 * 2 * (3 * 16 * 32)
    matrices = size.num_parameters - size.num_embedding_parameters - size.num_idle_expert_parameters
    expected = 6 * matrices * 30 + 12 * 2 * 4 * 8 * 8 * 30 + 6 * 4 * 8 * (10**2 + 20**2)
    assert model_flops(size, (10, 20)) == expected


def test_flops_of_windows_count_the_keys_that_are_seen() -> None:
    table = _table("mistral", sliding_window=8)
    size = size_of(_build(table))
    assert (size.num_sliding_layers, size.sliding_window, size.num_full_layers) == (2, 8, 0)
    matrices = 6 * (size.num_parameters - size.num_embedding_parameters)
    assert model_flops(size, (5,)) - matrices * 5 == 6 * 2 * 4 * 8 * 25
    assert model_flops(size, (100,)) - matrices * 100 == 6 * 2 * 4 * 8 * (2 * 8 * 100 - 64)
