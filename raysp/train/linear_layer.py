"""One layer of linear attention of any family, in the place of a Llama's self-attention.

Symbols: R rows, E hidden size, H heads, K and V sizes of a key and a value head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from raysp.errors import InputError
from raysp.train.linear_families import FAMILIES, forget_floor, head_slopes
from raysp.train.sequence_mixing import AttentionContext, SequenceMixing, layer_name, note_call

# Of the log-sigmoid of gated linear attention, so that states last for many tokens at the start.
_SIGMOID_TEMPERATURE = 16.0
# Range of Mamba's step sizes at the start.
_SMALLEST_STEP, _LARGEST_STEP = 1e-3, 0.1


class LinearAttention(nn.Module):
    """Projections, gates and norm of a family around ``parallel_linear_attention``.

    Args:
        config: A ``LinearLlamaConfig``.
        layer_idx: Index of the decoder layer.
    """

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.num_layers = config.num_hidden_layers
        self.family = family = FAMILIES[config.linear_attention]
        self.num_heads = heads = config.linear_num_heads
        self.key_size, self.value_size = config.linear_key_head_dim, config.linear_value_head_dim
        self.num_key_heads = key_heads = 1 if family.shared_keys else heads
        hidden, rank = config.hidden_size, config.linear_gate_rank
        keys, values = key_heads * self.key_size, heads * self.value_size

        self.q_proj = nn.Linear(hidden, keys, bias=False)
        if family.decay != "forget":
            self.k_proj = nn.Linear(hidden, keys, bias=False)
        self.v_proj = nn.Linear(hidden, values, bias=False)
        if family.convolution and config.linear_conv_kernel_dim:
            self.conv_weight = nn.Parameter(torch.empty(2 * keys + values, config.linear_conv_kernel_dim))
        if family.rule == "delta":
            self.beta_proj = nn.Linear(hidden, heads, bias=False)
        if family.decay == "step":
            self.decay_proj: nn.Module = nn.Linear(hidden, heads, bias=False)
        elif family.decay in ("sigmoid", "step_rows"):
            self.decay_proj = _low_rank(hidden, rank, heads * self.key_size, bias=family.decay == "sigmoid")
        elif family.decay == "forget":
            self.decay_proj = nn.Linear(hidden, heads * self.key_size, bias=False)
        if family.decay.startswith("step"):
            self.A_log = nn.Parameter(torch.empty(heads))
            self.dt_bias = nn.Parameter(torch.empty(heads * (1 if family.decay == "step" else self.key_size)))
        if family.gate != "none":
            self.gate_proj = (
                _low_rank(hidden, rank, values, bias=True)
                if family.low_rank_gate
                else nn.Linear(hidden, values, bias=False)
            )
        if family.skip:
            self.D = nn.Parameter(torch.empty(heads))
        self.norm = nn.RMSNorm(self.value_size, eps=config.rms_norm_eps)
        self.o_proj = nn.Linear(values, hidden, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        past_key_values: Any = None,
        attention_context: SequenceMixing | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """``[B, R, E]`` -> the same; B is 1 in training. Without a context every row of the batch is a document.

        Raises:
            InputError: States of earlier calls were given.
        """
        if past_key_values is not None:
            raise InputError(f"{layer_name(self)} keeps no states between calls; pass use_cache=False.")
        if attention_context is None:
            attention_context = AttentionContext.of_whole_rows(*hidden_states.shape[:2])
        note_call(
            attention_context, self, "linear_attention", num_heads=self.num_heads, num_key_heads=self.num_heads,
            key_size=self.key_size, value_size=self.value_size,
        )  # fmt: skip
        rows = hidden_states.flatten(0, 1)
        q, k, v = self._queries_keys_values(rows, attention_context)
        log_decay, k = self._decay(rows, k)
        if self.family.rotary and position_embeddings is not None:
            cos, sin = (part.expand(len(hidden_states), -1, -1).flatten(0, 1) for part in position_embeddings)
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
        out = attention_context.attend_linearly(
            q.expand(-1, self.num_heads, -1),
            k.expand(-1, self.num_heads, -1),
            v,
            log_decay=log_decay,
            beta=self.beta_proj(rows).sigmoid() if self.family.rule == "delta" else None,
            rule=self.family.rule,
            scale=self.key_size**-0.5 if self.family.scaled else 1.0,
        )
        if self.family.skip:
            out = out + self.D.unsqueeze(1) * v
        return self.o_proj(self._gated(out, rows).flatten(1)).view_as(hidden_states), None

    def _queries_keys_values(self, rows: Tensor, context: SequenceMixing) -> tuple[Tensor, Tensor, Tensor]:
        """``[R, H or 1, K]`` twice and ``[R, H, V]``; the keys of HGRN-2 are made of its gate later."""
        family = self.family
        q, v = self.q_proj(rows), self.v_proj(rows)
        k = q if family.decay == "forget" else self.k_proj(rows)
        if hasattr(self, "conv_weight"):
            sizes = [q.shape[1], k.shape[1], v.shape[1]]
            q, k, v = context.convolve(torch.cat([q, k, v], dim=1), self.conv_weight).split(sizes, dim=1)
        q, k = (part.unflatten(1, (self.num_key_heads, self.key_size)) for part in (q, k))
        v = v.unflatten(1, (self.num_heads, self.value_size))
        if family.feature in ("silu", "unit", "gated"):
            q, k = functional.silu(q), functional.silu(k)
        if family.feature == "unit":
            q, k = functional.normalize(q, dim=-1, eps=1e-6), functional.normalize(k, dim=-1, eps=1e-6)
        if family.feature == "elu":
            q, k = functional.elu(q) + 1, functional.elu(k) + 1
        return q, k, functional.silu(v) if family.value_silu else v

    def _decay(self, rows: Tensor, k: Tensor) -> tuple[Tensor | None, Tensor]:
        """The log decay in fp32 or wider, and the keys, which some families scale by what the gate lets in."""
        kind, wide = self.family.decay, torch.promote_types(rows.dtype, torch.float32)
        if kind == "none":
            return None, k
        if kind in ("retention", "alibi"):
            slopes = head_slopes(kind, num_heads=self.num_heads, layer=self.layer_idx, num_layers=self.num_layers)
            return torch.tensor(slopes, dtype=wide, device=rows.device), k
        raw = self.decay_proj(rows).to(wide)
        by_row = raw.unflatten(1, (self.num_heads, -1))
        if kind == "sigmoid":
            return functional.logsigmoid(by_row) / _SIGMOID_TEMPERATURE, k
        if kind == "forget":
            floor = forget_floor(layer=self.layer_idx, num_layers=self.num_layers)
            kept = (floor + (1 - floor) * by_row.sigmoid()).clamp_min(torch.finfo(wide).tiny)
            return kept.log(), (1 - kept).to(rows.dtype)
        step = functional.softplus(raw + self.dt_bias.to(wide)).unflatten(1, (self.num_heads, -1))
        log_decay = -self.A_log.to(wide).exp().unsqueeze(1) * step
        if kind == "step_rows":
            return log_decay, k
        # Mamba discretizes its input with the step as well; the delta rule has beta for that.
        return log_decay.squeeze(2), k * step.to(k.dtype) if self.family.rule == "additive" else k

    def _gated(self, out: Tensor, rows: Tensor) -> Tensor:
        """Norm and gate of ``[R, H, V]``."""
        gate = self.family.gate
        if gate == "none":
            normed: Tensor = self.norm(out)
            return normed
        values = self.gate_proj(rows).view_as(out)
        if gate == "first":
            normed = self.norm(out * functional.silu(values))
            return normed
        return self.norm(out) * (functional.silu(values) if gate == "silu" else values.sigmoid())

    @torch.no_grad()
    def initialize_own_weights(self) -> None:
        """Draw the parameters that are no linear layer's; called by the model's ``_init_weights``."""
        if hasattr(self, "conv_weight"):
            bound = self.conv_weight.shape[1] ** -0.5
            init.uniform_(self.conv_weight, -bound, bound)
        if hasattr(self, "A_log"):
            init.copy_(self.A_log, torch.empty_like(self.A_log).uniform_(1, 16).log_())
            low, high = torch.tensor([_SMALLEST_STEP, _LARGEST_STEP]).log().tolist()
            step = torch.empty_like(self.dt_bias).uniform_(low, high).exp_()
            init.copy_(self.dt_bias, step + torch.log(-torch.expm1(-step)))  # softplus of it is the step
        if hasattr(self, "D"):
            init.ones_(self.D)


def _low_rank(inputs: int, rank: int, outputs: int, *, bias: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=bias))
