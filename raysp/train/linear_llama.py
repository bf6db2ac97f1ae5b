"""A Llama whose softmax layers, all or most, are replaced by linear attention of a chosen family (LASP-2's Linear-Llama3).

A transformers model like any other: ``model_type = "linear_llama"`` names it after :func:`register`, it saves and loads as
safetensors with a ``config.json``.

Source: LASP-2 and its hybrid LASP-2H (arXiv:2502.07563), section 3.4.
"""

# No `from __future__ import annotations`: the strict dataclass checks values by their types.
from typing import Any

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel

from raysp.train.linear_families import FAMILIES
from raysp.train.linear_layer import LinearAttention

_LAYER_TYPES = ("linear_attention", "full_attention")


@strict
class LinearLlamaConfig(LlamaConfig):
    """A Llama's configuration and which linear attention stands where.

    Attributes:
        linear_attention: One of :data:`raysp.train.linear_families.FAMILIES`.
        softmax_every: Every so many-th layer keeps softmax attention, 4 for a quarter; 0 for none.
        layer_types: ``linear_attention`` or ``full_attention`` for every layer; follows from ``softmax_every``.
        linear_num_heads: Heads of linear layers; ``num_attention_heads`` by default.
        linear_key_head_dim: Size of a key; by default ``head_dim``, half of it for ``gla``.
        linear_value_head_dim: Size of a value; ``head_dim`` by default.
        linear_conv_kernel_dim: Tokens that the short convolution of the delta rules and of Mamba-2 sees; 0 for none.
        linear_gate_rank: Rank of the gates of ``gla`` and ``kda``.
    """

    model_type = "linear_llama"

    linear_attention: str = "gated_deltanet"
    softmax_every: int | None = None
    layer_types: list[str] | None = None
    linear_num_heads: int | None = None
    linear_key_head_dim: int | None = None
    linear_value_head_dim: int | None = None
    linear_conv_kernel_dim: int = 4
    linear_gate_rank: int = 16
    use_cache: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        """Fill what was not given.

        Raises:
            ValueError: A field does not fit; the message names it.
        """
        if self.linear_attention not in FAMILIES:
            raise ValueError(f"linear_attention is {self.linear_attention!r}; expected one of {', '.join(FAMILIES)}")
        head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.linear_num_heads is None:
            self.linear_num_heads = self.num_attention_heads
        if self.linear_key_head_dim is None:
            self.linear_key_head_dim = max(1, head_dim // 2) if FAMILIES[self.linear_attention].half_keys else head_dim
        if self.linear_value_head_dim is None:
            self.linear_value_head_dim = head_dim
        self._fill_layer_types()
        self._check_sizes(head_dim)
        super().__post_init__(**kwargs)

    def _fill_layer_types(self) -> None:
        every = self.softmax_every
        if every is not None and every < 0:
            raise ValueError(f"softmax_every is {every}; expected 0 for no softmax layer, or a number of layers")
        expected = [
            "full_attention" if every and (layer + 1) % every == 0 else "linear_attention"
            for layer in range(self.num_hidden_layers)
        ]
        if self.layer_types is None:
            self.layer_types = expected
        wrong = sorted(set(self.layer_types) - set(_LAYER_TYPES))
        if wrong or len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(self.layer_types)} entries {', '.join(wrong)}; expected one of "
                f"{', '.join(_LAYER_TYPES)} for each of {self.num_hidden_layers} layers"
            )
        if every is not None and self.layer_types != expected:
            raise ValueError(f"layer_types and softmax_every = {every} disagree; expected one of them alone")

    def _check_sizes(self, head_dim: int) -> None:
        smallest = {
            "linear_num_heads": 1, "linear_key_head_dim": 1, "linear_value_head_dim": 1, "linear_gate_rank": 1,
            "linear_conv_kernel_dim": 0,
        }  # fmt: skip
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least {least}")
        if FAMILIES[self.linear_attention].rotary and self.linear_key_head_dim != head_dim:
            raise ValueError(
                f"linear_key_head_dim is {self.linear_key_head_dim}; {self.linear_attention} rotates keys by position and "
                f"needs head_dim, which is {head_dim}"
            )


class LinearLlamaPreTrainedModel(LlamaPreTrainedModel):
    """What the parts of the model share."""

    config: LinearLlamaConfig

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LinearAttention):
            module.initialize_own_weights()


class LinearLlamaModel(LinearLlamaPreTrainedModel, LlamaModel):
    """The decoder; linear layers stand where a Llama has ``self_attn``."""

    def __init__(self, config: LinearLlamaConfig) -> None:
        super().__init__(config)
        for index, (layer, layer_type) in enumerate(zip(self.layers, config.layer_types or (), strict=True)):
            if layer_type == "linear_attention":
                layer.self_attn = LinearAttention(config, index)
        self.post_init()


class LinearLlamaForCausalLM(LinearLlamaPreTrainedModel, LlamaForCausalLM):
    """The decoder with its output embedding."""

    config_class = LinearLlamaConfig

    def __init__(self, config: LinearLlamaConfig) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = LinearLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


def register() -> None:
    """Tell transformers' ``Auto`` classes of ``linear_llama``; may be called again."""
    AutoConfig.register("linear_llama", LinearLlamaConfig, exist_ok=True)
    AutoModelForCausalLM.register(LinearLlamaConfig, LinearLlamaForCausalLM, exist_ok=True)
