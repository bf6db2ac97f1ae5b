"""Gated DeltaNet layers of transformers, with convolution and recurrence over the tokens of a group.

Modules, parameters and their names stay those of transformers, so weights are loaded and saved as ever; what is replaced is
the forward pass alone.

Symbols: R rows, Hk key heads, Hv value heads, K and V sizes of a head.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from raysp.errors import InputError
from raysp.train.sequence_mixing import SequenceMixing, layer_name, note_call

# The projections that tell transformers' variants apart.
_INTERLEAVED = ("in_proj_qkvz", "in_proj_ba")  # Qwen3-Next
_SEPARATE = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")  # Qwen3.5
_SHARED = ("conv1d", "A_log", "dt_bias", "norm", "out_proj")
_CLASSES = ("Qwen3NextGatedDeltaNet", "Qwen3_5GatedDeltaNet", "Qwen3_5MoeGatedDeltaNet")


def is_gated_delta_net(module: nn.Module) -> bool:
    """Whether this is a layer that :func:`shard_gated_delta_nets` knows how to run."""
    return type(module).__name__ in _CLASSES and type(module).__module__.startswith("transformers.")


def shard_gated_delta_nets(model: nn.Module) -> None:
    """Let the model's Gated DeltaNet layers run through the context of the forward pass, in place.

    Raises:
        InputError: This transformers builds such a layer in another way.
    """
    layers: list[Any] = [module for module in model.modules() if is_gated_delta_net(module)]
    for module in layers:
        names = _SHARED + (_INTERLEAVED if hasattr(module, _INTERLEAVED[0]) else _SEPARATE)
        missing = [name for name in names if not hasattr(module, name)]
        if missing:
            raise InputError(
                f"{layer_name(module)} has no {', '.join(missing)}; expected the layer of transformers 5. Install a version "
                "that raysp was tested with."
            )
        if module.conv1d.bias is not None or module.activation != "silu":
            raise InputError(
                f"{layer_name(module)} has activation {module.activation!r} or a bias in its convolution; expected 'silu' "
                "and none. Set hidden_act = 'silu'."
            )
        module.forward = MethodType(_forward, module)


def _forward(self: Any, hidden_states: Tensor, *, attention_context: SequenceMixing | None = None, **_: Any) -> Tensor:
    """``[1, R, E]`` -> ``[1, R, E]``."""
    if attention_context is None:
        raise InputError(f"{layer_name(self)} was called without raysp's context; run the model through raysp.train.")
    note_call(
        attention_context, self, "linear_attention", num_heads=self.num_v_heads, num_key_heads=self.num_v_heads,
        key_size=self.head_k_dim, value_size=self.head_v_dim,
    )  # fmt: skip
    mixed, z, b, a = _projections(self, hidden_states[0])
    mixed = functional.silu(attention_context.convolve(mixed, self.conv1d.weight.squeeze(1)))
    q, k, v = mixed.split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
    repeats = self.num_v_heads // self.num_k_heads
    q, k = (
        _unit(rows.unflatten(-1, (self.num_k_heads, self.head_k_dim))).repeat_interleave(repeats, dim=1)
        for rows in (q, k)
    )
    wide = torch.promote_types(a.dtype, torch.float32)
    log_decay = -self.A_log.to(wide).exp() * functional.softplus(a.to(wide) + self.dt_bias.to(wide))
    out = attention_context.attend_linearly(
        q, k, v.unflatten(-1, (self.num_v_heads, self.head_v_dim)), log_decay=log_decay, beta=b.sigmoid(), rule="delta",
        scale=self.head_k_dim**-0.5,
    )  # fmt: skip
    normed: Tensor = self.norm(out.reshape(-1, self.head_v_dim), z.reshape(-1, self.head_v_dim))
    projected: Tensor = self.out_proj(normed.reshape(-1, self.value_dim))
    return projected.unsqueeze(0)


def _projections(layer: Any, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys and values side by side ``[R, 2*Hk*K + Hv*V]``, the gate ``[R, Hv*V]``, and b, a ``[R, Hv]``."""
    if hasattr(layer, _SEPARATE[0]):
        return layer.in_proj_qkv(rows), layer.in_proj_z(rows), layer.in_proj_b(rows), layer.in_proj_a(rows)
    repeats = layer.num_v_heads // layer.num_k_heads
    by_key_head = layer.in_proj_qkvz(rows).unflatten(-1, (layer.num_k_heads, -1))
    values = repeats * layer.head_v_dim
    parts = by_key_head.split([layer.head_k_dim, layer.head_k_dim, values, values], dim=-1)
    q, k, v, z = (part.flatten(1) for part in parts)
    b, a = (
        part.flatten(1)
        for part in layer.in_proj_ba(rows).unflatten(-1, (layer.num_k_heads, -1)).split([repeats, repeats], dim=-1)
    )
    return torch.cat([q, k, v], dim=-1), z, b, a


def _unit(rows: Tensor) -> Tensor:
    """Rows of length 1 along the last dim, formed in fp32 or wider like fla's."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(rows.dtype)
