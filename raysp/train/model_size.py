"""Sizes of a model that tell what a step of it costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from raysp.train.row_check import decoder_layers, record_layers


@dataclass(frozen=True)
class ModelSize:
    """What the cost model and the MFU need to know of a model.

    Attributes:
        num_parameters: Of everything.
        num_embedding_parameters: Of the input embedding.
        num_layers: Decoder layers of any kind.
        num_heads: Query heads of softmax layers; heads of the state where there are none.
        num_kv_heads: Key heads, likewise.
        head_dim: Size of a head of softmax layers.
        hidden_size: Of the residual stream.
        largest_layer_parameters: Of the largest decoder layer.
        num_linear_layers: Layers with linear attention, whose cost is linear in the length.
        linear_num_heads: Heads of their states.
        linear_key_size: Rows of a head's state.
        linear_value_size: Columns of a head's state.
        num_sliding_layers: Softmax layers with a window.
        sliding_window: Keys that a token sees there, itself included.
        num_idle_expert_parameters: Of experts that a token is not routed to.
    """

    num_parameters: int
    num_embedding_parameters: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    largest_layer_parameters: int
    num_linear_layers: int = 0
    linear_num_heads: int = 0
    linear_key_size: int = 0
    linear_value_size: int = 0
    num_sliding_layers: int = 0
    sliding_window: int = 0
    num_idle_expert_parameters: int = 0

    @property
    def num_softmax_layers(self) -> int:
        """Layers with softmax attention, with or without a window."""
        return self.num_layers - self.num_linear_layers

    @property
    def num_full_layers(self) -> int:
        """Layers whose tokens see all tokens before them."""
        return self.num_softmax_layers - self.num_sliding_layers


def size_of(model: Any) -> ModelSize:
    """Measure a built model; its layers are run once on a few rows that do not see each other."""
    layers = record_layers(model)
    linear = [layer for layer in layers if layer.kind == "linear_attention"]
    sliding = [layer for layer in layers if layer.kind == "sliding_attention"]
    attention = next((layer for layer in layers if layer.kind != "linear_attention"), layers[0])
    state = linear[0] if linear else None
    return ModelSize(
        num_parameters=sum(p.numel() for p in model.parameters()),
        num_embedding_parameters=model.get_input_embeddings().weight.numel(),
        num_layers=len(layers),
        num_heads=attention.num_heads,
        num_kv_heads=attention.num_key_heads,
        head_dim=attention.key_size,
        hidden_size=model.config.hidden_size,
        largest_layer_parameters=max(sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(model)),
        num_linear_layers=len(linear),
        linear_num_heads=state.num_heads if state else 0,
        linear_key_size=state.key_size if state else 0,
        linear_value_size=state.value_size if state else 0,
        num_sliding_layers=len(sliding),
        sliding_window=(sliding[0].window or 0) if sliding else 0,
        num_idle_expert_parameters=_idle_expert_parameters(model),
    )


def _idle_expert_parameters(model: nn.Module) -> int:
    """Parameters of experts, whose first dim is the expert, that the router does not choose for a token."""
    chosen = getattr(model.config, "num_experts_per_tok", None)
    idle = 0.0
    for module in model.modules():
        count = getattr(module, "num_experts", None)
        if chosen and isinstance(count, int):
            held = [p for p in module.parameters(recurse=False) if p.ndim == 3 and p.shape[0] == count]
            idle += sum(p.numel() for p in held) * (1 - min(1.0, chosen / count))
    return round(idle)
